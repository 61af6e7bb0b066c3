"""The trainer end to end, on a random two-layer model: what it keeps, resumes, refuses and leaves
behind."""

import json
import signal
import socket
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from cs_replay import main as replay_main
from es_lora_llm import main
from generate_text import run_adapters
from literal_average import is_average
from safetensors import safe_open
from short_runs import ENVIRONMENT, PROGRAM, adapter_of, flags, result_of, same, start
from two_processes import in_two_processes

from es_lora.history import read_history


@pytest.fixture(scope="module")
def stopped(random_base, text_files, tmp_path_factory):
    """One early-stopped run that saved a checkpoint at every step and evaluated at every epoch."""
    output = tmp_path_factory.mktemp("runs") / "stopped"
    more = [
        "--early_stop",
        "--lora_dropout",
        "0.1",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--save_total_limit",
        "60",
    ]
    more += ["--do_eval", "--eval_dataset", str(text_files["heldout"]), "--eval_strategy", "epoch"]
    more += ["--report_to", "tensorboard", "--logging_dir", str(output / "runs")]
    assert main(flags(random_base, text_files, output, *more)) == 0
    return output


def test_the_kept_adapter_is_bit_for_bit_the_checkpoint_of_the_turning_step(stopped):
    result = result_of(stopped)
    assert result["outcome"] == "stopped_early"
    assert result["files"]["kept"]["step"] == result["detected_step"] - (3 * 2 - 2)
    assert result["last_step"] == result["detected_step"] < result["total_steps"] == 24
    kept, last = adapter_of(stopped / "adapter"), adapter_of(stopped / "adapter-last")
    assert same(kept, adapter_of(stopped / f"checkpoint-{result['files']['kept']['step']}"))
    assert same(last, adapter_of(stopped / f"checkpoint-{result['last_step']}"))
    assert not same(kept, last)


def test_the_losses_reported_are_those_of_the_weights_named(stopped, random_base, text_files):
    """Recomputed from the saved adapters by another route: peft's own loading and a plain forward
    pass."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    from text.collator import CausalCollator

    tokenizer = AutoTokenizer.from_pretrained(random_base)
    rows = [json.loads(line) for line in text_files["heldout"].read_text().splitlines()]
    batch = CausalCollator(tokenizer, 1024, 256)(rows)
    for name, key in (("adapter", "kept"), ("adapter-last", "last")):
        model = AutoPeftModelForCausalLM.from_pretrained(stopped / name, dtype=torch.float32)
        with torch.no_grad():
            loss = model(**batch).loss.item()
        assert result_of(stopped)["heldout"][key] == pytest.approx(loss, rel=1e-3)


def test_the_adapter_loads_with_peft_and_generates(stopped, random_base):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model, tokenizer = (
        AutoPeftModelForCausalLM.from_pretrained(stopped / "adapter"),
        AutoTokenizer.from_pretrained(random_base),
    )
    inputs = tokenizer("how do i keep rice", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 5


def test_the_verdict_travels_in_the_adapters_metadata(stopped):
    with safe_open(str(stopped / "adapter" / "adapter_model.safetensors"), framework="pt") as handle:
        facts = json.loads(handle.metadata()["es_lora"])
    result = result_of(stopped)
    assert facts["keep_step"] == result["files"]["kept"]["step"] and facts["detected_step"] == result["detected_step"]
    assert facts["reason"] == result["reason"] and facts["outcome"] == "stopped_early"


def test_the_run_leaves_history_report_result_and_no_snapshots(stopped, capsys):
    history, result = read_history(stopped), result_of(stopped)
    assert [record["step"] for record in history.records] == list(range(1, result["last_step"] + 1))
    assert all(record["loss"] is not None and record["lr"] == 5e-3 for record in history.records)
    assert [e["step"] for e in history.events if e["event"] == "turning_point"] == [result["files"]["kept"]["step"]]
    assert dict(history.heldout())[result["files"]["kept"]["step"]] == pytest.approx(result["heldout"]["kept"])
    assert dict(history.heldout())[result["last_step"]] == pytest.approx(result["heldout"]["last"])
    assert not (stopped / "cs_snapshots").exists()
    page = (stopped / "report.html").read_text()
    assert "<svg" in page and "Stopped early at step" in page and "before training" in page
    assert {"versions", "seed", "settings", "trainable_parameters"} <= result.keys()
    assert replay_main([str(stopped), "--rule", "recorded", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert (replayed["turning_step"], replayed["stop_step"]) == (
        result["files"]["kept"]["step"],
        result["detected_step"],
    )


def test_tensorboard_has_the_published_names(stopped):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stopped / "runs"))
    events.Reload()
    logged = {scalar.step: scalar.value for scalar in events.Scalars("cs/steps")}
    for record in read_history(stopped).records:
        assert logged[record["step"]] == pytest.approx(record["cs"]["lm"], rel=1e-5)
    assert events.Scalars("cs_fluctuation/step")


AVERAGED = ["--average", "0.25", "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "60"]


def step_adapters(output, last):
    return [adapter_of(output / f"checkpoint-{step}") for step in range(1, last + 1)]


@pytest.fixture(scope="module")
def averaged(random_base, text_files, tmp_path_factory):
    """An early-stopped run that keeps an average, and saved a checkpoint at every step."""
    output = tmp_path_factory.mktemp("runs") / "averaged"
    more = ["--early_stop", *AVERAGED, "--do_eval", "--eval_dataset", str(text_files["heldout"])]
    assert main(flags(random_base, text_files, output, *more)) == 0
    return output


def test_the_kept_adapter_is_the_average_of_the_steps_own_files(averaged):
    result = result_of(averaged)
    assert result["outcome"] == "stopped_early" and result["average"] == 0.25
    steps = step_adapters(averaged, result["last_step"])
    assert is_average(adapter_of(averaged / "adapter"), steps[: result["keep_step"]], 0.25)
    assert same(adapter_of(averaged / "adapter-last"), steps[-1])
    assert {what: entry["averaged"] for what, entry in result["files"].items()} == {"kept": True, "last": False}
    assert "The averaged weights of the turning point" in result["verdict"]
    with safe_open(str(averaged / "adapter" / "adapter_model.safetensors"), framework="pt") as handle:
        assert json.loads(handle.metadata()["es_lora"])["averaged"] is True


def test_averaging_changes_nothing_in_the_training(averaged, random_base, text_files, tmp_path):
    more = ["--early_stop", "--average", "0", "--do_eval", "--eval_dataset", str(text_files["heldout"])]
    assert main(flags(random_base, text_files, tmp_path / "single", *more)) == 0
    single, result = result_of(tmp_path / "single"), result_of(averaged)
    assert single["keep_step"] == result["keep_step"] and single["average"] == 0
    assert read_history(tmp_path / "single").records == read_history(averaged).records
    assert same(adapter_of(tmp_path / "single" / "adapter"), adapter_of(averaged / f"checkpoint-{single['keep_step']}"))
    assert single["heldout"]["last"] == result["heldout"]["last"]
    assert single["heldout"]["kept"] != result["heldout"]["kept"]


@pytest.mark.parametrize("early_stop", [True, False])
def test_at_the_end_of_the_budget_the_average_is_kept_and_the_last_step_lies_beside_it(
    random_base, text_files, tmp_path, early_stop
):
    output = tmp_path / "run"
    more = ["--early_stop", "--max_steps", "5"] if early_stop else []
    more += ["--do_eval", "--eval_dataset", str(text_files["heldout"])]
    assert main(flags(random_base, text_files, output, *AVERAGED, *more)) == 0
    result = result_of(output)
    steps = step_adapters(output, result["last_step"])
    assert result["outcome"] == ("no_turning_point" if early_stop else "budget_reached")
    assert is_average(adapter_of(output / "adapter"), steps, 0.25)
    assert same(adapter_of(output / "adapter-last"), steps[-1])
    assert result["heldout"]["average"] not in (None, result["heldout"]["last"])
    found = ["turning point"] * (not early_stop) + ["average", "last"]
    assert list(run_adapters(str(output / "adapter"))) == found
    if early_stop:
        assert f"{result['heldout']['average']:.4f} there" in result["verdict"]
    else:
        assert is_average(adapter_of(output / "adapter-turning-point"), steps[: result["keep_step"]], 0.25)
        assert result["heldout"]["kept"] is not None


def test_a_held_out_loss_decides_by_the_average(random_base, text_files, tmp_path):
    more = ["--early_stop", "--average", "0.4", "--stop_rule", "validation-patience", "--rule_value", "2"]
    more += ["--eval_dataset", str(text_files["heldout"]), "--do_eval", "--learning_rate", "3e-2"]
    assert main(flags(random_base, text_files, tmp_path / "run", *more)) == 0
    records, result = read_history(tmp_path / "run").records, result_of(tmp_path / "run")
    losses = {record["step"]: record["heldout_loss_average"] for record in records}
    assert result["keep_step"] == min(losses, key=losses.get)
    assert result["heldout"]["kept"] == pytest.approx(losses[result["keep_step"]], abs=1e-4)
    assert all(record["heldout_loss"] is not None for record in records)


def test_an_optimizer_that_averages_itself_is_told(random_base, text_files, tmp_path, capsys):
    more = ["--early_stop", "--average", "0.25", "--optim", "schedule_free_adamw"]
    assert main(flags(random_base, text_files, tmp_path / "run", *more)) == 2
    assert "schedule_free_adamw averages its weights itself; give --average 0" in capsys.readouterr().err


def test_an_optimizer_whose_package_is_missing_is_one_message(random_base, text_files, tmp_path, capsys):
    assert main(flags(random_base, text_files, tmp_path / "run", "--optim", "schedule_free_adamw")) == 2
    told = capsys.readouterr().err
    assert "pip install schedulefree" in told and "Traceback" not in told


def test_without_early_stop_the_full_run_is_kept_and_the_turning_point_lies_beside_it(
    stopped, random_base, text_files, tmp_path
):
    output = tmp_path / "full"
    assert main(flags(random_base, text_files, output, "--lora_dropout", "0.1")) == 0
    result, earlier = result_of(output), result_of(stopped)
    assert (result["outcome"], result["last_step"], result["files"]["kept"]["step"]) == ("budget_reached", 24, 24)
    assert (result["keep_step"], result["detected_step"]) == (
        earlier["files"]["kept"]["step"],
        earlier["detected_step"],
    )
    assert same(adapter_of(output / "adapter-turning-point"), adapter_of(stopped / "adapter"))
    assert not same(adapter_of(output / "adapter"), adapter_of(output / "adapter-turning-point"))


def test_no_decision_leaves_one_adapter_and_says_so(random_base, text_files, tmp_path, capsys):
    output = tmp_path / "short"
    assert main(flags(random_base, text_files, output, "--early_stop", "--max_steps", "5")) == 0
    assert result_of(output)["outcome"] == "no_turning_point"
    assert sorted(path.name for path in output.glob("adapter*")) == ["adapter"]
    screen = capsys.readouterr().out
    assert "too short for the rule second-valley" in screen and "No evidence of overfitting yet" in screen


def test_measuring_changes_nothing_in_the_training(random_base, text_files, tmp_path):
    for name, more in (("with", []), ("without", ["--calculate_cs", "False"])):
        assert (
            main(flags(random_base, text_files, tmp_path / name, "--max_steps", "6", "--lora_dropout", "0.1", *more))
            == 0
        )
    assert same(adapter_of(tmp_path / "with" / "adapter"), adapter_of(tmp_path / "without" / "adapter"))
    assert not (tmp_path / "without" / "cs_history.jsonl").exists()


def test_accumulation_gives_the_same_trajectory_as_the_batch_at_once(random_base, text_files, tmp_path):
    series = []
    for batch, accumulation in ((4, 1), (1, 4)):
        more = ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
        output = tmp_path / f"batch-{batch}"
        assert main(flags(random_base, text_files, output, "--group_by_length", "False", *more)) == 0
        series.append([(r["step"], r["cs"]["lm"], r["loss"]) for r in read_history(output).records])
    assert [row[0] for row in series[0]] == [row[0] for row in series[1]] == list(range(1, 25))
    for at_once, accumulated in zip(*series):
        assert accumulated[1:] == pytest.approx(at_once[1:], rel=2e-3, abs=1e-6)


# ----------------------------------------------------------------------------- kills and resumption


def wait_for(path, process, timeout_sec=120):
    end = time.monotonic() + timeout_sec
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.stdout.read()
        time.sleep(0.005)


LONG = [
    "--early_stop",
    "--stop_rule",
    "nth-valley",
    "--valley",
    "5",
    "--num_train_epochs",
    "25",
    "--lora_dropout",
    "0.1",
]
LONG += ["--save_strategy", "steps", "--save_steps", "3", "--average", "0.25"]


@pytest.fixture(scope="module")
def uninterrupted(random_base, text_files, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert main(flags(random_base, text_files, output, *LONG)) == 0
    assert result_of(output)["outcome"] == "stopped_early"
    return output


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, random_base, text_files, tmp_path, number, code):
    output = tmp_path / "run"
    process = start(flags(random_base, text_files, output, *LONG))
    wait_for(output / "checkpoint-9" / "cs_state.json", process)
    process.send_signal(number)
    screen = process.communicate()[0]
    assert process.returncode == code, screen
    assert not (output / "adapter").exists()
    if number == signal.SIGINT:
        assert result_of(output)["outcome"] == "interrupted" and "--resume_from_checkpoint true" in screen
    assert main(flags(random_base, text_files, output, *LONG, "--resume_from_checkpoint", "true")) == 0
    mine, theirs = result_of(output), result_of(uninterrupted)
    for key in ("outcome", "keep_step", "detected_step", "last_step", "reason"):
        assert mine[key] == theirs[key]
    for name in ("adapter", "adapter-last"):
        assert same(adapter_of(output / name), adapter_of(uninterrupted / name))
    assert (output / "cs_history.jsonl").read_text() == (uninterrupted / "cs_history.jsonl").read_text()


def test_processes_with_different_examples_are_told_before_the_first_step(random_base, text_files, tmp_path):
    words = [str(PROGRAM), *flags(random_base, text_files, tmp_path / "run", "--ddp_backend", "gloo")]
    ended = in_two_processes(words, [*words, "--dataset", str(text_files["heldout"])])
    for code, said in ended:
        assert code == 2 and "the processes do not have the same training examples" in said and "Traceback" not in said
    assert not (tmp_path / "run" / "cs_history.jsonl").exists()


def test_a_process_that_dies_is_one_message_on_the_other(random_base, text_files, tmp_path):
    words = [str(PROGRAM), *flags(random_base, text_files, tmp_path / "run", "--ddp_backend", "gloo")]
    dies = (
        "import os, sys; sys.path.insert(0, os.path.dirname(sys.argv[1])); import es_lora_llm as program\n"
        "step = program.LoraTrainer.training_step\n"
        "def training_step(self, *words, **more):\n"
        "    if self.state.global_step == 3: os._exit(9)\n"
        "    return step(self, *words, **more)\n"
        "program.LoraTrainer.training_step = training_step\n"
        "sys.exit(program.main(sys.argv[2:]))"
    )
    (code, said), (died, _) = in_two_processes(words, ["-c", dies, *words])
    assert died == 9 and code == 1
    told = [line for line in said.splitlines() if line.startswith("es_lora_llm:")]
    assert len(told) == 1 and "another process of this run has ended" in told[0] and "Traceback" not in said


def test_two_processes_stop_together(random_base, text_files, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = tmp_path / "two"
    more = ["--early_stop", "--per_device_train_batch_size", "2", "--ddp_backend", "gloo", "--shadows", "1"]
    more += ["--do_eval", "--eval_dataset", str(text_files["heldout"]), "--average", "0.25"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(port),
        str(PROGRAM),
    ]
    done = subprocess.run(
        [*command, *flags(random_base, text_files, output, *more)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = result_of(output)
    assert result["outcome"] == "stopped_early" and result["last_step"] == result["detected_step"] < 24
    records = read_history(output).records
    assert [r["step"] for r in records] == list(range(1, result["last_step"] + 1))
    assert records[0]["shadow_loss_average"] > records[-1]["shadow_loss_average"] > 0
    assert done.stdout.count("Stopped early at step") == 1
    assert result["heldout"]["kept"] != result["heldout"]["last"]


@pytest.mark.parametrize("more", [["--early_stop"], ["--calculate_cs", "False"]], ids=["weights", "loss"])
def test_divergence_ends_with_code_3_and_finite_weights_only(random_base, text_files, tmp_path, capsys, more):
    output = tmp_path / "diverged"
    more = [*more, "--learning_rate", "1e30", "--max_grad_norm", "0"]
    assert main(flags(random_base, text_files, output, *more)) == 3
    assert result_of(output)["outcome"] == "diverged"
    assert "Training diverged at step" in capsys.readouterr().out
    for folder in output.glob("adapter*"):
        assert all(tensor.isfinite().all() for tensor in adapter_of(folder).values())


# ------------------------------------------------------------------------------------ ways to train


@pytest.mark.parametrize(
    "more",
    [
        ["--bits", "4"],
        ["--bits", "4", "--bf16", "--gradient_checkpointing", "True", "--optim", "paged_adamw_8bit"],
        ["--bits", "8", "--adam8bit"],
        ["--bits", "16", "--bf16", "--optim", "adamw_torch"],
        ["--bits", "16", "--optim", "lion_8bit", "--lora_modules", "attention", "--lora_bias", "lora_only"],
        ["--bits", "4", "--quant_type", "fp4", "--double_quant", "False", "--cs_reduction", "matrix"],
    ],
    ids=lambda more: " ".join(more),
)
def test_bits_and_optimizers(random_base, text_files, tmp_path, more):
    output = tmp_path / "run"
    assert main(flags(random_base, text_files, output, "--max_steps", "4", *more)) == 0
    records = read_history(output).records
    assert len(records) == 4 and all(record["cs"]["lm"] != 0 for record in records)
    assert all(tensor.isfinite().all() for tensor in adapter_of(output / "adapter").values())


def test_full_finetune_saves_a_model(random_base, text_files, tmp_path):
    from transformers import AutoModelForCausalLM

    output = tmp_path / "full"
    assert main(flags(random_base, text_files, output, "--full_finetune", "--max_steps", "3")) == 0
    trained = AutoModelForCausalLM.from_pretrained(output / "model").state_dict()
    before = AutoModelForCausalLM.from_pretrained(random_base).state_dict()
    assert all(not torch.equal(trained[name], before[name]) for name in trained if "proj" in name)
    assert result_of(output)["files"] == {"kept": {"path": "model", "step": 3, "averaged": False}}


def test_a_third_split_is_scored_once_and_predictions_are_written(random_base, text_files, tmp_path):
    output = tmp_path / "splits"
    more = [
        "--do_eval",
        "--eval_dataset_size",
        "3",
        "--test_dataset_size",
        "4",
        "--do_predict",
        "--max_new_tokens",
        "4",
    ]
    assert main(flags(random_base, text_files, output, "--max_steps", "2", *more)) == 0
    assert result_of(output)["test_loss"] > 0
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    inputs = {json.loads(line)["input"] for line in text_files["train"].read_text().splitlines()}
    assert len(predictions) == 4 and {row["input"] for row in predictions} <= inputs
    assert all(isinstance(row["prediction"], str) for row in predictions)


def test_mmlu_by_subject_is_scored_before_and_after(random_base, text_files, tmp_path):
    folder = tmp_path / "mmlu"
    for split, count in (("dev", 5), ("val", 6), ("test", 7)):
        (folder / "data" / split).mkdir(parents=True)
        rows = "".join(f"question {split} {i}?,one,two,three,four,{'ABCD'[i % 4]}\n" for i in range(count))
        (folder / "data" / split / f"college_physics_{split}.csv").write_text(rows)
    with tarfile.open(folder / "data.tar", "w") as archive:
        archive.add(folder / "data", "data")
    output = tmp_path / "run"
    more = ["--dataset", "mmlu", "--train_subject", "college_physics", "--mmlu_dir", str(folder), "--do_mmlu_eval"]
    more += ["--mmlu_dataset", "mmlu-zs", "--mmlu_split", "test", "--do_eval", "--eval_strategy", "epoch"]
    more += ["--num_train_epochs", "1"]
    assert main(flags(random_base, text_files, output, *more)) == 0
    scores = result_of(output)["mmlu"]
    assert scores[0]["when"] == "baseline" and scores[-1]["when"] == "end"
    assert all(score["count"] == 7 and 0 <= score["accuracy"] <= 1 for score in scores)
    assert set(scores[-1]["per_subject"]) == {"college_physics"}


# ---------------------------------------------------------------------------------- what is refused


BAD = {
    "unknown flag": (["--learning_rat", "1"], "did you mean --learning_rate?"),
    "dropped flag": (["--sharded_ddp", "simple"], "--sharded_ddp is not supported"),
    "bits": (["--bits", "5"], "choose 4, 8, 16 or 32"),
    "rank": (["--lora_r", "0"], "the rank must be at least 1"),
    "window": (["--window_size", "0"], "give a number of 1 or more, or auto"),
    "interval": (["--cs_interval", "often"], "--cs_interval often: give a number"),
    "rule": (["--stop_rule", "third-valley"], "choose one of second-valley, nth-valley"),
    "valley": (["--valley", "3"], "use the rule nth-valley"),
    "full finetune": (["--full_finetune", "--early_stop"], "CS needs a LoRA"),
    "not a number": (["--learning_rate", "fast"], "'fast' is no number"),
    "negative rate": (["--learning_rate", "-1"], "must be above 0"),
    "no such data": (["--dataset", "nowhere/notes.jsonl"], "nowhere/notes.jsonl"),
    "empty data": (["--dataset", "{folder}/empty.jsonl"], "empty.jsonl"),
    "broken line": (["--dataset", "{folder}/broken.jsonl"], "line 2"),
    "missing column": (["--dataset", "{folder}/columns.jsonl"], "output"),
    "unknown format": (["--dataset_format", "alpacca"], "alpaca"),
    "no such model": (["--model_name_or_path", "./nowhere"], "there is no such folder"),
    "no model in folder": (["--model_name_or_path", "{folder}"], "holds no config.json"),
    "layer name": (["--lora_modules", "q_prog"], "there are down_proj"),
    "held-out too large": (["--do_eval", "--eval_dataset_size", "400"], "400"),
    "nothing to resume": (["--resume_from_checkpoint", "true"], "holds no complete checkpoint"),
    "subject": (["--dataset", "mmlu", "--train_subject", "physics", "--mmlu_dir", "{folder}"], "mmlu"),
    "disk": (["--snapshot_disk_gb", "0"], "must be above 0"),
    "best model": (
        [
            "--load_best_model_at_end",
            "--save_strategy",
            "epoch",
            "--eval_strategy",
            "epoch",
            "--eval_dataset_size",
            "4",
        ],
        "keeps the turning point or the last step",
    ),
}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"input": "a", "output": "b"}\n{"input": "a", "out\n')
    (folder / "columns.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_message_and_code_2(random_base, text_files, tmp_path, bad_folder, capsys, case):
    more, message = BAD[case]
    arguments = flags(random_base, text_files, tmp_path / "run", *[word.format(folder=bad_folder) for word in more])
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert error[-1].startswith("es_lora_llm: ") and message in error[-1]
    assert not any("Traceback" in line for line in error)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_an_earlier_run_is_not_written_over_unless_asked_for(random_base, text_files, tmp_path, capsys):
    arguments = flags(random_base, text_files, tmp_path / "run", "--max_steps", "2")
    assert main(arguments) == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert main(arguments) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert main([*arguments, "--overwrite_output_dir", "--seed", "5"]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() != before
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_the_screen_of_a_run_is_clean_and_ends_with_the_next_command(random_base, text_files, tmp_path_factory):
    output = tmp_path_factory.mktemp("clean")
    process = start(flags(random_base, text_files, output, "--bits", "4", "--early_stop", "--max_steps", "3"))
    screen = process.communicate(timeout=300)[0]
    assert process.returncode == 0, screen
    assert "warn" not in screen.lower()
    lines = screen.strip().splitlines()
    assert lines[-1].startswith("try it: ") and any(
        line.startswith("Trained to its budget of 3 steps") for line in lines
    )


def test_resuming_another_runs_checkpoint_does_not_touch_the_run_in_the_output_folder(
    uninterrupted, random_base, text_files, tmp_path, capsys
):
    assert main(flags(random_base, text_files, tmp_path / "mine", "--max_steps", "2")) == 0
    before = (tmp_path / "mine" / "cs_history.jsonl").read_bytes()
    arguments = flags(
        random_base, text_files, tmp_path / "mine", "--resume_from_checkpoint", str(uninterrupted / "checkpoint-9")
    )
    assert main(arguments) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert (tmp_path / "mine" / "cs_history.jsonl").read_bytes() == before
