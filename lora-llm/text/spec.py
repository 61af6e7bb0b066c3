"""What text is read by: everything that `load_splits` asks of a command line, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from text.formats import CONVERSATION_FORMATS, FORMATS, Format, Row, detect_format, format_named


@dataclass(frozen=True)
class DataSpec:
    """The rows of a run: which ones, in what format, how many are held out.

    dataset: a name in HUB_DATASETS, "mmlu" (with train_subject, mmlu_dir), a json, jsonl, csv or
    tsv file, deeplake:PATH_OR_URL or any other hub name; or several of them, which are mixed.
    dataset_format: a format's name or a Format; None is told by the columns.
    eval_dataset: a held-out file. Sizes are rows, or a fraction of the training rows where below 1.
    train, evaluate: whether those rows are asked for; they do not change which rows the others get.
    conversations: what reads the formats of conversations; None: their last answer alone is learnt.
    """

    dataset: str | Sequence[str]
    dataset_format: str | Format | None = None
    eval_dataset: str | None = None
    eval_dataset_size: float = 0
    test_dataset_size: float = 0
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    train_subject: str | None = None
    mmlu_dir: str = "data/mmlu"
    cache_dir: str | None = None
    seed: int = 42
    train: bool = True
    evaluate: bool = False
    conversations: Format | None = None

    def format_of(self, columns: Iterable[str], first_row: Row | None = None, name: str = "") -> str | Format:
        """What the rows of one source are read by: what was asked for, else told by their columns.

        Raises ValueError where no format has such columns.
        """
        found: Any = self.dataset_format or detect_format(columns, first_row, name)
        if self.conversations is None or found not in CONVERSATION_FORMATS:
            return found
        return replace(self.conversations, columns=FORMATS[found].columns)

    def check(self) -> None:
        """Raises ValueError with every problem that can be seen before anything is read."""
        problems = []
        if self.dataset_format is not None:
            try:
                format_named(self.dataset_format)
            except ValueError as error:
                problems.append(str(error))
        for name in ("eval_dataset_size", "test_dataset_size"):
            size = getattr(self, name) or 0
            if size < 0 or (size > 1 and size != int(size)):
                problems.append(f"--{name} {size} is neither a number of rows (0, 1, 2, ...) nor a fraction below 1")
        for name in ("max_train_samples", "max_eval_samples"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                problems.append(f"--{name} {limit}: at least 1 row is needed; leave the flag out for all rows")
        if self.train_subject and self.dataset != "mmlu":
            problems.append(f"--train_subject {self.train_subject} needs --dataset mmlu, not '{self.dataset}'")
        if problems:
            raise ValueError("; ".join(problems))
