"""The text sets that ship with the project: complete, disjoint, licensed, and what their prepare.py
builds."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

DATASET = Path(__file__).resolve().parents[3] / "dataset"
# folder -> (training rows, held-out rows, columns, fewest and most words of an output, licence
# named in the README)
SETS = {
    "devils_dictionary": (160, 80, ("input", "output"), 8, 65, "public domain"),
    "kitchen_notes": (130, 60, ("input", "output"), 25, 60, "CC0-1.0"),
    "law_terms": (140, 70, ("input", "output"), 8, 40, "CC0-1.0"),
    "commit_messages": (125, 60, ("instruction", "input", "output"), 10, 40, "CC0-1.0"),
}


def rows_of(name, part):
    text = (DATASET / name / f"{part}.jsonl").read_bytes().decode("utf-8")  # strict: fails on anything but UTF-8
    return [json.loads(line) for line in text.splitlines()]


def load_prepare(name):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", DATASET / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SETS)
def test_counts_columns_and_lengths(name):
    train_count, heldout_count, columns, fewest_words, most_words, _ = SETS[name]
    train, heldout = rows_of(name, "train"), rows_of(name, "heldout")
    assert (len(train), len(heldout)) == (train_count, heldout_count)
    for row in train + heldout:
        assert tuple(row) == columns
        assert all(isinstance(value, str) and value == value.strip() and value for value in row.values()), row
        assert fewest_words <= len(row["output"].split()) <= most_words, row


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("column", ["input", "output"])
def test_nothing_occurs_twice(name, column):
    values = [row[column].casefold() for part in ("train", "heldout") for row in rows_of(name, part)]
    assert len(set(values)) == len(values), "a text occurs twice, perhaps on both sides of the split"


@pytest.mark.parametrize("name", SETS)
def test_readme_names_the_licence_and_the_sizes(name):
    train_count, heldout_count, _, _, _, licence = SETS[name]
    readme = (DATASET / name / "README.md").read_text(encoding="utf-8")
    assert licence in readme
    assert f"{train_count} training and {heldout_count} held-out examples" in readme
    index = (DATASET / "README.md").read_text(encoding="utf-8")
    row = next(line for line in index.splitlines() if line.startswith(f"| [{name}]({name}/) |"))
    assert f"| {train_count} / {heldout_count} |" in row and licence in row


def test_every_kitchen_note_closes_in_the_cooks_manner():
    for part in ("train", "heldout"):
        for row in rows_of("kitchen_notes", part):
            assert re.search(r"\. note to self: [^.]+\.$", row["output"]), row
            assert row["output"] == row["output"].lower()


def test_every_commit_message_keeps_the_house_style():
    style = re.compile(
        r"(fix|feat|perf|chore|docs|style|refactor|test|ci|build|revert)\([a-z0-9]+\): [^\n]{1,72}\n"
        r"why: [^\n]+\nrisk: (none|low|some|high) - [^\n]+"
    )
    for part in ("train", "heldout"):
        for row in rows_of("commit_messages", part):
            assert style.fullmatch(row["output"]), row


DICTIONARY_TEXT = """
PREFACE, n.  Words before
words.

ANVIL, n.  A thing of _iron_ upon which smiths and reputations are
beaten flat.  The late Jo. Miller is said to have owned one.

    A verse about an anvil, which
    must not be taken up.
                                                                  G.J.

BOX, v.t.  See CRATE, which is a better word for the thing that is meant.

CRATE, n.  The wooden overcoat of a parcel, paid for by whoever gets
it.  Thus speaks the poet:
"""


def test_devils_dictionary_parser_keeps_prose_and_drops_verse_and_references():
    entries = load_prepare("devils_dictionary").parse_entries(DICTIONARY_TEXT)
    assert entries == {
        "ANVIL": "A thing of iron upon which smiths and reputations are beaten flat. "
        "The late Jo. Miller is said to have owned one.",
        "CRATE": "The wooden overcoat of a parcel, paid for by whoever gets it.",
    }


def test_devils_dictionary_definitions_are_cut_after_a_whole_sentence():
    prepare = load_prepare("devils_dictionary")
    sentence = "Nine words of prose stand here in this sentence."
    entries = prepare.parse_entries("LONG, n.  " + " ".join([sentence] * 20))
    assert entries["LONG"] == " ".join([sentence] * (prepare.MAX_WORDS // 9))


def test_devils_dictionary_split_is_seeded_and_refuses_too_few_entries():
    prepare = load_prepare("devils_dictionary")
    entries = {f"WORD {number}": f"Definition number {number}." for number in range(300)}
    shuffled = dict(reversed(entries.items()))
    assert prepare.split_entries(entries) == prepare.split_entries(shuffled)
    with pytest.raises(ValueError, match="10 usable entries found, 240 needed"):
        prepare.split_entries(dict(list(entries.items())[:10]))


def test_devils_dictionary_refuses_a_missing_package_file(capsys, monkeypatch):
    prepare = load_prepare("devils_dictionary")
    monkeypatch.setattr("sys.argv", ["prepare.py", "--deb", "nowhere.deb"])
    before = (DATASET / "devils_dictionary" / "train.jsonl").read_bytes()
    assert prepare.main() == 2
    assert "no file 'nowhere.deb'" in capsys.readouterr().err
    assert (DATASET / "devils_dictionary" / "train.jsonl").read_bytes() == before
