"""TOML files as people write them: a byte order mark, Windows paths, JSON under another name."""

from pathlib import Path
from typing import Any

import toml

from es_lora.files import read_text
from es_lora.inputs.toml_text import parsed_toml


def read_toml(path: str | Path, flag: str) -> dict[str, Any]:
    """The content of a TOML file. flag: the one that named it.

    Raises FileNotFoundError, or ValueError that says line and fix: not UTF-8, JSON, quotes."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{flag} {path} does not exist: there is no such file")
    convert = f"import json, toml; print(toml.dumps(json.load(open('{path.as_posix()}'))))"
    fix = f'convert it with python -c "{convert}" > {path.stem}-converted.toml'
    return parsed_toml(read_text(path), f"{flag} {path}", toml.loads, fix)
