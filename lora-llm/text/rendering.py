"""A chat template is a program that came with a base: it runs within bounds of time and memory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from jinja2 import Environment, TemplateError

try:
    import resource
except ImportError:  # Windows, which has no such bounds
    resource = None  # type: ignore[assignment]

RENDER_SEC = 2.0  # of computing, whatever else the machine does
RENDER_BYTES = 1_000_000_000  # beside what the process holds already
MOST_CHARACTERS = 10_000_000
Result = TypeVar("Result")


class TemplateBoundsError(ValueError):
    """A template took more time or memory than any conversation needs."""


def within_bounds(render: Callable[[], Result]) -> Result:
    """What a template renders. Raises TemplateBoundsError where it does not end or fills memory.

    The clock runs in the main thread only: others hear no signals.
    """
    try:
        with _deadline(), _memory():
            return render()
    except MemoryError:
        raise TemplateBoundsError(f"it asks for more than {RENDER_BYTES // 10**6} MB of memory") from None


@lru_cache(maxsize=64)
def check_operators(template: str) -> None:
    """Raises TemplateBoundsError for a power: one of them can take hours, which nothing interrupts.
    A template that cannot be read passes, for its rendering says more."""
    try:
        tokens = list(Environment().lex(template))
    except TemplateError:
        return
    if any(kind == "operator" and text == "**" for _, kind, text in tokens):
        raise TemplateBoundsError("it raises numbers to a power (**)")


def check_length(text: str) -> None:
    """Raises TemplateBoundsError for a text that no base can read."""
    if len(text) > MOST_CHARACTERS:
        raise TemplateBoundsError(f"it writes {len(text)} characters, and {MOST_CHARACTERS} are allowed")


@contextmanager
def _deadline() -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def out_of_time(number: int, frame: FrameType | None) -> Any:
        raise TemplateBoundsError(f"it has not ended after {RENDER_SEC:g} seconds")

    before = signal.signal(signal.SIGPROF, out_of_time)
    remaining = signal.setitimer(signal.ITIMER_PROF, RENDER_SEC)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, *remaining)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _memory() -> Iterator[None]:
    sizes = Path("/proc/self/statm")
    if resource is None or not sizes.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = int(sizes.read_text(encoding="ascii").split()[0]) * resource.getpagesize() + RENDER_BYTES
    others = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([allowed, *others]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
