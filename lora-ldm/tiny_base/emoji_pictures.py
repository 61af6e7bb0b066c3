"""Openly licensed captioned pictures of npm packages: emoji artwork, Unicode's names, keywords.

The artwork of the base model is Noto (PNG, 64 px) and Fluent flat (SVG); names and keywords are
emojibase's. Nothing here needs a GPU; the packages are fetched once and read from there."""

import io
import json
import random
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE_PX = 64

# Pinned, so that the same script gives the same pictures. The licences are quoted in the READMEs.
PACKAGE_VERSIONS = {
    "emojibase-data": "17.0.0",  # names, keywords, groups: MIT
    "emoji-datasource-google": "16.0.0",  # Noto pictures: Apache-2.0
    "@iconify-json/fluent-emoji-flat": "1.2.6",  # Fluent flat drawings: MIT
    "@discordapp/twemoji": "16.0.1",  # Twemoji drawings: CC-BY 4.0
    "@lobehub/fluent-emoji-3d": "1.1.0",  # Fluent 3D renderings: MIT
}

# Pictures whose meaning changes in a mirror, by emojibase group or by a word of the name.
UNFLIPPABLE_GROUPS = {"symbols", "flags"}
UNFLIPPABLE_WORDS = set("arrow left right leftwards rightwards clock keycap button o'clock thirty calendar".split())
KEPT_SKIN_TONES = (1, 3, 5)  # light, medium, dark: the two between add little but near-copies
_GENDERS = {"1F468": "1F9D1", "1F469": "1F9D1", "2640": "", "2642": ""}


@dataclass(frozen=True)
class EmojiEntry:
    """One emoji as emojibase describes it."""

    key: str  # code points in upper-case hex joined by "-", without FE0F
    concept: str  # the same for all skin tones and genders of one emoji
    label: str
    tags: tuple
    group: str
    is_tone_variant: bool  # one of several skin tones of the same picture

    @property
    def can_flip(self) -> bool:
        return self.group not in UNFLIPPABLE_GROUPS and not UNFLIPPABLE_WORDS & set(self.label.lower().split())


def fetch_package(name: str, cache_folder: Path) -> Path:
    """Unpack an npm package's pinned version under `cache_folder` (once); -> `package` folder."""
    version = PACKAGE_VERSIONS[name]
    target = Path(cache_folder) / f"{name.replace('@', '').replace('/', '-')}-{version}"
    if not target.is_dir():
        Path(cache_folder).mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", f"{name}@{version}"],
            cwd=cache_folder,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()[-1]
        half_done = target.with_suffix(".partial")
        with tarfile.open(Path(cache_folder) / packed) as archive:
            archive.extractall(half_done, filter="data")
        half_done.rename(target)
    return target / "package"


def emoji_key(hexcode: str) -> str:
    """Spell a code point sequence in one way, as key: upper case, no FE0F, no ZWJ variants."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def concept_of(key: str) -> str:
    """Drop skin tone and gender, so that near-copies fall on the same side of a split."""
    parts = [_GENDERS.get(part, part) for part in key.split("-")]
    return "-".join(part for part in parts if part and part != "200D" and not "1F3FB" <= part <= "1F3FF")


def read_catalogue(cache_folder: Path) -> list[EmojiEntry]:
    """Read every emoji that has a group, but flags and components, as EmojiEntry."""
    folder = fetch_package("emojibase-data", cache_folder) / "en"
    groups = {g["order"]: g["key"] for g in json.loads((folder / "messages.json").read_text("utf8"))["groups"]}
    entries = []
    for item in json.loads((folder / "data.json").read_text("utf8")):
        group = groups.get(item.get("group"))
        if group in (None, "component", "flags"):
            continue
        variants = [s for s in item.get("skins", []) if s.get("tone") in KEPT_SKIN_TONES]
        for variant in [item, *variants]:
            key = emoji_key(variant["hexcode"])
            tags = tuple(str(tag) for tag in item.get("tags", []))
            entries.append(EmojiEntry(key, concept_of(key), variant["label"], tags, group, variant is not item))
    return entries


def render_svg(svg_text: str, size_px: int) -> Image.Image:
    """Rasterise one drawing. Returns an RGBA image of size_px x size_px."""
    import resvg_py  # only needed to build, not to use the model

    return Image.open(
        io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg_text, width=size_px, height=size_px)))
    ).convert("RGBA")


def read_noto(cache_folder: Path, size_px: int = SIZE_PX) -> dict[str, Image.Image]:
    """Return {emoji key: RGBA image} of the Noto artwork (available at 64 px)."""
    package = fetch_package("emoji-datasource-google", cache_folder)
    rows = json.loads((package / "emoji.json").read_text("utf8"))
    rows += [tone for row in rows for tone in row.get("skin_variations", {}).values()]
    pictures = {}
    for row in rows:
        path = package / "img/google/64" / row["image"]
        if row.get("has_img_google") and path.is_file():
            pictures[emoji_key(row["unified"])] = Image.open(path).convert("RGBA").resize((size_px, size_px))
    return pictures


def read_fluent_flat(cache_folder: Path, size_px: int = SIZE_PX) -> dict[str, Image.Image]:
    """Return {emoji key: RGBA image} of the Fluent flat artwork."""
    package = fetch_package("@iconify-json/fluent-emoji-flat", cache_folder)
    icon_set = json.loads((package / "icons.json").read_text("utf8"))
    box = f"0 0 {icon_set['width']} {icon_set['height']}"
    pictures = {}
    for code, name in json.loads((package / "chars.json").read_text("utf8")).items():
        icon = icon_set["icons"].get(name)
        if icon is not None:
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
            pictures[emoji_key(code)] = render_svg(svg, size_px)
    return pictures


def read_twemoji(cache_folder: Path, keys: Iterable[str], size_px: int = SIZE_PX) -> dict[str, Image.Image]:
    """Return {emoji key: RGBA image} of the Twemoji artwork for the given keys that it has."""
    folder = fetch_package("@discordapp/twemoji", cache_folder) / "dist/svg"
    paths = {emoji_key(path.stem): path for path in folder.glob("*.svg")}
    return {key: render_svg(paths[key].read_text("utf8"), size_px) for key in keys if key in paths}


def read_fluent_3d(cache_folder: Path, keys: Iterable[str], size_px: int = SIZE_PX) -> dict[str, Image.Image]:
    """{emoji key: RGBA image} of the Fluent 3D artwork (256 px) for the keys that it has."""
    folder = fetch_package("@lobehub/fluent-emoji-3d", cache_folder) / "assets"
    paths = {emoji_key(path.stem): path for path in folder.glob("*.webp")}
    resized = {}
    for key in keys:
        if key in paths:
            with Image.open(paths[key]) as image:
                resized[key] = image.convert("RGBA").resize((size_px, size_px), Image.Resampling.LANCZOS)
    return resized


def on_white(image: Image.Image) -> Image.Image:
    """Compose an RGBA image on white. Returns an RGB image of the same size."""
    background = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(background, image).convert("RGB")


def heldout_caption(entry: EmojiEntry, style: str) -> str:
    """The one fixed caption of a picture, used wherever captions are compared."""
    return ", ".join([entry.label, *entry.tags[:3], f"{style} style"]).lower()


def training_captions(entry: EmojiEntry, style: str, count: int, rng: random.Random) -> list[str]:
    """Draw `count` captions of a picture: name, keywords in random order, mostly the style."""
    captions = []
    for _ in range(count):
        tags = list(entry.tags)
        rng.shuffle(tags)
        kind = rng.random()
        if kind < 0.35 or not tags:
            parts = [entry.label]
        elif kind < 0.8:
            parts = [entry.label, *tags[: rng.randint(1, 4)]]
        else:
            parts = tags[: rng.randint(2, 5)]
        if rng.random() < 0.6:
            parts.append(f"{style} style")
        captions.append(", ".join(parts).lower())
    return captions


def split_concepts(concepts: Iterable[str], seed: int) -> dict[str, str]:
    """Assign every concept to a role, reproducibly.

    Returns {concept: role} with role "train", "validation" (both styles kept for choosing the
    checkpoint), "new_concept" (both styles held out for the figures) or "new_picture" (one style
    held out, the other trained on)."""
    ordered = sorted(set(concepts))
    random.Random(seed).shuffle(ordered)
    validation, new_concept, new_picture = (int(len(ordered) * share) for share in (0.02, 0.04, 0.05))
    roles = dict.fromkeys(ordered, "train")
    roles.update(dict.fromkeys(ordered[:validation], "validation"))
    roles.update(dict.fromkeys(ordered[validation : validation + new_concept], "new_concept"))
    start = validation + new_concept
    roles.update(dict.fromkeys(ordered[start : start + new_picture], "new_picture"))
    return roles


def collect_pictures(cache_folder: Path, seed: int = 0, captions_a_picture: int = 24) -> tuple[list[dict], np.ndarray]:
    """Read both base styles.

    Returns (records, pictures): records is a list of dicts with key, style, role ("train",
    "validation", "new_concept", "new_picture"), weight (sampling), can_flip, caption, captions;
    pictures is uint8 (N, 64, 64, 4) RGBA."""
    catalogue = read_catalogue(cache_folder)
    roles = split_concepts([entry.concept for entry in catalogue], seed)
    rng = random.Random(seed + 1)
    records, pictures = [], []
    for style, artwork in (("noto", read_noto(cache_folder)), ("flat", read_fluent_flat(cache_folder))):
        for entry in catalogue:
            if entry.key not in artwork:
                continue
            role = roles[entry.concept]
            # Which of a "new_picture" concept's two styles is held out goes by its spelling.
            if role == "new_picture" and style != ("noto", "flat")[sum(map(ord, entry.concept)) % 2]:
                role = "train"
            records.append(
                {
                    "key": entry.key,
                    "concept": entry.concept,
                    "style": style,
                    "role": role,
                    "group": entry.group,
                    "is_tone_variant": entry.is_tone_variant,
                    "can_flip": entry.can_flip,
                    "caption": heldout_caption(entry, style),
                    "captions": training_captions(entry, style, captions_a_picture, rng),
                }
            )
            pictures.append(np.asarray(artwork[entry.key]))
    # A person in four skin tones and three genders is not worth twelve times a pumpkin.
    sizes = Counter((record["style"], record["concept"]) for record in records)
    for record in records:
        record["weight"] = sizes[record["style"], record["concept"]] ** -0.5
    return records, np.stack(pictures)
