"""TOML as people write it: Windows paths between double quotes, JSON under another name."""

import re
from typing import Any, Callable, Dict, Iterator, Tuple

from es_lora.inputs.json_text import not_too_deep, parsed_json

PATH_KEY = re.compile(r"(dataset|dir|path|file|config|weights|vae|resume|prompts|json)$")
DRIVE_IN_DOUBLE_QUOTES = re.compile(r'"[A-Za-z]:\\(?!\\)')
CONTROL = re.compile(r"[\x00-\x1f]")  # what a backslash and a letter became
SINGLE_QUOTES = r"Put Windows paths between single quotes, such as 'C:\data\cats', or write / for each backslash"


def parsed_toml(text: str, where: str, parse: Callable[[str], Dict[str, Any]], if_json: str) -> Dict[str, Any]:
    """The content of a TOML text.

    where: the flag and the file, for messages. parse: the parser. if_json: the fix for JSON. Raises
    ValueError that says line and fix.
    """
    if DRIVE_IN_DOUBLE_QUOTES.search(text):
        raise ValueError(f"{where}: a backslash between double quotes begins a sign. {SINGLE_QUOTES}")
    try:
        content = not_too_deep(parse, text)
    except (ValueError, IndexError, TypeError) as error:  # a parser raises the last two on some torn lines
        if is_json(text):
            raise ValueError(f"{where} is not valid TOML. It is JSON: {if_json}") from error
        advice = f". {SINGLE_QUOTES}" if "\\" in text else ""
        raise ValueError(f"{where} is not valid TOML: {' '.join(str(error).split())}{advice}") from error
    for key, value in _texts(content):
        if PATH_KEY.search(key) and CONTROL.search(value):
            raise ValueError(f"{where}: {key} = {value!r} was read with control characters. {SINGLE_QUOTES}")
    return content


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or list."""
    try:
        return isinstance(parsed_json(text), (dict, list))
    except ValueError:
        return False


def _texts(value: Any, key: str = "") -> Iterator[Tuple[str, str]]:
    """(key, text) of every text in a table and in the tables and lists in it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
