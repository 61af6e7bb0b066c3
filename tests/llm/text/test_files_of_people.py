"""Files as people bring them: marks, odd line ends, other encodings and separators, more columns.

Each reader gives the same rows, or names file and line."""

import json
import logging

import pytest
from generate_text import read_requests

from jobs.config import read_jobs
from text.formats import detect_format
from text.sources import read_table_as_pairs
from text.spec import DataSpec
from text.streams import load_streamed_splits
from text.tables import read_table
from training.forgetting import read_general_text

ODD = "a\u2028b\u2029c\x85d\x0be\x0cf"  # one line, whatever str.splitlines says
MARK = b"\xef\xbb\xbf"


def streamed(path):
    return list(load_streamed_splits(DataSpec(str(path))).train)


@pytest.mark.parametrize("mark", [b"", MARK])
def test_separators_within_a_line_and_a_mark_before_it_change_no_row(tmp_path, mark):
    row = json.dumps({"input": ODD, "output": ODD, "text": ODD}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_bytes(mark + f"{row}\r\n{row}\n".encode())
    (tmp_path / "rows.csv").write_bytes(mark + f'input,output\r\n"{ODD}","{ODD}"\r\n'.encode())
    assert [row["input"] for _, row in read_table(tmp_path / "rows.jsonl")] == [ODD, ODD]
    assert read_table(tmp_path / "rows.csv") == [(2, {"input": ODD, "output": ODD})]
    assert [row["output"] for row in streamed(tmp_path / "rows.jsonl")] == [ODD, ODD]
    assert [row["output"] for row in streamed(tmp_path / "rows.csv")] == [ODD]
    assert [row["input"] for row in read_requests(tmp_path / "rows.jsonl")] == [ODD, ODD]
    assert read_general_text(str(tmp_path / "rows.jsonl"), 9) == [ODD.strip()] * 2


@pytest.mark.parametrize("mark", [b"", MARK])
def test_a_text_file_is_a_prompt_a_line_and_general_text_by_blank_lines(tmp_path, mark):
    (tmp_path / "p.txt").write_bytes(mark + f"{ODD}\r\n\r\nhello\r\n".encode())
    assert read_requests(tmp_path / "p.txt") == [{"input": ODD}, {"input": "hello"}]
    assert read_general_text(str(tmp_path / "p.txt"), 9) == [ODD, "hello"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_what_is_not_utf_8_names_file_and_line_in_every_reader(tmp_path, name):
    good = '{"input": "x", "output": "y", "text": "t"}' if name.endswith("jsonl") else "input,output\nx,y"
    bad = '{"input": "caf\xe9", "output": "y", "text": "t"}' if name.endswith("jsonl") else "caf\xe9,y"
    (tmp_path / name).write_bytes(f"{good}\n{bad}\n".encode("latin-1"))
    said = rf"{name}, line {len(good.splitlines()) + 1} is not UTF-8 text"
    readers = [read_table, read_table_as_pairs, streamed, read_requests]
    for read in readers + [lambda path: read_general_text(str(path), 9)] * name.endswith("jsonl"):
        with pytest.raises(ValueError, match=said):
            read(tmp_path / name)


def test_half_a_surrogate_pair_is_named_with_its_row_and_column(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"input": "x", "output": "y"}\n{"input": "x \\ud83d", "output": "y"}\n')
    for read in (read_table, read_table_as_pairs, streamed, read_requests):
        with pytest.raises(ValueError, match=r"rows.jsonl, row 2: column 'input' holds half a surrogate pair"):
            read(tmp_path / "rows.jsonl")
    (tmp_path / "whole.jsonl").write_text('{"input": "\\ud83d\\ude00", "output": "y"}\n')
    assert read_table(tmp_path / "whole.jsonl")[0][1]["input"] == "\U0001f600"


def test_semicolons_and_tabs_separate_where_they_separate_the_first_line(tmp_path):
    (tmp_path / "a.csv").write_text("input;output\nx, or y;z\n")
    (tmp_path / "b.csv").write_text("input\toutput\nx, or y\tz\n")
    for name in ("a.csv", "b.csv"):
        assert read_table(tmp_path / name) == [(2, {"input": "x, or y", "output": "z"})]
        assert streamed(tmp_path / name) == [{"input": "x, or y", "output": "z"}]


@pytest.mark.parametrize("key", ["data", "train", "rows"])
def test_a_list_within_an_object_is_the_rows_and_a_conversation_is_a_row(tmp_path, key):
    rows = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]
    (tmp_path / "a.json").write_text(json.dumps({"version": "1", key: rows}, indent=1))
    assert [row for _, row in read_table(tmp_path / "a.json")] == rows
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "b.json").write_text(json.dumps(talk, indent=1))
    assert [row for _, row in read_table(tmp_path / "b.json")] == [talk]


def test_system_and_history_of_alpaca_and_sharegpt_stand_before_the_answer(tmp_path):
    alpaca = {"instruction": "x", "input": "", "output": "y", "system": "Be terse.", "history": [["old q", "old a"]]}
    talk = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "system": "Be terse."}
    for name, row in (("alpaca", alpaca), ("sharegpt", talk)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        pairs, format_name = read_table_as_pairs(tmp_path / f"{name}.jsonl")
        assert pairs[0]["input"].startswith("Be terse.") and pairs[0]["output"] == "y" and "system" in format_name
    given = read_table_as_pairs(tmp_path / "alpaca.jsonl")[0][0]["input"]
    assert given.index("Be terse.") < given.index("old q") < given.index("old a") < given.index("Instruction:\nx")


def test_columns_that_are_not_read_are_named_once(tmp_path, caplog):
    rows = [{"input": "a", "output": "b", "system": "s", "id": number, "empty": ""} for number in (1, 2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        read_table_as_pairs(tmp_path / "a.jsonl")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith("columns that are not used: id, system")


def test_a_history_that_is_none_is_named_with_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "x", "output": "y", "history": "old"}))
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: column 'history' holds 'old'"):
        read_table_as_pairs(tmp_path / "a.jsonl")


def test_unknown_columns_name_the_one_that_is_lacking_first():
    with pytest.raises(ValueError, match=r"the columns 'answer', 'prompt': self-instruct would need 'completion' too"):
        detect_format(["prompt", "answer"])


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ('{"jobs": [{"name": "a", "dataset": "a.jsonl"}]}', "It is JSON: name the file .json"),
        ('[[jobs]]\nname = "a"\ndataset = "C:\\Users\\me\\a.jsonl"\n', "between single quotes"),
        ('[[jobs]]\nname = "a"\ndataset = "data\\train.jsonl"\n', "control characters.*between single quotes"),
        (
            '[[jobs]]\nname = "a"\n[grid]\ndataset = ["data\\notes.jsonl"]\n',
            "control characters.*between single quotes",
        ),
    ],
)
def test_a_jobs_file_in_another_form_is_told_what_to_change(tmp_path, text, advice):
    (tmp_path / "jobs.toml").write_text(text)
    with pytest.raises(ValueError, match=advice):
        read_jobs(tmp_path / "jobs.toml")


@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".json"])
def test_a_mark_before_a_jobs_file_is_no_key(tmp_path, suffix):
    texts = {
        ".toml": '[[jobs]]\nname = "a"\ndataset = "a.jsonl"\n',
        ".yaml": "jobs:\n  - name: a\n    dataset: a.jsonl\n",
    }
    text = texts.get(suffix, '{"jobs": [{"name": "a", "dataset": "a.jsonl"}]}')
    (tmp_path / f"jobs{suffix}").write_bytes(MARK + text.encode())
    assert [job.name for job in read_jobs(tmp_path / f"jobs{suffix}")] == ["a"]
