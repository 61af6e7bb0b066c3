"""Words of the form name=value, as --network_args and --optimizer_args take them."""

import ast
from collections.abc import Sequence
from typing import Any

from settings.bounds import problem_of

NUMBERS = {word: float(word) for word in ("nan", "inf", "-inf", "infinity", "-infinity")}  # no literals of Python


def key_values(words: Sequence[str] | None) -> dict[str, Any]:
    """{"key": value} of words: `weight_decay=0.01`, `betas=0.9,0.999`, `decay_type=linear`.
    Raises ValueError for another form, and for numbers that are out of all bounds."""
    result = {}
    for word in words or []:
        key, equals, text = word.partition("=")
        if not (key and equals):
            raise ValueError(f"'{word:.80}' is not of the form key=value")
        try:
            result[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            result[key] = {"true": True, "false": False, "none": None, **NUMBERS}.get(text.lower(), text)
        for value in result[key] if isinstance(result[key], (list, tuple)) else [result[key]]:
            if problem := problem_of(value):
                raise ValueError(f"{word:.80} is not allowed: {problem}")
    return result
