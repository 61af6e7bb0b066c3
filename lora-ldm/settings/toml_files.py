"""TOML files as people write them: a byte order mark, Windows paths, JSON under another name."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import toml

from es_lora.files import read_text

PATH_KEY = re.compile(r"(dir|path|file|config|weights|vae|resume|prompts|json)$")
DRIVE_IN_DOUBLE_QUOTES = re.compile(r'"[A-Za-z]:\\(?!\\)')
CONTROL = re.compile(r"[\x00-\x1f]")  # what a backslash and a letter became
SINGLE_QUOTES = r"Put Windows paths between single quotes, such as 'C:\data\cats', or write / for each backslash"


def read_toml(path: str | Path, flag: str) -> dict[str, Any]:
    """The content of a TOML file. flag: the one that named it.

    Raises FileNotFoundError, or ValueError that says line and fix: not UTF-8, JSON, quotes."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{flag} {path} does not exist: there is no such file")
    text = read_text(path)
    if DRIVE_IN_DOUBLE_QUOTES.search(text):
        raise ValueError(f"{flag} {path}: a backslash between double quotes begins a sign. {SINGLE_QUOTES}")
    try:
        content = toml.loads(text)
    except (ValueError, IndexError, TypeError) as error:  # the parser raises the last two on some torn lines
        raise ValueError(f"{flag} {path} is not valid TOML: {error}{_advice(text, path)}") from error
    for key, value in _texts(content):
        if PATH_KEY.search(key) and CONTROL.search(value):
            raise ValueError(f"{flag} {path}: {key} = {value!r} was read with control characters. {SINGLE_QUOTES}")
    return content


def _advice(text: str, path: Path) -> str:
    """What to do about a file that is no TOML, where that can be seen."""
    if is_json(text):
        convert = f"import json, toml; print(toml.dumps(json.load(open('{path.as_posix()}'))))"
        return f'. It is JSON: convert it with python -c "{convert}" > {path.stem}-converted.toml'
    return f". {SINGLE_QUOTES}" if "\\" in text else ""


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or list."""
    try:
        return isinstance(json.loads(text), (dict, list))
    except ValueError:
        return False


def _texts(table: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of every text in a table and the tables in it."""
    if isinstance(table, str):
        yield key, table
    elif isinstance(table, dict):
        for name, value in table.items():
            yield from _texts(value, name)
    elif isinstance(table, list):
        for value in table:
            yield from _texts(value, key)
