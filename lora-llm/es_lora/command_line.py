"""What the command lines share."""

import signal
from typing import Any, Dict

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class NotedSignals:
    """Ctrl-C and SIGTERM set `interrupted`, which ends a run after the present step; a second one ends it at once.

    A context manager: the handlers of before are back after it.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._before: Dict[int, Any] = {}

    def __enter__(self) -> "NotedSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: Any) -> None:
        self.interrupted = True
        for number in STOP_SIGNALS:
            signal.signal(number, signal.default_int_handler)
