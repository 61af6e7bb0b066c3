"""Puts the patch tool, the hook and the vendored files on sys.path, as in a patched checkout."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "patches"), str(ROOT / "lora-llm"), str(ROOT / "tests" / "patches"), str(ROOT / "tests")]


@pytest.fixture(autouse=True)
def no_git_of_ours(monkeypatch, tmp_path):
    """A checkout made in a test is not part of a repository that happens to lie around it."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
