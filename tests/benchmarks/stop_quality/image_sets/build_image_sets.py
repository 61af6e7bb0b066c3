"""Build the six image sets beside this file in the manner of the bundled ones.

    python build_image_sets.py

Two sets of emoji (vehicles, food) and the four of the new half (tools, flags, birds, beasts). Every
set has 10 held-out pictures; all are of 64 px. Run it in the diffusion environment with `resvg_py`
added, npm installed, and on Debian (birds); sources and licences are in README.md. The same package
versions give the same files.
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
sys.path += [str(ROOT / "lora-ldm" / "tiny_base"), str(HERE.parent / "text_sets")]
import emoji_pictures  # noqa: E402
import make_text_sets  # noqa: E402
from emoji_pictures import emoji_key, fetch_package, on_white, read_catalogue, render_svg  # noqa: E402
from make_image_sets import HELDOUT_COUNT, REPEATS, caption_of, pictures_of, write_picture  # noqa: E402

SIZE_PX = 64
STAMPS, STAMPS_VERSION = "tuxpaint-stamps-default", "2022.06.04-1"
STAMPS_LICENCE = Path("/usr/share/common-licenses/GPL-2")  # Debian's copy; it has to go with the pictures
emoji_pictures.PACKAGE_VERSIONS.update(
    {"@iconify-json/openmoji": "1.2.29", "@iconify-json/game-icons": "1.2.4", "flag-icons": "7.5.0"}
)

# Set -> (artwork, first word of the captions, the emoji). Chosen by name before any picture was
# trained on.
SETS = {
    "vehicles": ("fluent 3d", "vehicle",
        "🚗 🚕 🚙 🚌 🚎 🏎 🚓 🚑 🚒 🚐 🛻 🚚 🚛 🚜 🛵 🏍 🚲 🛴 🚂 🚆 🚇 🚊 🚝 🚀 🛸 🚁 ✈ 🛩 ⛵ 🚤 🛥 🚢 ⛴ 🚡"),
    "food": ("twemoji", "food",
        "🍏 🍐 🍊 🍋 🍌 🍉 🍇 🍓 🍒 🍑 🥭 🍍 🥥 🥝 🍅 🍆 🥑 🥦 🥕 🌽 🍞 🧀"),
}  # fmt: skip

# The same for the new half, by the names that the packages give.
NEW_SETS = {
    "tools": ("openmoji", "tool",
        "hammer axe pick wrench screwdriver nut-and-bolt gear clamp carpentry-saw magnet ladder microscope telescope "
        "satellite-antenna fire-extinguisher bucket broom basket razor scissors pushpin paperclip pen paintbrush key "
        "locked light-bulb flashlight candle camera alarm-clock telephone printer balloon"),
    "flags": ("flag icons", "flag",
        "ar au at bd br ca ch cl cz dk ee fi gr in jm jp ke kr lb mg ng no pl pt se th tr za"),
    "birds": ("photograph", "bird",
        "adelaide-rosella blackbird crow crowned_crane cuckoo drake duck gander guineafowl hen heron_greatblue lark "
        "little-penguin magellanic_penguin magpie nandou ostrich owl peacock pelican penguin pigeon pink_flamingo "
        "quetzal rainbow-lorikeet rooster seagull tucan turkey vulture"),
    "beasts": ("game icons", "beast",
        "snail bee butterfly scorpion octopus squid crab turtle dolphin frog snake owl duck goat pig cat wolf-head "
        "polar-bear elephant rabbit monkey kangaroo"),
}  # fmt: skip


def read_icons(package, names, packages):
    """{label: RGBA image} of an Iconify set; an icon without colours of its own is black."""
    icon_set = json.loads((fetch_package(package, packages) / "icons.json").read_text("utf8"))
    box = f"0 0 {icon_set['width']} {icon_set['height']}"
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" color="black">'
    bodies = {name: icon_set["icons"][name]["body"] for name in names}
    return {name.replace("-", " "): render_svg(f"{frame}{body}</svg>", SIZE_PX) for name, body in bodies.items()}


def read_flags(codes, packages):
    """{country: RGBA image} of square flags."""
    folder = fetch_package("flag-icons", packages)
    countries = {country["code"]: country for country in json.loads((folder / "country.json").read_text("utf8"))}
    return {
        countries[code]["name"]: render_svg((folder / countries[code]["flag_1x1"]).read_text("utf8"), SIZE_PX)
        for code in codes
    }


def read_birds(names, packages):
    """{bird: RGBA image} of Tux Paint's stamps, photographs cut out; the name is the first line
    beside each."""
    packages.mkdir(parents=True, exist_ok=True)
    root = make_text_sets.unpack(STAMPS, None, packages, {STAMPS: STAMPS_VERSION})
    folder = root / "usr/share/tuxpaint/stamps/animals/birds"
    pictures = {}
    for name in names:
        words = (folder / f"{name}.txt").read_text("utf8").splitlines()[0].rstrip(".").split(" (")[0].split()
        with Image.open(folder / f"{name}.png") as image:
            stamp = image.convert("RGBA")
        stamp.thumbnail((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS)
        square = Image.new("RGBA", (SIZE_PX, SIZE_PX), (255, 255, 255, 0))
        square.paste(stamp, ((SIZE_PX - stamp.width) // 2, (SIZE_PX - stamp.height) // 2))
        pictures[" ".join(words[1:])] = square  # without its article
    return pictures


def read_new_pictures(artwork, names, packages):
    if artwork == "flag icons":
        return read_flags(names, packages)
    if artwork == "photograph":
        return read_birds(names, packages)
    return read_icons(f"@iconify-json/{artwork.replace(' ', '-')}", names, packages)


def part_of(name, position):
    """The folder of a set that the picture at a place of the shuffled list goes to."""
    return "heldout" if position < HELDOUT_COUNT else f"train/{REPEATS}_{name}"


def build_set(name, target, packages, catalogue, seed=0):
    """Write one set; returns (training pictures, held-out pictures)."""
    artwork, kind, symbols = SETS[name]
    keys = [emoji_key("-".join(f"{ord(letter):X}" for letter in symbol)) for symbol in symbols.split()]
    pictures = pictures_of(artwork, keys, packages, SIZE_PX)
    missing = [key for key in keys if key not in pictures or key not in catalogue]
    if missing:
        raise ValueError(f"{name}: no {artwork} picture or no name for {', '.join(missing)}; take another emoji")
    random.Random(seed).shuffle(keys)
    for position, key in enumerate(keys):
        folder = target / name / part_of(name, position)
        write_picture(folder, catalogue[key], pictures[key], caption_of(catalogue[key], kind, artwork))
    return len(keys) - HELDOUT_COUNT, HELDOUT_COUNT


def build_new_set(name, target, packages, seed=0):
    """Write one set of the new half; returns (training pictures, held-out pictures)."""
    artwork, kind, names = NEW_SETS[name]
    pictures = read_new_pictures(artwork, names.split(), packages)
    if len(pictures) != len(names.split()):
        raise ValueError(f"{name}: two pictures have one name; take another one")
    labels = list(pictures)
    random.Random(seed).shuffle(labels)
    for position, label in enumerate(labels):
        entry = SimpleNamespace(label=label)
        caption = caption_of(entry, kind, artwork)
        write_picture(target / name / part_of(name, position), entry, on_white(pictures[label]), caption)
    if artwork == "photograph":
        shutil.copyfile(STAMPS_LICENCE, target / name / "COPYING")
    return len(labels) - HELDOUT_COUNT, HELDOUT_COUNT


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--packages", type=Path, default=ROOT / "output" / "tiny_base" / "packages", help="packages go here"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where the folders of the sets go")
    arguments = parser.parse_args()
    catalogue = {entry.key: entry for entry in read_catalogue(arguments.packages)}
    for name in SETS:
        print(name, *build_set(name, arguments.out, arguments.packages, catalogue))
    for name in NEW_SETS:
        print(name, *build_new_set(name, arguments.out, arguments.packages))


if __name__ == "__main__":
    main()
