"""A part of tests/faults/ for every test run: random kills, kills at writes, wrong inputs."""

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).resolve().parents[2] / "faults"


@pytest.mark.parametrize(
    "words",
    [
        ["kills.py", "image", "--rounds", "2", "--seed", "1"],
        ["write_boundaries.py", "image", "--every", "110"],
        ["fuzz.py", "image", "--cases", "13", "--seed", "1"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_runs_end_as_undisturbed_ones_and_wrong_inputs_in_one_message(words):
    done = subprocess.run([sys.executable, *words], cwd=FAULTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-500:]
