"""What command lines share: reading values, the nearest word, Ctrl-C, a command to go on with."""

import difflib
import errno
import os
import re
import shlex
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

# Libraries that read what people bring: what they raise is about data, template or file.
READERS = ("jinja2", "safetensors", "safetensors_rust", "datasets", "pyarrow", "huggingface_hub", "yaml", "PIL", "gguf")
# Ctrl-C, what another program sends to end this one, and Ctrl-Break, which it sends on Windows.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))
# Flags whose values are nobody else's business, and what is shown in their place.
SECRET_FLAGS = ("hub_token", "use_auth_token", "huggingface_token", "wandb_api_key", "api_key", "token")
HIDDEN = "(hidden)"
# What the disk answers: to Python, and in the words of libraries that write by themselves.
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
NO_SPACE = ("No space left on device", "Disk quota exceeded", "os error 28")
SAYS_FULL = (*NO_SPACE, "PytorchStreamWriter failed writing", "inline_container.cc")  # torch.save knows no better
SAYS_CLOSED = ("Read-only file system", "os error 30", "Permission denied (os error 13)")
# What collectives say where another process has gone.
SAYS_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Socket Timeout")


class MachineFault(RuntimeError):
    """The machine, not the input, has failed; its message is for the person."""


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


def fault_of_machine(error: BaseException) -> Optional[str]:
    """What the machine refused while the program ran, in words: a full disk, a place that cannot
    be written to, another process that is gone. None for any other failure."""
    if isinstance(error, MachineFault):
        return str(error)
    text, number = plain_text(str(error)), getattr(error, "errno", None)
    if number in DISK_FULL or any(words in text for words in SAYS_FULL):
        return f"the disk is full ({text.splitlines()[0]}): free some space."
    if number == errno.EROFS or any(words in text for words in SAYS_CLOSED) or _not_writable(error):
        return f"nothing can be written there ({text.splitlines()[0]}): allow it, or choose another folder."
    if isinstance(error, RuntimeError) and any(words in text for words in SAYS_GONE):
        return f"another process of this run has ended; its own message says why ({text.splitlines()[0][:150]})."
    return None


def _not_writable(error: BaseException) -> bool:
    """Whether permission is missing for a file that was to be written, not for one to be read."""
    if not isinstance(error, PermissionError) or error.filename is None:
        return False
    return not os.path.exists(error.filename) or os.access(error.filename, os.R_OK)


@contextmanager
def last_state_named(last_state: Callable[[], str]) -> Iterator[None]:
    """Let a fault of the machine end with what `last_state` says of the run's newest whole state.
    Raises MachineFault."""
    try:
        yield
    except Exception as error:
        fault = fault_of_machine(error)
        if fault is None:
            raise
        raise MachineFault(f"{fault} {last_state()}".rstrip()) from error


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

    A fault of the machine is one message and exit code 1. A traceback is left to what is a fault of
    this program: it is told so, with exit code 1.
    interrupted: what is said after Ctrl-C, with exit code 130; None: Ctrl-C goes on to the caller.
    of_input: an error's fault of the input in words, None where it has none.
    """
    try:
        _refuse_bare_dashes(sys.argv[1:])
        return run()
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        end_progress_bars()
        say(program, interrupted)
        return 130
    except Exception as error:
        end_progress_bars()
        machine = fault_of_machine(error)
        say(program, machine or told(error, of_input))
        return 1 if machine or of_input(error) is None else 2


def _refuse_bare_dashes(words: Sequence[str]) -> None:
    """Raises ValueError for `--flag=--`, which argparse takes for a flag with an empty list."""
    for word in words:
        if re.fullmatch(r"--[\w-]+=--", word):
            raise ValueError(f"{word[:-3]} has no value: give it one, or leave it out")


def end_progress_bars() -> None:
    """Let what is said next begin a line of its own: bars of tqdm that are open are closed."""
    kinds = [getattr(sys.modules.get(name), "tqdm", None) for name in ("tqdm.std", "tqdm.auto")]
    for bar in [bar for kind in kinds for bar in getattr(kind, "_instances", ())]:
        bar.close()


def say(program: str, message: str) -> None:
    """A message on stderr, the program before each line; secrets of its command line are hidden."""
    for line in without_secrets(message, sys.argv).splitlines() or [""]:
        print(f"{program}: {line}", file=sys.stderr)


def told(error: BaseException, of_input: Callable[[BaseException], Optional[str]] = fault_of_input) -> str:
    """An error in words; the traceback of a fault of this program goes to the screen before it."""
    message = of_input(error)
    if message is not None:
        return message
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    print(without_secrets("".join(lines), sys.argv), end="", file=sys.stderr)
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
    """A command as it is typed, its secrets left to the person."""
    words = [str(word) for word in words]
    for place, word in secret_words(words):
        flag, equals, _ = words[place].partition("=")
        words[place] = f"{flag}={HIDDEN}" if equals and words[place] != word else HIDDEN
    return shlex.join([shown_path(python), shown_path(script), *words])


def secret_words(words: Sequence[str]) -> List[Tuple[int, str]]:
    """(place, secret) of the words of a command that hold the value of a secret flag."""
    found = []
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag[2:].replace("-", "_") not in SECRET_FLAGS:
            continue
        if not equals:
            place, value = place + 1, words[place + 1] if place + 1 < len(words) else ""
        if value and not value.startswith("--") and value.lower() not in ("true", "false"):
            found.append((place, value))
    return found


def without_secrets(text: str, words: Sequence[str]) -> str:
    """A text without the secrets that stand in the words of a command."""
    for _, secret in secret_words(words):
        text = text.replace(secret, HIDDEN)
    return text


def without_secret_flags(settings: Dict[str, Any]) -> Dict[str, Any]:
    """{flag: value} without those that hold a secret."""
    return {name: value for name, value in settings.items() if name not in SECRET_FLAGS or isinstance(value, bool)}


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
