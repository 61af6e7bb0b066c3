"""From {"input", "output"} pairs to padded batches for a causal language model.

Source = bos + input, target = output + eos, each cut to its own limit (the interface of qlora): a
target that is cut loses its eos, so the model is not taught to stop in the middle of a sentence.
A conversation is one text with its own end tokens, cut to both limits together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch
from tqdm import tqdm

from text.conversations import encode_learnt
from text.formats import LEARN

IGNORE_INDEX = -100  # what torch's cross entropy, and so every Hugging Face model, skips


def encode_source(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a source text, uncut: bos where the tokenizer has one, no eos."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class RowSize(NamedTuple):
    """A row in tokens: source and target before the cut, what of both is kept.

    first_learnt: the place of the first token that is predicted and learnt; None where none is.
    Of a conversation, source is its whole text.
    """

    source: int
    target: int
    kept: int
    first_learnt: Optional[int]
    is_conversation: bool


@dataclass
class CausalCollator:
    """Tokenizes, masks the source, pads.

    Called with a list of N rows {"input", "output"} it returns tensors of shape (N, T), T the
    longest row in tokens: `input_ids`, `attention_mask` (0 on padding) and `labels` (-100 on
    padding and, unless `train_on_source`, on the source). A conversation has `learn` besides.
    Padding stands on the right. With `predict_with_generate` only the source is given, without
    labels and padded on the left, because generation continues at the right edge.

    Limits in tokens, at least 1, bos and eos included. Raises ValueError on a limit below 1 or a
    tokenizer without eos.
    """

    tokenizer: Any
    source_max_len: int
    target_max_len: int
    train_on_source: bool = False
    predict_with_generate: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"--{name} is {getattr(self, name)}: at least 1 token is needed"
            for name in ("source_max_len", "target_max_len")
            if getattr(self, name) < 1
        ]
        if self.tokenizer.eos_token_id is None:
            problems.append("the tokenizer has no eos token, so a model could not learn where an answer ends: set one")
        if problems:
            raise ValueError("; ".join(problems))

    def encode(self, row: Mapping[str, str]) -> tuple[list[int], list[int]]:
        """Token ids of one row's source and target, each cut to its limit."""
        source, target = self._whole(row)
        return source[: self.source_max_len], target[: self.target_max_len]

    def _whole(self, row: Mapping[str, str]) -> tuple[list[int], list[int]]:
        target = self.tokenizer(row["output"], add_special_tokens=False, verbose=False)["input_ids"]
        return encode_source(self.tokenizer, row["input"]), target + [self.tokenizer.eos_token_id]

    def labelled(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Token ids and labels of one row after the cut, of the same length."""
        return self._measured(row)[:2]

    def _measured(self, row: Mapping[str, Any]) -> tuple[list[int], list[int], int, int]:
        """(token ids, labels, tokens of the source and of the target before the cut)."""
        if row.get(LEARN):
            ids, learnt = encode_learnt(self.tokenizer, row["input"] + row["output"], row[LEARN])
            before, kept = (len(ids), 0), self.source_max_len + self.target_max_len
            ids, learnt = ids[:kept], learnt[:kept]
        else:
            source, target = self._whole(row)
            before = (len(source), len(target))
            source, target = source[: self.source_max_len], target[: self.target_max_len]
            ids, learnt = source + target, [False] * len(source) + [True] * len(target)
        labels = [token if own or self.train_on_source else IGNORE_INDEX for token, own in zip(ids, learnt)]
        return ids, labels, *before

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if self.predict_with_generate:
            return pad_batch([self._prompt(row) for row in rows], self._pad_id, side="left")
        ids, labels = zip(*[self.labelled(row) for row in rows])
        return {**pad_batch(ids, self._pad_id), "labels": pad_batch(labels, IGNORE_INDEX)["input_ids"]}

    def _prompt(self, row: Mapping[str, Any]) -> list[int]:
        """What is given for the last answer; a chat template has written the bos itself."""
        if row.get(LEARN):
            return self.tokenizer(row["input"], add_special_tokens=False)["input_ids"][: self.source_max_len]
        return self.encode(row)[0]

    def size(self, row: Mapping[str, Any]) -> RowSize:
        """One row in tokens; nothing predicts the first of them."""
        ids, labels, source, target = self._measured(row)
        first = next((at for at, label in enumerate(labels) if at and label != IGNORE_INDEX), None)
        return RowSize(source, target, len(ids), first, bool(row.get(LEARN)))

    def sizes(self, dataset: Iterable[Mapping[str, Any]]) -> list[RowSize]:
        """Every row in tokens, in order."""
        return [self.size(row) for row in tqdm(dataset, desc="Lengths", leave=False, delay=2)]

    def lengths(self, dataset: Iterable[Mapping[str, Any]]) -> list[int]:
        """Tokens of every row (source + target, after the cut), in order: what grouping by length
        sorts by."""
        return [size.kept for size in self.sizes(dataset)]

    @property
    def _pad_id(self) -> int:
        # Padding is told by the mask, never by its id, so eos serves where a tokenizer has no pad
        # token.
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


def pad_batch(
    sequences: Sequence[Sequence[int]], pad_id: int, side: str = "right", length: int = 0
) -> dict[str, torch.Tensor]:
    """N lists of token ids as `input_ids` and `attention_mask`, both (N, the longest list or else
    `length`)."""
    longest = max(length, *map(len, sequences))
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)  # (N, T)
    attention_mask = torch.zeros_like(input_ids)  # (N, T)
    for index, sequence in enumerate(sequences):
        place = slice(len(sequence)) if side == "right" else slice(longest - len(sequence), longest)
        input_ids[index, place] = torch.tensor(sequence, dtype=torch.long)
        attention_mask[index, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
