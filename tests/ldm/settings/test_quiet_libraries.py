"""quiet_libraries.py keeps warnings of libraries off the screen, and lets their errors through."""

import subprocess
import sys
from pathlib import Path

TREE = Path(__file__).resolve().parents[3] / "lora-ldm"
LOGGERS = ["xformers", "bitsandbytes.backends.cpu.ops"]


def test_warnings_of_these_libraries_do_not_reach_the_screen_and_errors_do():
    lines = [
        f"logging.getLogger({name!r}).{level}('{level} of {name}')"
        for name in LOGGERS
        for level in ("warning", "error")
    ]
    code = "\n".join(["import logging, quiet_libraries", *lines])
    done = subprocess.run([sys.executable, "-c", code], cwd=TREE, capture_output=True, text=True)
    assert done.returncode == 0
    assert (done.stdout + done.stderr).splitlines() == [f"error of {name}" for name in LOGGERS]
