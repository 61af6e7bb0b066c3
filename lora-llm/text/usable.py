"""Rows that can be learnt from: what no token is learnt of is left out, and what is cut is counted.

A row is cut to the limits of its collator, and in a packed sequence to the sequence's length. Where
its answer lies behind the cut, nothing of it is learnt: its loss would be that of no token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from text.collator import CausalCollator, RowSize


@dataclass(frozen=True)
class Limit:
    """How many tokens of a conversation are kept. flags: what raises it, for messages."""

    tokens: int
    flags: str


@dataclass(frozen=True)
class Cuts:
    """What cuts a row, and what the flags that raise it are called.

    sequence_tokens: of a packed sequence, which holds a row alone or cuts it; None: not packed.
    conversations: what they are cut to; None: nothing is said of those that are cut.
    """

    collator: CausalCollator
    source_flag: str = "--source_max_len"
    target_flag: str = "--target_max_len"
    sequence_tokens: int | None = None
    conversations: Limit | None = None

    @property
    def flags(self) -> str:
        packed = ["--seq_length"] if self.sequence_tokens is not None else []
        return " or ".join([*packed, self.source_flag, self.target_flag])

    def kept(self, size: RowSize) -> int:
        """Tokens of a row that are left of it."""
        return size.kept if self.sequence_tokens is None else min(size.kept, self.sequence_tokens)

    def learns(self, size: RowSize) -> bool:
        """Whether a token of what is left is learnt."""
        return size.first_learnt is not None and size.first_learnt < self.kept(size)

    def shortens(self, size: RowSize) -> bool:
        """Whether something of a row is cut off."""
        return self.kept(size) < size.source + size.target


@dataclass(frozen=True)
class StreamTally:
    """The rows of a stream, counted as they are read: empty, read, unlearnt, cut, tokens of the
    longest.

    The counts lie in memory that the processes which read the stream share. cuts: those of the
    training rows, once they are known.
    """

    cuts: Cuts | None = None
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.long).share_memory_())

    def has_answer(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has an answer to learn from."""
        empty = not row["output"].strip()
        self.counts[0] += empty
        return not empty

    def learns(self, row: Mapping[str, Any]) -> bool:
        """Whether a token of a row is learnt after the cuts."""
        assert self.cuts is not None
        size = self.cuts.collator.size(row)
        learns = self.cuts.learns(size)
        self.counts[1:4] += torch.tensor([True, not learns, self.cuts.shortens(size)])
        self.counts[4] = max(int(self.counts[4]), size.source + size.target)
        return learns

    def lines(self) -> list[str]:
        """What was left out and cut, in words; nothing where nothing was."""
        empty, read, unlearnt, cut, longest = self.counts.tolist()
        flags = self.cuts.flags if self.cuts is not None else ""
        lines = {
            f"Left out: {empty} rows of the stream, whose answer is empty.": empty,
            f"Left out: {unlearnt} of {read} examples read of the stream, whose answer lies behind the cut; "
            f"raise {flags} to learn them.": unlearnt,
            f"Cut off: {cut} of {read} examples read of the stream. The longest has {longest} tokens; "
            f"raise {flags} to keep them whole.": cut,
        }
        return [line for line, count in lines.items() if count]


def usable_rows(rows: Any, cuts: Cuts, what: str) -> tuple[Any, list[RowSize], list[str]]:
    """(the rows of which a token is learnt, their sizes, notices of what is cut and left out).

    what: `training` or `held-out`, for messages. Raises ValueError where no row is left.
    """
    sizes = cuts.collator.sizes(rows)
    useful = [index for index, size in enumerate(sizes) if cuts.learns(size)]
    if sizes and not useful:
        raise ValueError(
            f"no token of the {len(sizes)} {what} examples is learnt: every answer lies behind the cut; "
            f"raise {cuts.flags}"
        )
    notices = list(cut_notices(sizes, cuts, what))
    if len(useful) < len(sizes):
        notices.append(
            f"Left out: {len(sizes) - len(useful)} of {len(sizes)} {what} examples, whose answer lies behind the cut; "
            f"raise {cuts.flags} to learn them."
        )
        rows = rows.select(useful)
    return rows, [sizes[index] for index in useful], notices


def cut_notices(sizes: Sequence[RowSize], cuts: Cuts, what: str) -> list[str]:
    """How many prompts and answers are cut, and what keeps them; nothing where none is."""
    pairs = [size for size in sizes if not size.is_conversation]
    collator = cuts.collator
    lines = [
        _cut_line("prompts", [size.source for size in pairs], collator.source_max_len, cuts.source_flag, what),
        _cut_line("answers", [size.target for size in pairs], collator.target_max_len, cuts.target_flag, what),
    ]
    if cuts.sequence_tokens is not None:
        whole = [size.kept for size in pairs]
        lines.append(_cut_line("examples", whole, cuts.sequence_tokens, "--seq_length", what))
    if cuts.conversations is not None:
        lines.append(_cut_conversations([size.source for size in sizes if size.is_conversation], cuts.conversations))
    return [line for line in lines if line]


def _cut_conversations(tokens: Sequence[int], limit: Limit) -> str:
    cut = sum(count > limit.tokens for count in tokens)
    if not cut:
        return ""
    return (
        f"Conversations: {cut} of {len(tokens)} are longer than {limit.tokens} tokens, and the rest of them is "
        f"cut off. The longest has {max(tokens)} tokens; raise {limit.flags} to keep them whole."
    )


def _cut_line(parts: str, tokens: Sequence[int], limit: int, flag: str, what: str) -> str:
    cut = sum(count > limit for count in tokens)
    if not cut:
        return ""
    return (
        f"Cut off: {cut} of {len(tokens)} {what} {parts} after {limit} tokens. The longest has {max(tokens)}; "
        f"raise {flag} to keep them whole."
    )
