"""Programs of one tree, each run in a forked child of a process that has the libraries loaded.

A child is what `python PROGRAM.py FLAGS` is, without the seconds of imports. It can be killed at a
moment, bounded in memory, and watched."""

import ctypes
import importlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional, Sequence, Union

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[2]
DIES_WITH_ITS_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Ended:
    """code: the exit code, negative for a signal, "hangs" where the time was up."""

    code: Union[int, str]
    screen: str
    seconds: float
    peak_mb: float
    killed: bool

    @property
    def last_line(self) -> str:
        lines = [line for line in self.screen.replace("\r", "\n").split("\n") if line.strip()]
        return lines[-1][:300] if lines else ""

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.screen


class Forked:
    """Runs the programs of a tree, "llm" or "ldm". modules: loaded once, in this process."""

    def __init__(self, tree: str, *modules: str):
        self.tree = ROOT / f"lora-{tree}"
        sys.path[:0] = [str(self.tree), *(str(ROOT / "tests" / part) for part in ("", tree))]
        for name in ("quiet_libraries", *modules):
            importlib.import_module(name)

    def run(
        self,
        program: str,
        words: Sequence[Any],
        *,
        kill_after: Optional[float] = None,
        with_signal: int = signal.SIGKILL,
        before: Optional[Callable[[], None]] = None,
        longest_sec: float = 180,
        most_gb: Optional[float] = None,
    ) -> Ended:
        """Run `program` of the tree. kill_after: seconds until the signal. before: called in the
        child. most_gb: of address space that it may take beyond what this process has."""
        words = [str(word) for word in words]
        with tempfile.NamedTemporaryFile(suffix=".log", delete=False) as screen:
            started = time.monotonic()
            sys.stdout.flush()
            sys.stderr.flush()
            child = os.fork()
            if child == 0:
                self._become(program, words, screen.fileno(), before, most_gb)
        code, peak, killed = _watch(child, started, kill_after, with_signal, longest_sec)
        text = Path(screen.name).read_text(encoding="utf-8", errors="replace")
        os.unlink(screen.name)
        return Ended(code, text, time.monotonic() - started, peak, killed)

    def _become(self, program, words, screen, before, most_gb):
        """The child: it never returns."""
        code = 1
        try:
            ctypes.CDLL(None).prctl(DIES_WITH_ITS_PARENT, signal.SIGKILL)
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(screen, 1)
            os.dup2(screen, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            if most_gb is not None:
                taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (taken + int(most_gb * 2**30),) * 2)
            sys.argv = [str(self.tree / f"{program}.py"), *words]
            if before is not None:
                before()
            code = _exit_code(importlib.import_module(program).main, words)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _exit_code(main: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    try:
        return main(words) or 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1


def _watch(child: int, started: float, kill_after: Optional[float], with_signal: int, longest_sec: float):
    """(exit code, peak memory in MB, whether the signal was sent)."""
    killed = False
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        passed = time.monotonic() - started
        if done:
            code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            return code, usage.ru_maxrss / 1024, killed
        if kill_after is not None and not killed and passed >= kill_after:
            killed = True
            os.kill(child, with_signal)
            if with_signal == signal.SIGKILL:
                with suppress(ProcessLookupError):  # it had no group of its own yet
                    os.killpg(child, with_signal)
        if passed > longest_sec:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hangs", 0.0, killed
        time.sleep(0.005)
