"""Rows that can be learnt from: what no token is learnt of is left out, and what is cut is counted.

A row is cut to the limits of its collator, and in a packed sequence to the sequence's length. Where
its answer lies behind the cut, nothing of it is learnt: its loss would be that of no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from text.collator import CausalCollator, RowSize
from text.conversations import Limit


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
