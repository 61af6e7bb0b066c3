"""The vendored files are tested as they stand in lora-llm/; test_vendored.py holds the copies
equal."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "lora-llm"), str(ROOT / "tests" / "cs"), str(ROOT / "tests")]


@pytest.fixture(scope="session")
def golden() -> Path:
    return ROOT / "tests" / "golden"
