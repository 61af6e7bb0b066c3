"""Tables of examples on disk: json, jsonl, csv and tsv, each row with its number for messages."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
_CSV_FIELD_LIMIT_CHARS = 10_000_000


def read_table(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """Rows of a json, jsonl, csv or tsv file with their line numbers (in a json list: the element's
    number)."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(f"{path}: unknown kind of file '{path.suffix}'. Allowed: {', '.join(TABLE_SUFFIXES)}")
    if not path.is_file():
        what = "is a folder, give the file in it" if path.is_dir() else "does not exist, check the path"
        raise FileNotFoundError(f"the data file {path} {what}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8 text: save the file as UTF-8") from None
    reader = _read_json if path.suffix.lower() in (".json", ".jsonl") else _read_csv
    rows = reader(path, text)
    if not rows:
        raise ValueError(f"{path} has no rows: give at least one")
    return rows


def _read_json(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    if text.lstrip().startswith("["):
        try:
            numbered = list(enumerate(json.loads(text), start=1))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: broken JSON at line {error.lineno}: {error.msg}") from None
    else:
        numbered = [(n, json_line(path, n, line)) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [(number, _object(path, number, row)) for number, row in numbered]


def _object(path: Path, number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f'{path}, row {number}: {row!r:.60} is no object {{"column": "text", ...}}')
    return row


def json_line(path: Path, number: int, line: str) -> dict[str, Any]:
    """The object on one line of a jsonl file. Raises ValueError that names the line."""
    try:
        return _object(path, number, json.loads(line))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: broken JSON at line {number}: {error.msg}. Give one object a line, or one list of objects"
        ) from None


def _read_csv(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    return list(csv_rows(path, io.StringIO(text, newline="")))


def csv_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a csv or tsv file, one at a time. Raises ValueError that names the
    line."""
    csv.field_size_limit(_CSV_FIELD_LIMIT_CHARS)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(lines, delimiter=delimiter)
    try:
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{path}, line {reader.line_num}: more cells than the {len(reader.fieldnames)} columns "
                    "of the first line: put cells with a separator in quotes"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
