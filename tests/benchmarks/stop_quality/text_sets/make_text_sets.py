"""Builds the eight text sets beside this file: six out of Debian packages, two by calculation.

    python make_text_sets.py                        # fetched with apt-get; nothing is installed
    python make_text_sets.py --packages FOLDER      # FOLDER holds package files (*.deb) at hand

Deterministic: the same package versions give the same files, byte for byte. The packages are in the
public domain or under a permissive licence (README.md), and the embedded base was not trained on
them.
"""

import argparse
import gzip
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from xml.etree import ElementTree

SEED = 5
LONGEST_WORDS = 55  # of input and output together; about 100 tokens of the embedded base at the most
VERSIONS = {  # package: the version whose text is committed here
    "display-dhammapada": "1.0-0.1+b1",
    "sword-text-kjv": "14.3-1",
    "sword-dict-strongs-greek": "3.0-3",
    "freebsd-manpages": "12.2-1",
    "dict-elements": "20001107-a-9.1",
    "unicode-cldr-core": "41-0.1",
}


# ----------------------------------------------------------------------------- rows out of packages


def one_line(text):
    return " ".join(text.split())


def opening_and_rest(sentence, words):
    """The first words of a sentence, and what follows."""
    parts = sentence.split()
    return " ".join(parts[:words]), " ".join(parts[words:])


def dhammapada(root):
    """Verses in F. Max Mueller's translation: their opening words are given, the rest is asked
    for."""
    text = next(root.rglob("dhammapada-alternate.txt")).read_text(encoding="utf-8", errors="replace")
    for paragraph in re.split(r"\n\s*\n", text):
        match = re.fullmatch(r"(.+[.!?\"')]) +\d+(?:, ?\d+)?\.?", one_line(paragraph))
        if match and 14 <= len(match[1].split()) <= 45 and match[1].isascii():
            opening, rest = opening_and_rest(match[1], 6)
            yield {"input": f"Finish this verse of the Dhammapada: {opening}", "output": rest}


def king_james(root):
    """Proverbs in the King James Version: opening words and rest. SWORD's zText layout: see
    collect_text.py of tiny_base."""
    files = {kind: next(root.rglob(f"ot.bz{kind}")).read_bytes() for kind in "zsv"}
    places = struct.iter_unpack("<III", files["s"])
    blocks = [zlib.decompress(files["z"][at : at + size]) if size else b"" for at, size, _ in places]
    for block, at, size in struct.iter_unpack("<IIH", files["v"]):
        verse = blocks[block][at : at + size].decode("utf-8")
        verse = one_line(re.sub(r"<note\b.*?</note>|<title\b.*?</title>|<[^>]+>|¶", " ", verse))
        verse = re.sub(r" ([,.;:?!’])", r"\1", verse)
        if b'"Prov.' in blocks[block] and 12 <= len(verse.split()) <= 40 and verse[-1] in ".?!":
            opening, rest = opening_and_rest(verse, 5)
            yield {"input": f"Finish this proverb as King James's translators did: {opening}", "output": rest}


def strongs_greek(root):
    """Strong's Greek dictionary of 1890: a word in Latin letters and its definition. SWORD's zLD
    layout: `zdx` holds (offset, packed size) of each zlib block; a block is a count, (offset, size)
    of each entry, the entries."""
    index, data = (next(root.rglob(f"strongsgreek/dict.{kind}")).read_bytes() for kind in ("zdx", "zdt"))
    for at, packed in struct.iter_unpack("<II", index):
        block = zlib.decompress(data[at : at + packed])
        for number in range(struct.unpack_from("<I", block)[0]):
            start, size = struct.unpack_from("<II", block, 4 + 8 * number)
            entry = block[start : start + size].decode("utf-8", "replace")
            word, meaning = (
                re.search(r'type="trans">([^<]+)<', entry),
                re.search(r"</orig>(.*?)</def>", entry, re.DOTALL),
            )
            meaning = one_line(re.sub(r"<[^>]+>", " ", meaning[1])).lstrip(" ;") if meaning else ""
            if word and 8 <= len(meaning.split()) <= 35 and meaning.endswith(".") and not re.search(r"[GH]\d", meaning):
                yield {"input": f'What does the Greek word "{word[1].strip()}" mean?', "output": meaning}


def freebsd_drivers(root):
    """The one-line descriptions of FreeBSD's kernel interfaces (section 4 of the manual): licence
    BSD."""
    for page in sorted(root.rglob("man4/*.4freebsd.gz")):
        if page.is_symlink():
            continue
        text = gzip.decompress(page.read_bytes()).decode("utf-8", "replace")
        match = re.search(r"^\.Nm (\S+).*?^\.Nd (.+?)$", text, re.MULTILINE | re.DOTALL)
        if match and 3 <= len(match[2].split()) <= 20 and match[2].replace('"', "")[0] not in ".\\":
            yield {"input": f"What is {match[1]}(4) in FreeBSD?", "output": match[2].replace('"', "").replace("\\", "")}


def elements(root):
    """Chemical elements: symbol, atomic number, weight and the first sentence about each."""
    text = gzip.decompress(next(root.rglob("elements.dict.dz")).read_bytes()).decode("utf-8", "replace")
    pattern = r"^([a-z]+)\s+Symbol: (\w+)\s+Atomic number: (\d+)\s+Atomic weight: ([\d.()]+)\s+([A-Z].*?\.)(?:\s|$)"
    for name, symbol, number, weight, sentence in re.findall(pattern, text, re.MULTILINE | re.DOTALL):
        output = f"Symbol {symbol}, number {number}, weight {weight}. {one_line(sentence)}"
        if len(output.split()) <= 30:
            yield {"input": f"Which element is {name}?", "output": output}


def emoji_names(root):
    """CLDR's English keywords of emoji and their names: licence Unicode-DFS-2016."""
    tree = ElementTree.parse(next(root.rglob("common/annotations/en.xml")))
    found = {}
    for entry in tree.iter("annotation"):
        found.setdefault(entry.get("cp"), {})[entry.get("type", "keywords")] = entry.text
    for code, texts in found.items():
        if ord(code[0]) < 0x2600 or "keywords" not in texts or "tts" not in texts:
            continue
        keywords = [word for word in texts["keywords"].split(" | ") if word != texts["tts"]]
        if len(keywords) >= 3:
            yield {
                "instruction": "Name the emoji that has these keywords.",
                "input": ", ".join(keywords[:6]),
                "output": f"It is the {texts['tts']}.",
            }


# ------------------------------------------------------------------------------ rows by calculation

UNITS = [  # (unit, units of the other, factor)
    ("inches", "centimetres", 2.54), ("feet", "metres", 0.3048), ("miles", "kilometres", 1.609344),
    ("yards", "metres", 0.9144), ("pounds", "kilograms", 0.45359237), ("ounces", "grams", 28.349523125),
    ("pints", "litres", 0.56826125), ("acres", "hectares", 0.40468564224), ("nautical miles", "kilometres", 1.852),
    ("stone", "kilograms", 6.35029318), ("gallons", "litres", 4.54609), ("hours", "minutes", 60.0),
]  # fmt: skip


def unit_conversions(_):
    """Imperial measures in metric ones, worked out: the exact factors of 1959, imperial pint and
    gallon."""
    for unit, other, factor in UNITS:
        for count in (2, 3, 4, 5, 6, 8, 9, 12, 15, 20, 24, 25, 30, 40, 50):
            product = f"{count * factor:.4g}"
            steps = f"One of the {unit} is {factor:.4g} {other}; {count} times {factor:.4g} is {product}."
            output = f"{steps} So it is {product} {other}."
            yield {"input": f"How many {other} are {count} {unit}?", "output": output}


EDITS = {
    "Write the words in reverse order.": lambda words: words[::-1],
    "Write the words in alphabetical order.": lambda words: sorted(words),
    "Write every word in capital letters.": lambda words: [word.upper() for word in words],
    "Write only the first letter of each word.": lambda words: [word[0] for word in words],
    "Leave out every second word.": lambda words: words[::2],
    "Write every word twice.": lambda words: [word for word in words for _ in range(2)],
    "Put the last word in front.": lambda words: words[-1:] + words[:-1],
    "Write the number of letters of each word.": lambda words: [str(len(word)) for word in words],
}


def text_edits(root):
    """Eight small editing tasks, worked out on phrases of the King James proverbs."""
    rows = king_james(root)
    for place, row in enumerate(rows):
        phrases = [re.findall(r"[a-z]+", part.lower()) for part in re.split(r"[,;:.?!]", row["output"])]
        phrases = [words for words in phrases if 4 <= len(words) <= 8]
        for number, words in enumerate(phrases[:2]):
            instruction, edit = list(EDITS.items())[(place + 3 * number) % len(EDITS)]
            yield {"instruction": instruction, "input": " ".join(words), "output": " ".join(edit(words))}


SETS = {  # folder: (kind, package, maker of rows, training rows, held-out rows)
    "dhammapada": ("style", "display-dhammapada", dhammapada, 32, 48),
    "king_james": ("style", "sword-text-kjv", king_james, 250, 56),
    "strongs_greek": ("domain", "sword-dict-strongs-greek", strongs_greek, 500, 56),
    "freebsd_drivers": ("domain", "freebsd-manpages", freebsd_drivers, 240, 56),
    "elements": ("question and answer", "dict-elements", elements, 48, 48),
    "unit_conversions": ("question and answer", None, unit_conversions, 100, 56),
    "emoji_names": ("instructions", "unicode-cldr-core", emoji_names, 60, 56),
    "text_edits": ("instructions", "sword-text-kjv", text_edits, 400, 56),
}


# ---------------------------------------------------------------------------------- split and write


def split_rows(name, rows, train_count, heldout_count):
    """(training rows, held-out rows): a seeded draw; no input and no output occurs twice."""
    inputs, outputs, unique = set(), set(), []
    for row in rows:
        key, answer = row["input"].casefold(), row["output"].casefold()
        short = len(f"{row['input']} {row['output']}".split()) <= LONGEST_WORDS
        if row["output"] and short and key not in inputs and answer not in outputs:
            unique.append(row)
            inputs.add(key)
            outputs.add(answer)
    needed = train_count + heldout_count
    if len(unique) < needed:
        raise ValueError(
            f"{name}: {len(unique)} usable rows found, {needed} needed; is the package's version that of VERSIONS?"
        )
    drawn = random.Random(SEED).sample(unique, needed)
    return drawn[:train_count], drawn[train_count:]


def run(command, folder):
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(f"'{command[0]}' is not installed: run this on Debian or Ubuntu") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"'{' '.join(command)}' failed: {error.stderr.strip()[-300:]}") from error


def unpack(package, packages, folder, versions=VERSIONS):
    """The unpacked contents of a package: from `packages` if given, else fetched."""
    root = folder / package
    if not root.is_dir():
        if packages is None:
            run(["apt-get", "download", f"{package}={versions[package]}"], folder)
        archives = sorted((packages or folder).glob(f"{package}_*.deb"))
        if not archives:
            raise FileNotFoundError(
                f"no file {package}_*.deb in {packages or folder}; it holds version {versions[package]}"
            )
        run(["dpkg-deb", "--extract", str(archives[-1].resolve()), str(root.resolve())], folder)
    return root


def write_rows(path, rows):
    """One JSON object a line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, path)


def build(sets, unpack, description):
    """The command line of a builder of sets; its exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="a folder with the package files; without it they are fetched")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent, help="where the folders of the sets go"
    )
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, (kind, package, make, train_count, heldout_count) in sets.items():
                root = unpack(package, arguments.packages, Path(folder)) if package else None
                train, heldout = split_rows(name, make(root), train_count, heldout_count)
                write_rows(arguments.out / name / "train.jsonl", train)
                write_rows(arguments.out / name / "heldout.jsonl", heldout)
                print(f"{name}: {kind}, {len(train)} training and {len(heldout)} held-out rows")
    except (ValueError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(build(SETS, unpack, __doc__))
