"""Files and hub names become seeded splits that share no row; every bad input gets one message that
says the fix."""

import csv
import json
import logging

import pytest
from datasets import Dataset, DatasetDict

from settings.parsing import parse_arguments
from text import hub, sources
from text.sources import load_splits
from text.spec import DataSpec
from training.setup import data_spec

PAIRS = [{"input": f"question {i}", "output": f"answer {i}"} for i in range(40)]


def arguments(dataset, **changes):
    return DataSpec(str(dataset), **{"eval_dataset_size": 8, "evaluate": True, **changes})


def given(dataset, words):
    """What is read of a command line of the trainer."""
    return data_spec(parse_arguments(["--dataset", str(dataset), "--eval_dataset_size", "8", *words.split()]), None)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def table(tmp_path):
    return write_jsonl(tmp_path / "data.jsonl", PAIRS)


def inputs(split):
    return list(split["input"])


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    rows = [{"input": 'two\nlines, "quoted"\tü', "output": "a\u2028b"}, *PAIRS[:3]]
    if suffix == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif suffix == "jsonl":
        write_jsonl(path, rows)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["input", "output"], delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    splits = load_splits(arguments(path, evaluate=False))
    assert list(splits.train) == rows
    assert (splits.evaluation, splits.test, splits.format) == (None, None, "input-output")
    assert "4 rows" in splits.source


def test_splits_are_disjoint_complete_and_seeded(table):
    splits = load_splits(arguments(table, test_dataset_size=5))
    parts = [inputs(part) for part in (splits.train, splits.evaluation, splits.test)]
    assert [len(part) for part in parts] == [27, 8, 5]
    assert sorted(sum(parts, [])) == sorted(row["input"] for row in PAIRS)
    again = load_splits(arguments(table, test_dataset_size=5))
    assert parts == [inputs(part) for part in (again.train, again.evaluation, again.test)]
    assert set(parts[1]) != set(inputs(load_splits(arguments(table, seed=1)).evaluation))
    assert parts[1] != inputs(load_splits(given(table, "--do_eval --seed 42 --data_seed 1")).evaluation)


def test_the_same_rows_evaluate_whatever_else_is_asked_for(table):
    expected = inputs(load_splits(arguments(table)).evaluation)
    assert inputs(load_splits(arguments(table, test_dataset_size=5)).evaluation) == expected
    alone = load_splits(arguments(table, train=False))
    assert alone.train is None
    assert inputs(alone.evaluation) == expected
    assert inputs(load_splits(given(table, "--seed 42 --do_predict")).evaluation) == expected


def test_fraction_and_truncation(table):
    splits = load_splits(arguments(table, eval_dataset_size=0.25, max_train_samples=7, max_eval_samples=3))
    full = load_splits(arguments(table, eval_dataset_size=0.25))
    assert (len(full.train), len(full.evaluation)) == (30, 10)
    assert inputs(splits.train) == inputs(full.train)[:7]
    assert inputs(splits.evaluation) == inputs(full.evaluation)[:3]


def test_a_copy_of_a_held_out_row_does_not_stay_in_train(tmp_path, caplog):
    path = write_jsonl(tmp_path / "twice.jsonl", PAIRS + PAIRS)
    with caplog.at_level(logging.WARNING):
        splits = load_splits(arguments(path, test_dataset_size=6))
    held_out = set(inputs(splits.evaluation)) | set(inputs(splits.test))
    assert held_out.isdisjoint(inputs(splits.train))
    assert "also held out" in caplog.text


def test_separate_held_out_file_is_used_whole_and_never_trained_on(tmp_path, table):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [*PAIRS[:4], {"input": "new", "output": "row"}])
    splits = load_splits(arguments(table, eval_dataset=str(held_out), eval_dataset_size=2))
    assert inputs(splits.evaluation) == [f"question {i}" for i in range(4)] + ["new"]
    assert inputs(splits.train) == [f"question {i}" for i in range(4, 40)]


def test_format_by_flag(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "p", "completion": "c", "text": 3}] * 2)
    splits = load_splits(arguments(path, dataset_format="self-instruct", evaluate=False))
    assert splits.format == "self-instruct"
    assert splits.train[0] == {"input": "p", "output": "c"}


HUB_ROWS = {
    "alpaca": {"instruction": "i", "input": "", "output": "o", "text": "t"},
    "alpaca-clean": {"instruction": "i", "input": "x", "output": "o"},
    "chip2": {"text": "<human>: q\n<bot>: o", "metadata": "m"},
    "self-instruct": {"prompt": "p", "completion": "o"},
    "hh-rlhf": {"chosen": "o", "rejected": "r"},
    "longform": {"input": "i", "output": "o", "source": "s", "subset": "u"},
    "oasst1": {"text": "o"},
}


@pytest.fixture
def fake_hub(monkeypatch):
    """Stands in for datasets.load_dataset; returns the requests it was given."""
    requests = []

    def load(path, name=None, data_files=None, cache_dir=None):
        requests.append((path, name, data_files))
        key = next(key for key, request in sources.HUB_DATASETS.items() if request["path"] == path)
        rows = [{column: f"{value} {i}" for column, value in HUB_ROWS[key].items()} for i in range(20)]
        splits = DatasetDict(train=Dataset.from_list(rows))
        if key == "longform":
            held_out = [{**row, "input": f"held {i}"} for i, row in enumerate(rows)]
            splits["validation"], splits["test"] = Dataset.from_list(held_out[:10]), Dataset.from_list(held_out[10:])
        return splits

    monkeypatch.setattr(hub, "load_dataset", load)
    return requests


@pytest.mark.parametrize("name", HUB_ROWS)
def test_every_hub_name_loads_in_its_format(fake_hub, name):
    splits = load_splits(arguments(name, eval_dataset_size=4))
    assert splits.format == name
    assert splits.train.column_names == ["input", "output"]
    assert len(splits.evaluation) == 4
    assert all("o" in output for output in splits.train["output"])
    request = sources.HUB_DATASETS[name]
    assert fake_hub == [(request["path"], request.get("name"), request.get("data_files"))]


def test_the_hubs_own_held_out_splits_are_used(fake_hub):
    splits = load_splits(arguments("longform", eval_dataset_size=4, test_dataset_size=3))
    assert (len(splits.train), len(splits.evaluation), len(splits.test)) == (20, 4, 3)
    assert all(text.startswith("held") for text in inputs(splits.evaluation) + inputs(splits.test))


def test_empty_answers_of_a_hub_set_are_left_out_and_said(monkeypatch, caplog):
    rows = [{"input": f"{i}", "output": "" if i == 3 else "o"} for i in range(10)]
    monkeypatch.setattr(hub, "load_dataset", lambda path, cache_dir: DatasetDict(train=Dataset.from_list(rows)))
    with caplog.at_level(logging.WARNING):
        splits = load_splits(arguments("some/set", evaluate=False))
    assert len(splits.train) == 9
    assert "1 rows with an empty output" in caplog.text


def test_a_repository_that_is_a_script_loads_from_the_hubs_tables(monkeypatch):
    requests = []

    def load(path, **options):
        requests.append((path, options))
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found self_instruct.py")
        return DatasetDict(train=Dataset.from_list([HUB_ROWS["self-instruct"]] * 3))

    monkeypatch.setattr(hub, "load_dataset", load)
    assert load_splits(arguments("self-instruct", evaluate=False)).train[0] == {"input": "p", "output": "o"}
    options = {"data_dir": "self_instruct", "revision": "refs/convert/parquet", "cache_dir": None}
    assert requests[1:] == [("yizhongw/self_instruct", options)]


@pytest.mark.parametrize("answers, reason", [(True, "ConnectionError: Couldn't reach"), (False, "it does not answer")])
def test_no_hub_says_what_to_do_offline(monkeypatch, answers, reason):
    def no_network(**_):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(hub, "load_dataset", no_network)
    monkeypatch.setattr(hub, "offline_if_unreachable", lambda: not answers)
    with pytest.raises(FileNotFoundError, match=f"tatsu-lab/alpaca.*{reason}.*Offline: .*--dataset_format"):
        load_splits(arguments("alpaca"))


def write_mmlu_folder(folder):
    """The authors' layout for one subject: 5 dev, 4 val and 6 test questions."""
    for split, count in (("dev", 5), ("val", 4), ("test", 6)):
        (folder / split).mkdir()
        rows = [f'"{split} question {i}, which?",one,two,three,four,C\n' for i in range(count)]
        (folder / split / f"college_physics_{split}.csv").write_text("".join(rows))


def test_mmlu_subject(tmp_path):
    write_mmlu_folder(tmp_path)
    splits = load_splits(
        arguments("mmlu", mmlu_dir=str(tmp_path), train_subject="college_physics", eval_dataset_size=1)
    )
    assert splits.format == "mmlu"
    assert (len(splits.train), len(splits.evaluation)) == (5 + 4, 6)
    assert all("about  college physics." in text for text in inputs(splits.train) + inputs(splits.evaluation))
    assert set(inputs(splits.train)).isdisjoint(inputs(splits.evaluation))


def test_mmlu_third_split_comes_out_of_the_test_questions(tmp_path):
    write_mmlu_folder(tmp_path)
    settings = dict(mmlu_dir=str(tmp_path), train_subject="college_physics")
    splits = load_splits(arguments("mmlu", test_dataset_size=2, **settings))
    assert (len(splits.train), len(splits.evaluation), len(splits.test)) == (9, 4, 2)
    whole = inputs(load_splits(arguments("mmlu", **settings)).evaluation)
    assert sorted(inputs(splits.evaluation) + inputs(splits.test)) == sorted(whole)


@pytest.mark.parametrize(
    "changes, cause",
    [
        ({"dataset_format": "alpka"}, "'alpka' is unknown.*did you mean 'alpaca'"),
        ({"dataset_format": "chip2"}, "needs the column.* 'text'; there are 'input', 'output'"),
        ({"eval_dataset_size": 40}, "hold out 40 rows, but there are only 40.*--eval_dataset_size 0.1"),
        ({"eval_dataset_size": 30, "test_dataset_size": 10}, "hold out 40 rows"),
        ({"eval_dataset_size": 0}, "evaluation split empty"),
        ({"eval_dataset_size": -3}, "--eval_dataset_size -3 is neither"),
        ({"eval_dataset_size": 1.5}, "--eval_dataset_size 1.5 is neither"),
        ({"max_train_samples": 0}, "--max_train_samples 0"),
        ({"train_subject": "anatomy"}, "--train_subject anatomy needs --dataset mmlu"),
    ],
)
def test_bad_flags(table, changes, cause):
    with pytest.raises(ValueError, match=cause):
        load_splits(arguments(table, **changes))


def test_all_bad_flags_are_told_at_once(table):
    with pytest.raises(ValueError) as raised:
        load_splits(arguments(table, dataset_format="x", eval_dataset_size=-1, max_eval_samples=0))
    for flag in ("--dataset_format", "--eval_dataset_size", "--max_eval_samples"):
        assert flag in str(raised.value)


@pytest.mark.parametrize(
    "name, content, cause",
    [
        ("a.jsonl", '{"input": "a", "output": "b"}\n{"input": "a", \n', "a.jsonl: broken JSON at line 2"),
        ("a.json", '[{"input": "a", "output": "b"},\n{"input" "a"}]', "a.json: broken JSON at line 2"),
        ("a.jsonl", "[1, 2]", "row 1: 1 is no object"),
        ("a.jsonl", "", "has no rows"),
        ("a.csv", "input,output\n", "has no rows"),
        ("a.csv", "input,output\na,b\na,b,c\n", "line 3: more cells than the 2 columns"),
        ("a.csv", "input,output\na\n", "line 2: column 'output' holds nothing"),
        ("a.jsonl", '{"input": "a", "output": 5}', r"line 1: column 'output' holds 5 \(int\)"),
        ("a.jsonl", '{"input": "a", "output": "b"}\n{"input": "a"}', "line 2: column 'output' holds nothing"),
        ("a.jsonl", '{"input": "a", "output": "b"}\n\n{"input": "a", "output": " "}', "empty output, first at line 3"),
        ("a.jsonl", '{"frage": "a", "antwort": "b"}', "no known format has the columns 'antwort', 'frage'"),
        ("a.parquet", "x", "unknown kind of file '.parquet'. Allowed: .json, .jsonl, .csv, .tsv"),
    ],
)
def test_bad_files(tmp_path, name, content, cause):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=cause):
        load_splits(arguments(tmp_path / name))


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl does not exist"):
        load_splits(arguments(tmp_path / "none.jsonl"))
    (tmp_path / "latin.csv").write_bytes(b"input,output\n\xfc,a\n")
    with pytest.raises(ValueError, match=r"latin.csv, line 2 is not UTF-8 text \(byte 13\)"):
        load_splits(arguments(tmp_path / "latin.csv"))


def test_misspelt_hub_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="'alpaca-claen' is unknown; did you mean 'alpaca-clean'"):
        load_splits(arguments("alpaca-claen"))
