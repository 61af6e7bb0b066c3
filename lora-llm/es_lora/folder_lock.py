"""One run at a time in an output folder: a lock that names its owner, and survives a kill.

The lock is a file that says who made it: process, host, start. A run that has died leaves it; the
next one on the same host sees that and takes it over. On another host nobody can tell: the message
says which file to delete."""

import json
import os
import socket
import sys
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Union

from es_lora.files import sweep

LOCK_NAME = ".es-lora.lock"


@contextmanager
def locked(folder: Union[str, Path], program: str, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the output folder, which is made where it is missing, for one run of `program`.

    say: is told of a lock that a dead run left. What a killed run left half written is cleared
    away. Raises ValueError where another run holds the folder."""
    folder = Path(folder)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    _take(path, program, say)
    sweep(folder)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        for parent in made:  # a run that was refused leaves nothing
            try:
                parent.rmdir()
            except OSError:
                break


def _take(path: Path, program: str, say: Callable[[str], None]) -> None:
    owner = {
        "program": program,
        "pid": os.getpid(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "born": _born(os.getpid()),
    }
    for _ in range(2):
        try:
            handle = os.open(str(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            _clear_dead(path, say)
            continue
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(owner, file)
        except OSError:
            path.unlink()
            raise
        return
    raise ValueError(f"{path.parent} was taken by another run this moment: choose another output folder")


def _clear_dead(path: Path, say: Callable[[str], None]) -> None:
    """Remove the lock of a run that has died. Raises ValueError where its run may be alive."""
    owner = _read(path)
    if owner is None:  # torn: its run was killed while it wrote it
        path.unlink(missing_ok=True)
        return
    who = f"{owner['program']} (process {owner['pid']} on {owner['host']}, started {owner['started']})"
    if owner["host"] != socket.gethostname():
        raise ValueError(
            f"{path.parent} is held by {who}: choose another output folder; if that run is over, delete {path}"
        )
    if _alive(owner["pid"], owner["born"]):
        raise ValueError(f"{path.parent} is held by {who}, which is at work: choose another output folder, or wait")
    say(f"The lock of {who} is taken over: that run has died.")
    path.unlink(missing_ok=True)


def _read(path: Path) -> Optional[Dict[str, Any]]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(owner, dict) and {"program", "pid", "started", "host", "born"} <= set(owner)
    return owner if known and isinstance(owner["pid"], int) else None


def _alive(pid: int, born: Optional[str]) -> bool:
    """Whether the process that was born then is still at work; a number may be given again."""
    if sys.platform == "win32":
        return _alive_on_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    now = _born(pid)
    return born is None or now is None or now == born


def _alive_on_windows(pid: int) -> bool:
    """os.kill would end it there."""
    import ctypes

    query, still_active, code = 0x1000, 259, ctypes.c_ulong()
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
    handle = kernel.OpenProcess(query, False, pid)
    known = bool(handle) and bool(kernel.GetExitCodeProcess(handle, ctypes.byref(code)))
    if handle:
        kernel.CloseHandle(handle)
    return known and code.value == still_active


def _born(pid: int) -> Optional[str]:
    """What tells this process from a later one of the same number; None where that is unknown.
    A process that has ended and waits for its parent is no one's."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return "ended" if state == "Z" else rest[18]  # clock ticks from the machine's start
