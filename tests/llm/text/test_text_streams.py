"""--streaming, mixed data sets and Deep Lake: the same pairs as from a table, in shares, and what
ends a stream."""

import json
from collections import Counter

import pytest
from es_lora_llm import main

from text.sources import data_sources, load_splits
from text.spec import DataSpec
from text.streams import load_streamed_splits

PAIRS = [{"input": f"question {i}", "output": f"answer {i}"} for i in range(40)]


def arguments(dataset, **changes):
    return DataSpec(dataset, **{"eval_dataset_size": 8, **changes})


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def table(tmp_path):
    return write_jsonl(tmp_path / "data.jsonl", PAIRS)


def inputs(split):
    return [row["input"] for row in split]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_stream_has_every_row_once_in_an_order_of_the_seed(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, PAIRS)
    else:
        path.write_text("input,output\n" + "".join(f"{row['input']},{row['output']}\n" for row in PAIRS))
    stream = load_streamed_splits(arguments(str(path))).train
    assert sorted(inputs(stream)) == sorted(inputs(PAIRS)) and inputs(stream) != inputs(PAIRS)
    assert inputs(stream) == inputs(load_streamed_splits(arguments(str(path))).train)
    assert inputs(stream) != inputs(load_streamed_splits(arguments(str(path), seed=1)).train)


def test_the_head_of_a_stream_is_held_out_and_no_copy_of_it_stays(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [*PAIRS, PAIRS[0], PAIRS[9]])
    splits = load_streamed_splits(arguments(path, evaluate=True, test_dataset_size=4, max_train_samples=20))
    assert inputs(splits.evaluation) == inputs(PAIRS[:8]) and inputs(splits.test) == inputs(PAIRS[8:12])
    assert len(inputs(splits.train)) == 20 and not set(inputs(splits.train)) & set(inputs(PAIRS[:12]))


@pytest.mark.parametrize("load", [load_splits, load_streamed_splits], ids=["table", "stream"])
def test_weights_are_shares_and_no_row_comes_twice(tmp_path, load):
    many = write_jsonl(tmp_path / "many.jsonl", [{"input": f"many {i}", "output": "x"} for i in range(600)])
    few = write_jsonl(tmp_path / "few.jsonl", [{"prompt": f"few {i}", "completion": "y"} for i in range(600)])
    drawn = inputs(load(arguments([f"{many}:3", f"{few}:1"])).train)
    counts = Counter(text.split()[0] for text in drawn)
    assert len(set(drawn)) == len(drawn) and counts["many"] >= 598
    assert 0.2 < counts["few"] / len(drawn) < 0.3


def test_without_weights_all_rows_of_all_sets_are_taken(tmp_path, table):
    other = write_jsonl(tmp_path / "other.jsonl", [{"instruction": "say", "output": "this"}])
    splits = load_splits(arguments([table, other]))
    assert len(splits.train) == 41 and splits.format == "input-output, alpaca"


BAD = {
    "some weights": (["a.jsonl:0.5", "b.jsonl"], "give every data set a weight, or none"),
    "zero": (["a.jsonl:0", "b.jsonl:1"], "must be a number above 0"),
    "mmlu": (["mmlu", "b.jsonl"], "cannot be mixed"),
}


@pytest.mark.parametrize("case", BAD)
def test_mixtures_that_cannot_be_are_refused(case):
    given, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        data_sources(given)


def test_a_colon_in_a_name_is_no_weight():
    assert data_sources(["deeplake:/a/b", "c.jsonl"])[0].name == "deeplake:/a/b"
    assert data_sources(["deeplake:/a/b:0.5", "c.jsonl:2"])[0] == data_sources(["deeplake:/a/b:0.5", "x:1"])[0]


@pytest.mark.parametrize("load", [load_splits, load_streamed_splits], ids=["table", "stream"])
def test_a_local_deep_lake_set_gives_its_rows(tmp_path, load):
    deeplake = pytest.importorskip("deeplake", reason="deeplake is not installed; it is not needed to train")
    data = deeplake.create(str(tmp_path / "lake"))
    for column in ("input", "output"):
        data.add_column(column, "text")
    data.append({column: [row[column] for row in PAIRS] for column in ("input", "output")})
    data.commit()
    assert sorted(inputs(load(arguments(f"deeplake:{tmp_path / 'lake'}")).train)) == sorted(inputs(PAIRS))
    with pytest.raises(FileNotFoundError, match="Deep Lake cannot open it"):
        load(arguments(f"deeplake:{tmp_path / 'nowhere'}"))


@pytest.mark.parametrize(("name", "message"), [("no.jsonl", "does not exist"), ("data.json", "save it as jsonl")])
def test_what_cannot_be_streamed_is_refused(tmp_path, name, message):
    (tmp_path / "data.json").write_text(json.dumps(PAIRS))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_streamed_splits(arguments(str(tmp_path / name)))


def test_streams_need_weights_to_be_mixed_and_enough_rows_to_hold_out(table):
    with pytest.raises(ValueError, match="need weights to be mixed by"):
        load_streamed_splits(arguments([table, table]))
    with pytest.raises(ValueError, match="ends after 40 rows, but 50 are to be held out"):
        load_streamed_splits(arguments(table, evaluate=True, eval_dataset_size=50))


# --------------------------------------------------------------------------------------------- runs


def flags(base, data, output, *more):
    return [
        *(
            "--model_name_or_path",
            str(base),
            "--dataset",
            str(data),
            "--output_dir",
            str(output),
            "--bits",
            "32",
            "--use_cpu",
        ),
        *(
            "--lora_r",
            "4",
            "--learning_rate",
            "5e-3",
            "--per_device_train_batch_size",
            "4",
            "--gradient_accumulation_steps",
            "1",
        ),
        *("--gradient_checkpointing", "False", "--save_strategy", "no", "--streaming", "--max_steps", "12"),
        *("--stop_rule", "second-valley", "--cs_interval", "1", "--window_size", "2", *more),
    ]


def result_of(output):
    return json.loads((output / "result.json").read_text())


def test_the_end_of_a_stream_ends_the_run_unless_it_is_repeated(random_base, table, tmp_path):
    assert main(flags(random_base, table, tmp_path / "once")) == 0
    result = result_of(tmp_path / "once")
    assert result["last_step"] == 10 and "Trained to the end of the data, step 10 of 12" in result["verdict"]
    packed = ["--packing", "--seq_length", "128", "--packing_repeat", "--early_stop"]
    assert main(flags(random_base, table, tmp_path / "again", *packed)) == 0
    result = result_of(tmp_path / "again")
    assert (result["outcome"], result["last_step"]) in [
        ("stopped_early", result["detected_step"]),
        ("no_turning_point", 12),
    ]
    assert result["last_step"] > 5  # 40 short samples fill fewer than 20 sequences


def test_a_broken_row_in_the_stream_is_named_with_code_2(random_base, table, tmp_path, capsys):
    with open(table, "a", encoding="utf-8") as file:
        file.write('{"input": "a", "output": 3}\n')
    assert main(flags(random_base, table, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert (
        "data.jsonl, line 41: column 'output' holds 3 (int) where text is needed" in error and "Traceback" not in error
    )


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_a_stream_leaves_out_and_cuts_is_counted_at_the_end(random_base, tmp_path, capsys, workers):
    short, late = {"input": "q", "output": "a"}, {"input": "word " * 60, "output": "a"}
    rows = [short] * 6 + [late] * 3 + [{"input": "q", "output": "a " * 60}] * 2 + [{"input": "q", "output": " "}]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    more = ["--packing", "--seq_length", "32", "--dataloader_num_workers", workers]
    assert main(flags(random_base, data, tmp_path / "run", *more)) == 0
    told = capsys.readouterr().out
    assert "Left out: 1 rows of the stream, whose answer is empty." in told
    assert "Left out: 3 of 11 examples read of the stream, whose answer lies behind the cut; raise --seq_length" in told
    assert "Cut off: 5 of 11 examples read of the stream. The longest has " in told


def test_a_stream_of_which_all_fits_says_nothing_of_it(random_base, table, tmp_path, capsys):
    assert main(flags(random_base, table, tmp_path / "run")) == 0
    told = capsys.readouterr().out
    assert "Left out" not in told and "Cut off" not in told
