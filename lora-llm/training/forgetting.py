"""What a LoRA costs elsewhere: the base's loss on general text before training and after it.

The text is one that nobody trains on (the tiny base ships its held-out `general_text.jsonl`)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from base.layers import Positions
from es_lora.files import read_text, split_lines
from text.collator import IGNORE_INDEX, encode_source, pad_batch
from text.tables import read_table
from training.losses import Batch, mean_loss, predicted

MAX_PASSAGE_TOKENS = 128  # of every passage; many short ones tell more than a few long ones
FORGOTTEN_FROM = 1.10  # ratio of perplexities from which a LoRA is said to have forgotten
NAMES = {"before": "before training", "kept": "turning point", "average": "average at the end", "last": "last step"}


def read_general_text(path: str, most: int, flag: str = "--forgetting_data") -> list[str]:
    """At most `most` passages, evenly over a file: jsonl with `text`, or text with blank lines.
    Raises FileNotFoundError where the file is missing, ValueError where it holds no text.
    flag: the one that named it."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{flag} {path}: there is no such file; give a jsonl file with text, or a txt file")
    if file.suffix.lower() in (".jsonl", ".json"):
        passages = [_text_of(f"{flag} {path}", number, row) for number, row in read_table(file)]
    else:
        passages = "\n".join(split_lines(read_text(file))).split("\n\n")
    passages = [passage.strip() for passage in passages if passage.strip()]
    if not passages:
        raise ValueError(f"{flag} {path} holds no text")
    return passages[:: math.ceil(len(passages) / most)]


def _text_of(where: str, number: int, row: dict[str, Any]) -> str:
    if not isinstance(row.get("text"), str):
        raise ValueError(f'{where}, line {number} needs a text column: {{"text": "..."}}')
    return row["text"]


def _batch(passages: Sequence[Sequence[int]], pad_id: int) -> Batch:
    batch = pad_batch(passages, pad_id)  # (N, T)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)}


class GeneralText:
    """Passages as token ids, and the loss (mean nats a token) of a model on them. `losses` collects
    {"before" | "kept" | "last": loss} as the run goes on; `tokens` is how many are predicted."""

    def __init__(self, path: str, tokenizer: Any, most: int, batch_size: int, flag: str = "--forgetting_data"):
        passages = read_general_text(path, most, flag)
        encoded = [encode_source(tokenizer, text)[:MAX_PASSAGE_TOKENS] for text in passages]
        rows = sorted((ids for ids in encoded if len(ids) > 1), key=len)  # alike in length, little padding
        if not rows:
            raise ValueError(f"{flag} {path}: no passage is longer than one token")
        self.path, self.passages, self.tokens = path, len(rows), sum(len(ids) - 1 for ids in rows)
        pad_id = tokenizer.eos_token_id
        self.batches = [_batch(rows[at : at + batch_size], pad_id) for at in range(0, len(rows), batch_size)]
        self.losses: dict[str, float] = {}

    def cut(self, positions: Optional[Positions]) -> None:
        """Cut the passages to what a base with a table of positions can read."""
        if positions is None or not positions.hard or positions.count >= MAX_PASSAGE_TOKENS:
            return
        self.batches = [{name: rows[:, : positions.count] for name, rows in batch.items()} for batch in self.batches]
        self.tokens = int(sum(predicted(batch["labels"]).sum() for batch in self.batches))

    def loss(self, model: torch.nn.Module) -> float:
        """Mean loss in nats a token of the model as it is; its mode and the random state stay."""
        return mean_loss(model, self.batches)

    def summary(self) -> dict[str, Any]:
        """What result.json says of it."""
        ratios = {name: perplexity_ratio(self.losses, name) for name in NAMES if name != "before"}
        return {
            "file": self.path,
            "passages": self.passages,
            "tokens": self.tokens,
            "loss": dict(self.losses),
            "perplexity_ratio": {name: ratio for name, ratio in ratios.items() if ratio is not None},
            "sentence": forgetting_sentence(self.losses),
        }


def perplexity_ratio(losses: dict[str, float], name: str) -> Optional[float]:
    """Perplexity of the weights `name` over that before training; None if either is unknown."""
    if name not in losses or "before" not in losses:
        return None
    return math.exp(min(losses[name] - losses["before"], 50))


def forgetting_sentence(losses: dict[str, float]) -> str:
    """Whether the LoRA has forgotten, in plain words; empty without a score after training."""
    clauses = []
    places = (("kept", "the turning point"), ("average", "the averaged weights"), ("last", "the last step"))
    for name, where in places:
        ratio = perplexity_ratio(losses, name)
        same = name == "last" and losses.get("kept") == losses.get("last")  # the turning point is the last step
        if ratio is not None and not same:
            judged = "has forgotten" if ratio >= FORGOTTEN_FROM else "has not forgotten"
            clauses.append(f"the LoRA of {where} {judged}: perplexity {ratio:.2f} times that of the base")
    return f"General text: {'; '.join(clauses)}." if clauses else ""


def forgetting_table(losses: dict[str, float]) -> tuple[str, Sequence[str], Sequence[Sequence[str]]]:
    """(title, head, rows) for the report."""
    rows = []
    for name in NAMES:
        if name in losses:
            ratio = perplexity_ratio(losses, name)
            times = "" if ratio is None else f"{ratio:.2f}"
            rows.append([NAMES[name], f"{losses[name]:.4f}", f"{math.exp(min(losses[name], 50)):.2f}", times])
    return "General text: what the LoRA has forgotten", ["weights", "loss", "perplexity", "times the base's"], rows
