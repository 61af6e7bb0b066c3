"""The four image sets that come with the project: layout, captions, separation of training and
held-out pictures, licence."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATASET = Path(__file__).resolve().parents[3] / "dataset"
LICENCES = {"portraits": "MIT", "stills": "MIT", "landscape": "CC-BY 4.0", "architecture": "CC-BY 4.0"}


def thumbnail(path):
    """A 16x16 grey thumbnail as float64 (16, 16), to find near-copies."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=np.float64)


@pytest.mark.parametrize("name", LICENCES)
def test_layout_sizes_and_captions(name):
    training = sorted((DATASET / name / "train" / f"10_{name}").glob("*.png"))
    heldout = sorted((DATASET / name / "heldout").glob("*.png"))
    large = sorted((DATASET / name / "512px" / f"10_{name}").glob("*.png"))
    assert len(training) >= 12 and len(heldout) >= 8
    assert [path.name for path in large] == [path.name for path in training]
    for paths, side in ((training, 64), (heldout, 64), (large, 512)):
        for path in paths:
            with Image.open(path) as image:
                assert (image.size, image.mode) == ((side, side), "RGB"), path
            assert len(path.with_suffix(".txt").read_text("utf8").strip()) > 10, path
        assert len(list(paths[0].parent.glob("*.txt"))) == len(paths)


@pytest.mark.parametrize("name", LICENCES)
def test_no_heldout_picture_is_trained_on(name):
    training = sorted((DATASET / name / "train").glob("*/*.png"))
    heldout = sorted((DATASET / name / "heldout").glob("*.png"))
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in training + heldout]
    assert len(set(hashes)) == len(hashes)
    known = np.stack([thumbnail(path) for path in training])
    for path in heldout:
        nearest = np.abs(known - thumbnail(path)).mean((1, 2)).min()
        assert nearest > 1.0, f"{path} is nearly the same picture as one of the training set"


@pytest.mark.parametrize(("name", "licence"), LICENCES.items())
def test_readme_names_source_and_licence(name, licence):
    text = (DATASET / name / "README.md").read_text("utf8")
    assert licence in text
    assert "npm" in text and any(version in text for version in ("1.1.0", "16.0.1"))


def test_all_pictures_together_stay_small():
    total = sum(path.stat().st_size for name in LICENCES for path in (DATASET / name).rglob("*.png"))
    assert total < 12_000_000
