"""Builds train.jsonl and heldout.jsonl of this folder from Debian's dict-devil package.

    python prepare.py         # fetches the package with apt-get (nothing is installed)
    python prepare.py --deb dict-devil_1.0-13.1_all.deb

Deterministic: the same package gives the same two files, byte for byte.
"""

import argparse
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE, VERSION = "dict-devil", "1.0-13.1"
TRAIN_COUNT, HELDOUT_COUNT, SEED = 160, 80, 20240511
MIN_WORDS, MAX_WORDS = 8, 65  # 65 words are about 100 tokens of a small vocabulary

HEADWORD = re.compile(r"([A-Z][A-Z' -]+),? (?:n|adj|v|adv|pp|p\.p|n\.pl|v\.t|v\.i|pro|pron)\.\s+(.*)", re.DOTALL)
# Entries that mock a people or a race are left out; the rest of the book mocks everybody.
LEFT_OUT = re.compile(
    r"\b(african|aborigin\w*|arab|chinaman|chinese|hebrew|indian|jew\w*|mohammedan|mulatto|nigger|negro\w*|savage\w*|"
    r"portuguese|squaw|turk|white man\w*|black|race|gypsy|irish\w*|slave\w*)s?\b",
    re.IGNORECASE,
)
# The end of a sentence; "Jo. Miller", "St. Paul" and initials are not one.
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b[A-Z][a-z]\.)(?<!\bMrs\.)(?<!\bRev\.)\s+(?=[A-Z])")


def parse_entries(text):
    """{headword: definition} of the dictd text: the first prose paragraph of each entry, cut to
    whole sentences."""
    entries = {}
    for paragraph in re.split(r"\n\s*\n", text):
        match = HEADWORD.fullmatch(paragraph.strip("\n"))
        if not match:  # verse, signatures, further paragraphs, the preface
            continue
        definition = tidy(match.group(2))
        if definition and match.group(1) not in entries and not LEFT_OUT.search(f"{match.group(1)} {definition}"):
            entries[match.group(1)] = definition
    return entries


def tidy(definition):
    """One line of prose of MIN_WORDS to MAX_WORDS words ending in a full stop, or "" where there is
    none."""
    prose = re.sub(r"\s+", " ", definition.replace("[sic]", "").replace("_", "")).strip()
    prose = re.sub(r" ([,.;])", r"\1", prose)
    kept = []
    for sentence in SENTENCE_END.split(prose):
        if sentence.endswith(":") or sentence.startswith(("See ", "(See ")):  # leads to verse or to another entry
            break
        if len(" ".join([*kept, sentence]).split()) > MAX_WORDS:
            break
        kept.append(sentence)
    short = " ".join(kept)
    balanced = (
        short.count("(") == short.count(")") and short.count("[") == short.count("]") and short.count('"') % 2 == 0
    )
    return short if balanced and short.endswith((".", "!", "?")) and len(short.split()) >= MIN_WORDS else ""


def split_entries(entries):
    """(train rows, held-out rows): a seeded draw over the sorted headwords; no definition occurs
    twice."""
    first_of = {definition: headword for headword, definition in reversed(sorted(entries.items()))}
    headwords = sorted(first_of.values())
    needed = TRAIN_COUNT + HELDOUT_COUNT
    if len(headwords) < needed:
        raise ValueError(f"{len(headwords)} usable entries found, {needed} needed: is this the {PACKAGE} dictionary?")
    drawn = random.Random(SEED).sample(headwords, needed)
    rows = [
        {"input": f'Define "{word.lower()}" as the Devil\'s Dictionary does.', "output": entries[word]}
        for word in drawn
    ]
    return rows[:TRAIN_COUNT], rows[TRAIN_COUNT:]


def dictionary_text(deb_path=None):
    """The dictionary's text out of the package file, fetched with apt-get where no path is
    given."""
    with tempfile.TemporaryDirectory() as folder:
        if deb_path is None:
            run(["apt-get", "download", f"{PACKAGE}={VERSION}"], folder)
            deb_path = next(Path(folder).glob("*.deb"))
        elif not Path(deb_path).is_file():
            raise FileNotFoundError(f"no file '{deb_path}': give the path of {PACKAGE}_{VERSION}_all.deb")
        deb_path = Path(deb_path).resolve()
        fields = run(["dpkg-deb", "--show", "--showformat=${Package} ${Version}", str(deb_path)], folder).split()
        if fields != [PACKAGE, VERSION]:
            raise ValueError(f"'{deb_path.name}' is {' '.join(fields)}, not {PACKAGE} {VERSION}: give that version")
        run(["dpkg-deb", "--extract", str(deb_path), "contents"], folder)
        packed = Path(folder, "contents/usr/share/dictd/devil.dict.dz").read_bytes()
    return gzip.decompress(packed).decode("utf-8")  # dictzip files are gzip files with an index


def run(command, folder):
    """The command's standard output; its own message where it fails."""
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise ValueError(f"'{command[0]}' is not installed: run this on Debian or Ubuntu") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"'{' '.join(command)}' failed: {error.stderr.strip()}") from error


def write_rows(path, rows):
    """One JSON object a line; the file appears whole or not at all."""
    aside = path.with_name(path.name + ".part")
    with open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    words = sum(len(row["output"].split()) for row in rows)
    print(f"{path.name}: {len(rows)} entries, {words} words in the definitions")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deb", help=f"a {PACKAGE} package file at hand; without it apt-get fetches one")
    arguments = parser.parse_args()
    try:
        train, heldout = split_entries(parse_entries(dictionary_text(arguments.deb)))
    except (ValueError, FileNotFoundError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    folder = Path(__file__).resolve().parent
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "heldout.jsonl", heldout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
