"""Damaged histories given to cs_replay.py and judge_checkpoints.py: one message, or an answer."""

import itertools
import json

import pytest
from cs_replay import main as replay_main

from es_lora.history import EVENT, HEADER, MEASUREMENT, MORE_OF_EVENT, MORE_OF_HEADER, MORE_OF_MEASUREMENT, read_history
from es_lora.judge.run_folder import read_run
from es_lora.rules import RULES

HEAD = {"format": "cs-history/1", "cs_interval": 1, "window": 2, "steps_per_epoch": 2.5, "decided_on": "lm"}
HEAD.update(reduction="row", rule="nth-valley", rule_value=2.0)
PARTS = {"lm": 0.1, "all": 0.1}
RECORD = {**dict.fromkeys(MORE_OF_MEASUREMENT, 0.5), "cs": PARTS, "cs_matrix": PARTS, "cs_row": PARTS}
RECORD.update(delta_norm=PARTS, stable_rank=PARTS, update_norm=PARTS)
RECORDS = [{**RECORD, "step": step, "cs": {"lm": 0.1 * (step % 3), "all": 0.0}} for step in range(1, 13)]
LINES = [HEAD, *RECORDS, {"event": "evaluation", "step": 12, "heldout_loss": 2.0}]
ABSENT = object()
NO_VALUES = [None, ABSENT, "x", [], {}, [1], {"lm": "x"}, {"lm": None}, True, -1, 0]
NO_VALUES += [float("nan"), float("inf"), 1e308, -1e308, 10**400, 1e-320, {"lm": float("nan")}, {"te": 0.1}, 0.5]


@pytest.fixture
def run_folder(tmp_path):
    def write(lines):
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "cs_history.jsonl").write_text("".join(line + "\n" for line in text), encoding="utf-8")
        return tmp_path

    return write


def changed(line, name, value):
    rest = {key: entry for key, entry in line.items() if key != name}
    return rest if value is ABSENT else {**rest, name: value}


PLACES = [(0, name) for name in (*HEADER, *MORE_OF_HEADER)]
PLACES += [(number, name) for number in (1, 6, 12) for name in (*MEASUREMENT, *MORE_OF_MEASUREMENT)]
PLACES += [(13, name) for name in (*EVENT, *MORE_OF_EVENT)]


@pytest.mark.parametrize("place, name", PLACES)
def test_no_value_of_a_known_column_ends_in_a_traceback(run_folder, capsys, place, name):
    """Whatever stands there, every rule answers, or the whole file is refused by one message."""
    for value in NO_VALUES:
        lines = [*LINES]
        lines[place] = changed(lines[place], name, value)
        folder = run_folder(lines)
        codes = {replay_main([str(folder), "--json", "--rule", rule]) for rule in (*RULES, "recorded")}
        told = capsys.readouterr().err
        assert codes <= {0, 2} and "Traceback" not in told, (value, told)
        if 2 in codes:
            assert told.count("\n") == len([line for line in told.splitlines() if line.startswith("cs_replay: ")])


NEEDED = [(0, HEADER), (6, MEASUREMENT), (13, EVENT)]


@pytest.mark.parametrize("place, name", [(place, name) for place, needed in NEEDED for name in needed])
@pytest.mark.parametrize("value", [ABSENT, None, [1], float("nan"), float("inf"), 10**400, -1])
def test_what_deciding_needs_is_refused_by_name_where_it_is_missing_or_none(run_folder, capsys, place, name, value):
    lines = [*LINES]
    lines[place] = changed(lines[place], name, value)
    assert replay_main([str(run_folder(lines))]) == 2
    told = capsys.readouterr().err
    assert name in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "is empty; give a cs_history.jsonl"),
        (["", " "], "is empty"),
        ([[1], *RECORDS], "line 1: it is no JSON object"),
        ([HEAD, [1], *RECORDS], "line 2: it is no JSON object"),
        ([HEAD, "null", *RECORDS], "line 2: it is no JSON object"),
        ([HEAD, "[" * 50_000, *RECORDS], "line 2: lists or tables lie in one another more than 100 deep"),
        ([HEAD, {**RECORDS[0], "more": json.loads("[" * 500 + "]" * 500)}, RECORDS[1]], "more than 100 deep"),
        ([HEAD, '{"step": ' + "1" * 5000 + "}", *RECORDS], "line 2: Exceeds the limit"),
        ([HEAD, RECORDS[0], RECORDS[0]], "line 3: step 1 comes after step 1"),
        ([HEAD, RECORDS[4], RECORDS[2]], "line 3: step 3 comes after step 5"),
        ([HEAD, RECORDS[0], {**RECORDS[1], "cs": {"te": 0.1}}], "line 3: cs has the components te, and before lm, all"),
    ],
)
def test_lines_that_are_no_measurements_are_one_message_with_their_number(run_folder, capsys, lines, message):
    folder = run_folder(lines)
    assert replay_main([str(folder)]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    (folder / "checkpoint-1").mkdir()
    with pytest.raises((ValueError, FileNotFoundError)):
        read_run(folder)


def test_bytes_that_are_no_text_and_a_folder_of_the_name_are_one_message(tmp_path, capsys):
    (tmp_path / "cs_history.jsonl").write_bytes(b"\xff\xfe\x00\x81")
    assert replay_main([str(tmp_path)]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err
    (tmp_path / "cs_history.jsonl").unlink()
    (tmp_path / "cs_history.jsonl").mkdir()
    assert replay_main([str(tmp_path)]) == 2
    assert "no history at" in capsys.readouterr().err


def test_a_whole_history_is_read_as_it_is_and_its_page_tells_what_a_rule_lacks(run_folder):
    lines = [HEAD, *RECORDS[:6], changed(RECORDS[6], "shadow_loss", ABSENT)]
    folder = run_folder(lines)
    assert [record["step"] for record in read_history(folder).records] == list(range(1, 8))
    assert replay_main([str(folder), "--html", str(folder / "page.html"), "--rule", "second-valley"]) == 0
    assert "needs shadow_loss" in (folder / "page.html").read_text(encoding="utf-8")


NUMBERS = ["nan", "inf", "1e999", "-1", "0", "1" * 400, "\N{SUPERSCRIPT TWO}", "", "x"]


@pytest.mark.parametrize("flag, text", list(itertools.product(("--window", "--valley", "--value"), NUMBERS)))
def test_numbers_that_are_none_are_refused_by_the_parser(run_folder, capsys, flag, text):
    with pytest.raises(SystemExit) as ended:
        replay_main([str(run_folder(LINES)), flag, text])
    assert ended.value.code == 2
    assert f"argument {flag}:" in capsys.readouterr().err
