"""Puts the lora-ldm tree on sys.path, as running one of its entry points would, and this folder's helper modules."""

import sys
from pathlib import Path

TREE = Path(__file__).resolve().parents[2] / "lora-ldm"
sys.path[:0] = [str(TREE), str(Path(__file__).parent), str(Path(__file__).parents[1])]
