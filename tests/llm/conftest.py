"""Puts the lora-llm tree on sys.path, as running one of its entry points would."""

import sys
from pathlib import Path

TREE = Path(__file__).resolve().parents[2] / "lora-llm"
sys.path.insert(0, str(TREE))
