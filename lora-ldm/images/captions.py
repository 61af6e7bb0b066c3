"""What training does to a caption: prefix, dropout, wildcards, shuffling, warm-up, trigger word.

Order and meaning follow kohya's trainers. All chance comes from the caller's generator."""

from __future__ import annotations

import math
import random
import re
from typing import Optional

from images.dataset_settings import SubsetSettings

WILDCARD = re.compile(r"\{([^{}]+)\}")
# Stand-ins for doubled braces, literal ones: private-use characters that no caption contains.
OPEN_BRACE, CLOSE_BRACE = "\ue000", "\ue001"


def process_caption(
    caption: str,
    subset: SubsetSettings,
    rng: random.Random,
    *,
    epoch: int,
    step: int,
    total_steps: Optional[int] = None,
) -> str:
    """The caption as it is trained on.

    caption: as written; with `enable_wildcard` several lines are alternatives.
    epoch: from 0; `caption_dropout_every_n_epochs` = n drops all captions of every n-th.
    step: completed optimizer steps, for the token warm-up.
    total_steps: of the whole run; needed where `token_warmup_step` is a fraction (below 1)."""
    text = " ".join(part for part in (subset.caption_prefix, caption, subset.caption_suffix) if part)
    if is_dropped(subset, rng, epoch):
        return ""
    if subset.enable_wildcard:
        text = resolve_wildcards(text, rng)
    else:
        text = text.split("\n", 1)[0]
    if needs_tags(text, subset):
        text = subset.between_tags.join(process_tags(text, subset, rng, step, total_steps))
    if subset.secondary_separator:
        text = text.replace(subset.secondary_separator, subset.caption_separator)
    return text if subset.is_reg else with_trigger_word(text, subset)


def with_trigger_word(text: str, subset: SubsetSettings) -> str:
    """The text with the trigger word first, unless it begins with it already."""
    trigger = subset.trigger_word
    if not trigger or re.match(rf"{re.escape(trigger)}(?!\w)", text, re.IGNORECASE):
        return text
    return f"{trigger}{subset.between_tags}{text}" if text else trigger


def is_dropped(subset: SubsetSettings, rng: random.Random, epoch: int) -> bool:
    by_chance = subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate
    every_n = subset.caption_dropout_every_n_epochs
    return by_chance or (every_n > 0 and (epoch + 1) % every_n == 0)


def resolve_wildcards(text: str, rng: random.Random) -> str:
    """One line of several; one choice of each `{a|b|c}`, innermost first; `{{`, `}}` are braces."""
    text = rng.choice(text.split("\n"))
    text = text.replace("{{", OPEN_BRACE).replace("}}", CLOSE_BRACE)
    replaced = 1
    while replaced:
        text, replaced = WILDCARD.subn(lambda match: rng.choice(match[1].split("|")), text)
    return text.replace(OPEN_BRACE, "{").replace(CLOSE_BRACE, "}")


def needs_tags(text: str, subset: SubsetSettings) -> bool:
    kept_apart = bool(subset.keep_tokens_separator) and subset.keep_tokens_separator in text
    varied = subset.shuffle_caption or subset.token_warmup_step > 0 or subset.caption_tag_dropout_rate > 0
    return varied or kept_apart


def process_tags(
    text: str, subset: SubsetSettings, rng: random.Random, step: int, total_steps: Optional[int]
) -> list[str]:
    """Tags in the order of training: fixed, those that warm-up and dropout leave, fixed suffix."""
    fixed, flexible, suffix = split_tags(text, subset)
    flexible = flexible[: warm_tag_count(len(flexible), subset, step, total_steps)]
    if subset.shuffle_caption:
        rng.shuffle(flexible)
    if subset.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if rng.random() >= subset.caption_tag_dropout_rate]
    return fixed + flexible + suffix


def split_tags(text: str, subset: SubsetSettings) -> tuple[list[str], list[str], list[str]]:
    """(fixed, flexible, fixed suffix) tags: by `keep_tokens_separator` if present, or by number."""

    def tags(part: str) -> list[str]:
        return [tag.strip() for tag in part.split(subset.caption_separator) if tag.strip()]

    mark = subset.keep_tokens_separator
    if mark and mark in text:
        fixed, flexible, suffix = (text.split(mark, 2) + [""])[:3]
        return tags(fixed), tags(flexible), tags(suffix)
    all_tags = tags(text)
    return all_tags[: subset.keep_tokens], all_tags[subset.keep_tokens :], []


def warm_tag_count(count: int, subset: SubsetSettings, step: int, total_steps: Optional[int]) -> int:
    """How many flexible tags are used: `token_warmup_min` to all at `token_warmup_step`."""
    warmup_steps = subset.token_warmup_step
    if 0 < warmup_steps < 1:
        warmup_steps = math.floor(warmup_steps * (total_steps or 0))
    if not warmup_steps or step >= warmup_steps:
        return count
    grown = math.floor(step * (count - subset.token_warmup_min) / warmup_steps) + subset.token_warmup_min
    return max(0, min(count, grown))
