"""Numbers on a command line: finite, within bounds that make sense, in words where they are not."""

import argparse
import re
from typing import Callable, Mapping

MOST = 10**9  # of a count: more makes no sense, and what lists it would fill the memory
LARGEST_FLOAT32 = 3.4e38


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


def bound_numbers(parser: argparse.ArgumentParser, largest: Mapping[str, float]) -> None:
    """Let every flag of a parser that reads a number refuse NaN, infinity, and what is too large.

    largest: {flag: its largest value}; others: MOST of a count, LARGEST_FLOAT32 of any number."""
    for action in parser._actions:
        if action.type is int:
            action.type = _within(int, largest.get(action.dest, MOST))
        elif action.type is float:
            action.type = _within(float, largest.get(action.dest, LARGEST_FLOAT32))


def _within(kind: Callable[[str], float], most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            words = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r:.60} is no {words}") from None
        if not abs(value) <= most:
            raise argparse.ArgumentTypeError(f"{text!r:.60} is not a number of at most {most:.10g}")
        return value

    return read
