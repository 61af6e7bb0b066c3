"""Rows of a Deep Lake data set: --dataset deeplake:PATH_OR_URL. The package is only needed for
that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PREFIX = "deeplake:"


def deeplake_rows(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, {column: value}) of every row; `name` is deeplake:PATH_OR_URL.

    Raises ValueError where the package is missing, FileNotFoundError where it cannot open the data
    set.
    """
    try:
        import deeplake
    except ImportError:
        raise ValueError(f"--dataset {name}: the package is not installed (pip install deeplake)") from None
    try:
        data = deeplake.open_read_only(name.removeprefix(PREFIX))
    except Exception as error:  # its errors have no base class of their own
        raise FileNotFoundError(f"--dataset {name}: Deep Lake cannot open it ({str(error).splitlines()[0]})") from error
    columns = [column.name for column in data.schema.columns]
    for number, row in enumerate(data, start=1):
        yield number, {column: _plain(row[column]) for column in columns}


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value  # numbers and arrays come as numpy's
