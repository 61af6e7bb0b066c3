"""How much of a text was copied: runs of 8 words that stand in the training data as they are."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Optional

from es_lora.files import read_text
from text.tables import TABLE_SUFFIXES, read_table

RUN_WORDS = 8
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
Runs = list[tuple[str, ...]]


def runs_of(text: str) -> Runs:
    """Every run of RUN_WORDS words, in small letters, without what stands between them."""
    words = [word.lower() for word in _WORD.findall(text)]
    return [tuple(words[at : at + RUN_WORDS]) for at in range(len(words) - RUN_WORDS + 1)]


def _texts(value: Any) -> Iterator[str]:
    """All texts in a row, of conversations too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


class TrainingText:
    """The runs of a data file: a table of rows, or a text with blank lines between its parts.
    Raises FileNotFoundError, or ValueError where it cannot be read."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"--training_data {path}: there is no such file; give the file trained on")
        if path.suffix.lower() in TABLE_SUFFIXES:
            rows = [list(_texts(row)) for _, row in read_table(path)]
        else:
            rows = [[part] for part in re.split(r"\n\s*\n", read_text(path))]
        self.rows_with = Counter(run for texts in rows for run in {run for text in texts for run in runs_of(text)})

    def shares(self, texts: Iterable[str]) -> Optional[float]:
        """The share of the runs of all texts that are copied; None where no text has a run."""
        runs = [run for text in texts for run in runs_of(text)]
        return sum(run in self.rows_with for run in runs) / len(runs) if runs else None

    def among_itself(self) -> Optional[float]:
        """The share of the runs of its rows that another row has as well."""
        every = sum(self.rows_with.values())
        return sum(count for count in self.rows_with.values() if count > 1) / every if every else None

    def marked(self, text: str) -> list[tuple[str, bool]]:
        """The text in pieces, and whether each is part of a copied run."""
        places = [match.span() for match in _WORD.finditer(text)]
        copied = [False] * len(text)
        for at, run in enumerate(runs_of(text)):
            if run in self.rows_with:
                start, end = places[at][0], places[at + RUN_WORDS - 1][1]
                copied[start:end] = [True] * (end - start)
        pieces: list[tuple[str, bool]] = []
        for letter, is_copied in zip(text, copied):
            if pieces and pieces[-1][1] == is_copied:
                pieces[-1] = (pieces[-1][0] + letter, is_copied)
            else:
                pieces.append((letter, is_copied))
        return pieces
