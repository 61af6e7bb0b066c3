"""Numbers on a command line: finite, within bounds that make sense, in words where they are not."""

import argparse
import re
from typing import Any, Callable

MOST = 10**9  # of a count: more makes no sense, and what lists it would fill the memory


def whole(least: int = 0, most: int = MOST) -> Callable[[str], int]:
    """A type for argparse: a whole number from `least` to `most`, in digits."""

    def read(text: str) -> int:
        digits = re.fullmatch(r"[-+]?[0-9]{1,30}", text.strip())
        if digits is None or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text:.60} is no whole number from {least} to {most}")
        return int(text)

    return read


def number(most: float = float(MOST), zero: bool = False) -> Callable[[str], float]:
    """A type for argparse: a number above 0, or 0 itself where it is allowed; NaN is none."""
    least = "of 0 or more" if zero else "above 0"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (0 < value <= most or (zero and value == 0)):
            raise argparse.ArgumentTypeError(f"{text:.60} is no number {least}, and at most {most:g}")
        return value

    return read


def out_of_bounds(value: Any) -> bool:
    """Whether it is a number that no setting takes: not finite, or too large to count with."""
    return isinstance(value, (int, float)) and not abs(value) <= 1e18
