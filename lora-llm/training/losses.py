"""The loss on fixed rows, of the weights as they are: what the rules validation-patience and objective-variance look at."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from text.collator import IGNORE_INDEX

PROBE_ROWS = 16  # training examples whose loss the column probe_loss follows


class RowLoss:
    """Mean loss in nats a predicted token over the same rows {"input", "output"} each time.

    collator: makes the batches. autocast: makes the context in which the trainer computes its loss. Called with nothing, it
    leaves neither the model's mode nor the random state changed, and no process has to take part in it but its own.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        collator: Callable[[Sequence[Mapping[str, str]]], dict[str, torch.Tensor]],
        rows: Sequence[Mapping[str, str]],
        batch_size: int,
        autocast: Callable[[], AbstractContextManager],
    ):
        alike = sorted(rows, key=lambda row: len(row["input"]) + len(row["output"]))  # in length: little padding
        self.model, self.autocast = model, autocast
        self.batches: list[dict[str, Any]] = [
            dict(collator(alike[start : start + batch_size])) for start in range(0, len(alike), batch_size)
        ]

    @torch.no_grad()
    def __call__(self) -> float:
        was_training, total, tokens = self.model.training, 0.0, 0
        self.model.eval()
        with self.autocast():
            for batch in self.batches:
                count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
                total += self.model(**{k: v.to(self.model.device) for k, v in batch.items()}).loss.item() * count
                tokens += count
        self.model.train(was_training)
        return total / tokens
