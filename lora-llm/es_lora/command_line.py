"""What command lines share: reading values, the nearest word, Ctrl-C, a command to go on with."""

import difflib
import os
import re
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Union

# Libraries that read what people bring: what they raise is about data, template or file.
READERS = ("jinja2", "safetensors", "safetensors_rust", "datasets", "pyarrow", "huggingface_hub", "yaml", "PIL", "gguf")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def fault_of_input(error: BaseException) -> Optional[str]:
    """What is wrong with the data, files or settings, in words; None for any other failure."""
    text = plain_text(str(error))
    if is_out_of_memory(error):
        return f"memory is used up ({text.splitlines()[0] if text else 'no more to be had'}); lower the batch size"
    if isinstance(error, (ValueError, OSError)) or (isinstance(error, ImportError) and "pip install" in text):
        return text
    library = type(error).__module__.split(".")[0]
    if library in READERS or type(error) is Exception:  # tokenizers raise Exception itself
        return f"{type(error).__name__}: {text}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is used up, of the machine or of a device (there a RuntimeError says so)."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "out of memory" in str(error).lower())


def reported(
    program: str,
    run: Callable[[], int],
    interrupted: Optional[str] = None,
    of_input: Callable[[BaseException], Optional[str]] = fault_of_input,
) -> int:
    """What `run` returns, the exit code; 2 after one message where the input cannot be used.

    A traceback is left to what is a fault of this program: it is told so, with exit code 1.
    interrupted: what is said after Ctrl-C, with exit code 130; None: Ctrl-C goes on to the caller.
    of_input: an error's fault of the input in words, None where it has none.
    """
    try:
        return run()
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        end_progress_bars()
        say(program, interrupted)
        return 130
    except Exception as error:
        end_progress_bars()
        say(program, told(error, of_input))
        return 1 if of_input(error) is None else 2


def end_progress_bars() -> None:
    """Let what is said next begin a line of its own: bars of tqdm that are open are closed."""
    kinds = [getattr(sys.modules.get(name), "tqdm", None) for name in ("tqdm.std", "tqdm.auto")]
    for bar in [bar for kind in kinds for bar in getattr(kind, "_instances", ())]:
        bar.close()


def say(program: str, message: str) -> None:
    """A message on stderr, the program before each line."""
    for line in message.splitlines() or [""]:
        print(f"{program}: {line}", file=sys.stderr)


def told(error: BaseException, of_input: Callable[[BaseException], Optional[str]] = fault_of_input) -> str:
    """An error in words; the traceback of a fault of this program goes to the screen before it."""
    message = of_input(error)
    if message is not None:
        return message
    traceback.print_exception(type(error), error, error.__traceback__)
    return "this is a fault of ES-LoRA, not of what you gave it; please report the lines above"


def plain_text(text: str) -> str:
    """A text without the colour codes of a terminal."""
    return re.sub("\x1b\\[[0-9;]*m", "", text)


def truth(value: Any) -> bool:
    """True or False from a value or its text. Raises ValueError for anything else."""
    text = str(value).lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError("give True or False")
    return text in ("true", "1", "yes")


def number_or_auto(value: Any) -> Optional[int]:
    """A whole number of 1 or more, or None for `auto`. Raises ValueError for anything else."""
    if value == "auto":
        return None
    if isinstance(value, bool) or not str(value).isdigit() or int(value) < 1:
        raise ValueError("give a number of 1 or more, or auto")
    return int(value)


def auto_word(value: Optional[float]) -> Union[float, str]:
    """What a reader that knows `auto` has read, written down again."""
    return "auto" if value is None else value


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the known word that is nearest; empty where none is near."""
    found = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def shown_path(path: Union[str, Path]) -> str:
    """A path as a person at this place would type it."""
    relative = os.path.relpath(str(path))
    return str(path) if relative.startswith(os.path.join("..", "..")) else relative


def command_line(python: str, script: Union[str, Path], words: Sequence[Any]) -> str:
    """A command as it is typed."""
    return shlex.join([shown_path(python), shown_path(script), *map(str, words)])


def without_flag(words: Sequence[str], flag: str) -> List[str]:
    """The words of a command without a flag and its value."""
    kept, skip = [], False
    for word in words:
        if skip and not word.startswith("--"):
            skip = False
            continue
        skip = word == flag
        if not skip and not word.startswith(f"{flag}="):
            kept.append(word)
    return kept


class NotedSignals:
    """Ctrl-C and SIGTERM set `interrupted`, which ends a run after the present step; a second one
    ends it at once. A context manager: the handlers of before are back after it."""

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
