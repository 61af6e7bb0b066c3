"""Captions: each transformation alone, their order, and that nothing but the seed decides."""

import random
from collections import Counter

import pytest

from images.captions import process_caption
from images.dataset_settings import SubsetSettings

TAGS = "cat, sitting, red hat, outdoors, grass"


def run(caption, seed=0, epoch=0, step=0, total_steps=None, **settings):
    rng = random.Random(seed)
    return process_caption(caption, SubsetSettings(**settings), rng, epoch=epoch, step=step, total_steps=total_steps)


def test_untouched_without_settings():
    assert run("a,b ,  c; {x|y}") == "a,b ,  c; {x|y}"


def test_prefix_and_suffix_are_parted_by_a_space():
    assert run("a cat", caption_prefix="photo of", caption_suffix="in snow") == "photo of a cat in snow"
    assert run("", caption_prefix="photo of") == "photo of"


def test_shuffle_keeps_the_first_tokens_and_the_set():
    outcomes = {run(TAGS, seed=seed, shuffle_caption=True, keep_tokens=2) for seed in range(40)}
    assert len(outcomes) == 6  # 3! orders of the rest
    for text in outcomes:
        tags = text.split(", ")
        assert tags[:2] == ["cat", "sitting"] and sorted(tags) == sorted(TAGS.split(", "))


def test_same_seed_same_caption():
    assert run(TAGS, seed=3, shuffle_caption=True) == run(TAGS, seed=3, shuffle_caption=True)


def test_keep_tokens_separator_parts_prefix_flexible_and_suffix():
    text = "1girl, hat ||| a, b, c, d ||| masterpiece, best"
    settings = {"keep_tokens_separator": "|||", "shuffle_caption": True, "keep_tokens": 9}
    outcomes = {run(text, seed=seed, **settings) for seed in range(60)}
    assert len(outcomes) > 10
    for outcome in outcomes:
        tags = outcome.split(", ")
        assert tags[:2] == ["1girl", "hat"] and tags[-2:] == ["masterpiece", "best"]
        assert sorted(tags[2:-2]) == ["a", "b", "c", "d"]


def test_keep_tokens_separator_never_reaches_the_text_encoder():
    assert run("a, b ||| c", keep_tokens_separator="|||") == "a, b, c"


def test_secondary_separator_keeps_groups_together():
    outcomes = {run("a;;;b, c, d", seed=s, shuffle_caption=True, secondary_separator=";;;") for s in range(30)}
    assert outcomes and all("a,b" in outcome for outcome in outcomes)
    assert len(outcomes) == 6


def test_another_caption_separator():
    assert sorted(run("a. b. c", shuffle_caption=True, caption_separator=".").split(". ")) == ["a", "b", "c"]


def test_wildcards_choose_evenly_and_nest():
    counts = Counter(run("a {red|green|blue} cat", seed=s, enable_wildcard=True) for s in range(600))
    assert set(counts) == {"a red cat", "a green cat", "a blue cat"}
    assert min(counts.values()) > 140
    nested = {run("{ {b|c}|a}", seed=s, enable_wildcard=True) for s in range(60)}
    assert nested == {"a", " b", " c"}


def test_doubled_braces_are_literal():
    assert run("a {{b|c}} d", enable_wildcard=True) == "a {b|c} d"


def test_wildcard_picks_one_of_several_lines():
    outcomes = {run("line one\nline two", seed=s, enable_wildcard=True) for s in range(30)}
    assert outcomes == {"line one", "line two"}
    assert run("line one\nline two") == "line one"


def test_caption_dropout_rate():
    dropped = sum(run("x", seed=seed, caption_dropout_rate=0.3) == "" for seed in range(2000))
    assert 540 < dropped < 660
    assert run("x", caption_dropout_rate=1.0, caption_prefix="p") == ""


def test_caption_dropout_every_n_epochs_counts_from_one():
    texts = [run("x", epoch=epoch, caption_dropout_every_n_epochs=3) for epoch in range(6)]
    assert texts == ["x", "x", "", "x", "x", ""]


def test_tag_dropout_spares_kept_tokens():
    lengths = []
    for seed in range(300):
        tags = run(TAGS, seed=seed, caption_tag_dropout_rate=0.5, keep_tokens=1).split(", ")
        assert tags[0] == "cat"
        assert [tag for tag in TAGS.split(", ") if tag in tags] == tags  # order is kept
        lengths.append(len(tags))
    assert 2.8 < sum(lengths) / len(lengths) < 3.2  # 1 + 4/2
    assert run(TAGS, caption_tag_dropout_rate=1.0, keep_tokens=1) == "cat"


@pytest.mark.parametrize(
    "step, expected", [(0, "a"), (24, "a"), (25, "a, b"), (50, "a, b, c"), (99, "a, b, c, d"), (100, "a, b, c, d, e")]
)
def test_token_warmup_grows_linearly(step, expected):
    assert run("a, b, c, d, e", step=step, token_warmup_step=100, token_warmup_min=1) == expected


def test_token_warmup_as_a_fraction_of_the_run():
    settings = {"token_warmup_step": 0.5, "token_warmup_min": 2, "total_steps": 40}
    assert run("a, b, c, d", step=0, **settings) == "a, b"
    assert run("a, b, c, d", step=10, **settings) == "a, b, c"
    assert run("a, b, c, d", step=20, **settings) == "a, b, c, d"


def test_warmup_minimum_above_the_tag_count():
    assert run("a, b", step=1, token_warmup_step=10, token_warmup_min=5) == "a, b"
