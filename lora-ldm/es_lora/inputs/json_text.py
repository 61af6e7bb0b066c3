"""JSON, and what else parsers make of a text that people bring: nested to a depth, and no deeper.

A parser ends at some depth in a RecursionError, and what reads its values at a smaller one."""

import json
from typing import Any, Callable, Dict, Tuple, Union

DEEPEST = 100  # lists and tables in one another
MOST_VALUES = 10**9  # in all lists and tables, each counted wherever it lies
TOO_DEEP = f"lists or tables lie in one another more than {DEEPEST} deep; write them flat"


def parsed_json(text: Union[str, bytes]) -> Any:
    """The value of a JSON text. Raises json.JSONDecodeError, for numbers too long and depth too."""
    try:
        return not_too_deep(json.loads, text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise json.JSONDecodeError(str(error).split(";")[0], "", 0) from None


def not_too_deep(parse: Callable[[Any], Any], text: Any) -> Any:
    """What a parser makes of a text. Raises ValueError where that is nested too deep."""
    try:
        value = parse(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    level = {id(value): (value, 1)} if isinstance(value, (list, dict)) else {}
    depth = written = 0
    while level:
        depth += 1
        inner: Dict[int, Tuple[Any, int]] = {}
        for container, times in level.values():
            children = container.values() if isinstance(container, dict) else container
            written += times * len(children)
            for child in children:
                if isinstance(child, (list, dict)):
                    # Aliases of YAML: one list may lie in many places, and in itself.
                    inner[id(child)] = (child, times + inner.get(id(child), (child, 0))[1])
        if depth > DEEPEST:
            raise ValueError(TOO_DEEP)
        if written > MOST_VALUES:
            raise ValueError(f"written out it has more than {MOST_VALUES} values; give fewer")
        level = inner
    return value
