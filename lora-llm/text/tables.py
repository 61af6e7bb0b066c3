"""Tables of examples on disk: json, jsonl, csv and tsv, each row with its number for messages."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from es_lora.files import decoded, read_text, split_lines
from es_lora.inputs.json_text import parsed_json

TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
_CSV_FIELD_LIMIT_CHARS = 10_000_000
_HALF_PAIR = re.compile("[\\ud800-\\udfff]")
_NOT_ROWS = ("messages", "conversations", "tools", "history", "choices")  # lists of a single row


def read_table(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """Rows of a json, jsonl, csv or tsv file with their line numbers (in a json list: the element's
    number)."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(f"{path}: unknown kind of file '{path.suffix}'. Allowed: {', '.join(TABLE_SUFFIXES)}")
    if not path.is_file():
        what = "is a folder, give the file in it" if path.is_dir() else "does not exist, check the path"
        raise FileNotFoundError(f"the data file {path} {what}")
    text = read_text(path)
    rows = _read_json(path, text) if path.suffix.lower() in (".json", ".jsonl") else _read_csv(path, text)
    if not rows:
        raise ValueError(f"{path} has no rows: give at least one")
    return rows


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file one at a time, with their ends, cut at LF and CRLF only."""
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            yield decoded(line, path, number)


def _read_json(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    listed = _listed_rows(path, text)
    if listed is not None:
        return [(number, _object(path, number, row)) for number, row in enumerate(listed, start=1)]
    lines = enumerate(split_lines(text), start=1)
    return [(number, json_line(path, number, line)) for number, line in lines if line.strip()]


def _listed_rows(path: Path, text: str) -> list[Any] | None:
    """The rows of a JSON list, or of an object that holds one; None where every line is a row."""
    is_list = text.lstrip().startswith("[")
    if path.suffix.lower() == ".jsonl" and not is_list:
        return None
    try:
        whole = parsed_json(text)
    except json.JSONDecodeError as error:
        if is_list:
            raise ValueError(f"{path}: broken JSON at line {error.lineno}: {error.msg}") from None
        return None
    if not isinstance(whole, dict):
        return whole if isinstance(whole, list) else None
    held = [value for key, value in whole.items() if key not in _NOT_ROWS and _are_rows(value)]
    return held[0] if len(held) == 1 else [whole]


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _object(path: Path, number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f'{path}, row {number}: {row!r:.60} is no object {{"column": "text", ...}}')
    broken = half_surrogate(row)
    if broken is not None:
        raise ValueError(
            f"{path}, row {number}: column {broken!r} holds half a surrogate pair (\\ud800 to \\udfff alone), "
            "which is no character; take it out"
        )
    return row


def half_surrogate(row: dict[str, Any]) -> str | None:
    """The column whose text holds half a surrogate pair, which JSON can write and UTF-8 cannot."""
    return next((column for column, value in row.items() if _HALF_PAIR.search(_texts_of(value))), None)


def _texts_of(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else ""


def json_line(path: str | Path, number: int, line: str) -> dict[str, Any]:
    """The object on one line of a jsonl file. Raises ValueError that names the line."""
    try:
        return _object(path, number, parsed_json(line))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: broken JSON at line {number}: {error.msg}. Give one object a line, or one list of objects"
        ) from None


def _read_csv(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    return list(csv_rows(path, io.StringIO(text, newline="\n")))


def csv_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a csv or tsv file, one at a time. Raises ValueError that names the
    line. Semicolons or tabs separate the cells where they separate the first line's."""
    csv.field_size_limit(_CSV_FIELD_LIMIT_CHARS)
    lines = iter(lines)
    header = next(lines, "")
    reader = csv.DictReader(chain([header], lines), delimiter=_delimiter(path, header))
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


def _delimiter(path: Path, header: str) -> str:
    """What separates the cells of the first line; spreadsheets of many countries write ;."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max(",;\t", key=header.count)
