"""Puts the lora-ldm tree on sys.path, as running one of its entry points would, and this folder's
helper modules.

Here are the base and the pictures that most runs of the tests are made of.
"""

import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2] / "lora-ldm"
sys.path[:0] = [str(TREE), str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random Stable Diffusion of about 0.1M parameters, as a diffusers folder. Not to be written
    to."""
    from ldm_runs import make_base

    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six pictures with captions in a folder as the trainer reads it."""
    from ldm_runs import make_pictures

    return make_pictures(tmp_path_factory.mktemp("images"))
