"""Build the two image sets beside this file in the manner of the bundled ones:  python
build_image_sets.py

vehicles: 24 training pictures, Fluent 3D. food: 12 training pictures, Twemoji. 10 held-out pictures
each; 64 px. Run it in the diffusion environment with `resvg_py` added and npm installed; sources
and licences are in README.md.
"""

import argparse
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
sys.path.insert(0, str(ROOT / "lora-ldm" / "tiny_base"))
from emoji_pictures import emoji_key, read_catalogue  # noqa: E402
from make_image_sets import HELDOUT_COUNT, REPEATS, caption_of, pictures_of, write_picture  # noqa: E402

# Set -> (artwork, first word of the captions, the emoji). Chosen by name before any picture was
# trained on.
SETS = {
    "vehicles": ("fluent 3d", "vehicle",
        "🚗 🚕 🚙 🚌 🚎 🏎 🚓 🚑 🚒 🚐 🛻 🚚 🚛 🚜 🛵 🏍 🚲 🛴 🚂 🚆 🚇 🚊 🚝 🚀 🛸 🚁 ✈ 🛩 ⛵ 🚤 🛥 🚢 ⛴ 🚡"),
    "food": ("twemoji", "food",
        "🍏 🍐 🍊 🍋 🍌 🍉 🍇 🍓 🍒 🍑 🥭 🍍 🥥 🥝 🍅 🍆 🥑 🥦 🥕 🌽 🍞 🧀"),
}  # fmt: skip


def build_set(name, target, packages, catalogue, seed=0):
    """Write one set; returns (training pictures, held-out pictures)."""
    artwork, kind, symbols = SETS[name]
    keys = [emoji_key("-".join(f"{ord(letter):X}" for letter in symbol)) for symbol in symbols.split()]
    pictures = pictures_of(artwork, keys, packages, 64)
    missing = [key for key in keys if key not in pictures or key not in catalogue]
    if missing:
        raise ValueError(f"{name}: no {artwork} picture or no name for {', '.join(missing)}; take another emoji")
    random.Random(seed).shuffle(keys)
    for position, key in enumerate(keys):
        part = "heldout" if position < HELDOUT_COUNT else f"train/{REPEATS}_{name}"
        write_picture(target / name / part, catalogue[key], pictures[key], caption_of(catalogue[key], kind, artwork))
    return len(keys) - HELDOUT_COUNT, HELDOUT_COUNT


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--packages", type=Path, default=ROOT / "output" / "tiny_base" / "packages", help="npm packages go here"
    )
    arguments = parser.parse_args()
    catalogue = {entry.key: entry for entry in read_catalogue(arguments.packages)}
    for name in SETS:
        print(name, *build_set(name, HERE, arguments.packages, catalogue))


if __name__ == "__main__":
    main()
