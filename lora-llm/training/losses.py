"""The cross entropy of rows of tokens, and its mean over fixed rows, of the weights as they are."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch.nn import functional

from text.collator import IGNORE_INDEX

Batch = dict[str, torch.Tensor]


def predicted(labels: torch.Tensor) -> torch.Tensor:
    """How many tokens of each row are predicted, (N,) of labels (N, T); never the first."""
    return (labels[:, 1:] != IGNORE_INDEX).sum(1)


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of rows in nats, (N,) float32, of logits (N, T, V), labels (N, T)."""
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (N, T), each of the position before
    learned = targets != IGNORE_INDEX
    losses = functional.cross_entropy(logits[learned].float(), targets[learned], reduction="none")
    return losses.new_zeros(learned.shape).masked_scatter(learned, losses).sum(1)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, batches: Iterable[Batch]) -> float:
    """Mean loss in nats a predicted token. The model's mode and the random state stay.
    batches: `input_ids`, `attention_mask` and `labels`, (N, T) each, on any device."""
    was_training, total, tokens = model.training, 0.0, 0
    model.eval()
    for batch in batches:
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        logits = model(**inputs).logits  # (N, T, V)
        total += row_losses(logits, batch["labels"].to(logits.device)).sum().item()
        tokens += int(predicted(batch["labels"]).sum())
    model.train(was_training)
    return total / max(1, tokens)


class RowLoss:
    """Mean loss over the same rows {"input", "output"} at each call, in this process alone."""

    def __init__(
        self,
        model: torch.nn.Module,
        collator: Callable[[Sequence[Mapping[str, str]]], Batch],
        rows: Sequence[Mapping[str, str]],
        batch_size: int,
    ):
        alike = sorted(rows, key=lambda row: len(row["input"]) + len(row["output"]))  # in length: little padding
        self.model = model
        self.batches = [dict(collator(alike[at : at + batch_size])) for at in range(0, len(alike), batch_size)]

    def __call__(self) -> float:
        return mean_loss(self.model, self.batches)
