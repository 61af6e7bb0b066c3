"""Build the four image sets under dataset/: portraits, stills, landscape, architecture.

    python make_image_sets.py

Two artwork styles that the embedded base never sees: Fluent 3D for portraits and stills, Twemoji
for landscape and architecture. Every set gets `train/10_<set>/`, `heldout/` at 64 px and the same
training pictures at 512 px under `512px/10_<set>/`, a .txt caption beside each picture.
"""

import argparse
import random
from collections.abc import Iterable
from pathlib import Path

from emoji_pictures import EmojiEntry, emoji_key, on_white, read_catalogue, read_fluent_3d, read_twemoji
from PIL import Image

HERE = Path(__file__).resolve().parent
REPEATS = 10
HELDOUT_COUNT = 10
LARGE_PX = 512

# Set -> (artwork, first word of captions, the emoji). Chosen by name before any training.
SETS = {
    "portraits": (
        "fluent 3d",
        "portrait",
        "👩 👨 🧑 👧 👦 👵 👴 🧔 👱 👩‍🦰 👨‍🦱 👩‍🦳 👨‍🦲 🧕 👳 👲 👸 🤴 👮 👷 💂 🕵 🧙 🧝 🧛 🎅 🤶 👩‍🍳 👨‍🚀 👩‍🎤",
    ),
    "stills": (
        "fluent 3d",
        "character",
        "🐶 🐱 🐭 🐹 🐰 🦊 🐻 🐼 🐨 🐯 🦁 🐮 🐷 🐸 🐵 🐔 🐧 🐤 🦉 🐺 🐴 🦄 🐲 🤖 👽 👻 🎃 ⛄ 🧸 🦝",
    ),
    "landscape": (
        "twemoji",
        "landscape",
        "🌅 🌄 🌇 🌆 🌃 🌉 🌁 🌌 🌋 🗻 ⛰ 🏔 🏕 🏖 🏜 🏝 🏞 🎆 🌊 🌈 🌠 🏙 🎑 🌵 🌴 🌲 🌳 🌾",
    ),
    "architecture": (
        "twemoji",
        "building",
        "🏠 🏡 🏘 🏚 🏗 🏢 🏣 🏤 🏥 🏦 🏨 🏩 🏪 🏫 🏬 🏭 🏯 🏰 💒 🗼 🗽 ⛪ 🕌 🛕 🕍 ⛩ 🕋 🏟 🏛 🛖",
    ),
}


def caption_of(entry: EmojiEntry, kind: str, artwork: str) -> str:
    """One line: the kind of picture, the emoji's name, the style as trigger words."""
    return f"{kind}, {entry.label}, {artwork} style".lower()


def pictures_of(artwork: str, keys: Iterable[str], cache_folder: Path, size_px: int) -> dict[str, Image.Image]:
    """RGB pictures on white of the keys that the artwork has, as {key: image}."""
    read = {"fluent 3d": read_fluent_3d, "twemoji": read_twemoji}[artwork]
    return {key: on_white(image) for key, image in read(cache_folder, keys, size_px).items()}


def write_picture(folder: Path, entry: EmojiEntry, image: Image.Image, caption: str) -> None:
    """Write `<name>.png` and `<name>.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(letter if letter.isalnum() else "_" for letter in entry.label.lower()).strip("_").replace("__", "_")
    image.save(folder / f"{name}.png", optimize=True)
    (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf8")


def build_set(
    name: str, dataset_folder: Path, cache_folder: Path, catalogue: list[EmojiEntry], seed: int = 0
) -> tuple[int, int]:
    """Write one set. Returns (training pictures, held-out pictures)."""
    artwork, kind, symbols = SETS[name]
    keys = [emoji_key("-".join(f"{ord(c):X}" for c in symbol)) for symbol in symbols.split()]
    small, large = (pictures_of(artwork, keys, cache_folder, size) for size in (64, LARGE_PX))
    missing = [key for key in keys if key not in small or key not in catalogue]
    if missing:
        raise ValueError(f"{name}: no {artwork} picture or no name for {', '.join(missing)}; take another emoji")
    random.Random(seed).shuffle(keys)
    for position, key in enumerate(keys):
        entry = catalogue[key]
        caption = caption_of(entry, kind, artwork)
        if position < HELDOUT_COUNT:
            write_picture(dataset_folder / name / "heldout", entry, small[key], caption)
        else:
            write_picture(dataset_folder / name / "train" / f"{REPEATS}_{name}", entry, small[key], caption)
            write_picture(dataset_folder / name / f"{LARGE_PX}px" / f"{REPEATS}_{name}", entry, large[key], caption)
    return len(keys) - HELDOUT_COUNT, HELDOUT_COUNT


def main() -> None:
    """Build all sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=HERE.parents[1] / "output/tiny_base/packages")
    parser.add_argument("--dataset", type=Path, default=HERE.parents[1] / "dataset")
    args = parser.parse_args()
    catalogue = {entry.key: entry for entry in read_catalogue(args.packages)}
    for name in SETS:
        print(name, *build_set(name, args.dataset, args.packages, catalogue))


if __name__ == "__main__":
    main()
