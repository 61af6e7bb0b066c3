"""Words of the form name=value, as --network_args and --optimizer_args take them."""

import ast
from collections.abc import Sequence
from typing import Any


def key_values(words: Sequence[str] | None) -> dict[str, Any]:
    """{"key": value} of words: `weight_decay=0.01`, `betas=0.9,0.999`, `decay_type=linear`."""
    result = {}
    for word in words or []:
        key, equals, text = word.partition("=")
        if not (key and equals):
            raise ValueError(f"'{word}' is not of the form key=value")
        try:
            result[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            result[key] = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return result
