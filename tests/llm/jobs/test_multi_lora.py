"""Many adapters over one base: each as if it were trained alone, stopped alone, resumed as if
nothing had happened."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from es_lora_llm import set_up
from multi_lora import Interrupted, main, train_jobs
from safetensors.torch import load_file

from adapters.fused_lora import FusedLora
from base.loading import load_base
from es_lora.history import read_history
from jobs.config import Job, read_jobs
from jobs.loop import FusedTraining
from settings.parsing import parse_arguments
from training.setup import base_spec

TREE = Path(__file__).resolve().parents[3] / "lora-llm"
TEMPLATES = sorted((TREE / "templates").glob("*.toml"))
STOPPING = {"stop_rule": "second-valley", "cs_interval": 1, "window_size": 2}  # one that stops runs as short as these


def job(name, files, **values):
    """A job of at most 6 epochs of 4 steps on 16 examples."""
    given = {
        "dataset": str(files["train"]),
        "rank": 4,
        "learning_rate": 5e-3,
        "batch_size": 4,
        "accumulation": 1,
        "epochs": 6,
    }
    return Job(name, **{**given, **STOPPING, **values})


def adapter_of(folder):
    return load_file(str(folder / "adapter_model.safetensors"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def losses_of(folder):
    return [(record["step"], record["loss"]) for record in read_history(folder).records]


# -------------------------------------------------------------------------------------- as if alone


@pytest.mark.parametrize("bits", (4, 32))
def test_a_job_in_company_has_the_losses_of_the_single_trainer(bits, random_base, text_files, tmp_path):
    """The first 20 steps, from the same A, in the same order, each loss to 1e-4; the company
    differs in all settings."""
    alone = tmp_path / "alone"
    flags = [
        "--model_name_or_path",
        str(random_base),
        "--dataset",
        str(text_files["train"]),
        "--output_dir",
        str(alone),
    ]
    flags += [
        "--bits",
        str(bits),
        "--lora_r",
        "4",
        "--learning_rate",
        "5e-3",
        "--per_device_train_batch_size",
        "3",
        "--use_cpu",
    ]
    flags += [
        "--gradient_accumulation_steps",
        "2",
        "--max_steps",
        "20",
        "--lr_scheduler_type",
        "cosine",
        "--optim",
        "adamw_torch",
    ]
    flags += ["--cs_interval", "1", "--window_size", "9", "--save_strategy", "no", "--gradient_checkpointing", "False"]
    settings = parse_arguments(flags)
    run = set_up(settings)
    fresh = FusedLora(load_base(base_spec(settings))).add("start", rank=4, alpha=16, seed=42).state_dict()
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(fresh[name.replace(".default", "")])
    run.trainer.train()
    single = losses_of(alone)

    common = {"batch_size": 3, "accumulation": 2, "max_steps": 20, "lr_scheduler_type": "cosine", "window_size": 9}
    company = [
        job("tested", text_files, **common),
        job("wide", text_files, rank=8, learning_rate=5e-2, batch_size=1, max_steps=9, seed=7),
        job(
            "attention", text_files, rank=1, target_modules="attention", train_on_source=True, dropout=0.2, max_steps=30
        ),
    ]
    train_jobs(company, random_base, tmp_path / "fused", bits=bits, use_cpu=True, say=lambda text: None)
    fused = losses_of(tmp_path / "fused" / "tested")
    assert [step for step, _ in fused] == [step for step, _ in single] == list(range(1, 21))
    assert [loss for _, loss in fused] == pytest.approx([loss for _, loss in single], abs=1e-4)
    assert fused[0][1] - fused[-1][1] > 0.05  # it has learned something


def test_a_job_has_its_own_number_of_its_rule(random_base, text_files, tmp_path):
    clocks = [
        job(f"epochs-{n}", text_files, stop_rule="fixed-epochs", rule_value=n, window_size="auto") for n in (1, 3)
    ]
    train_jobs(clocks, random_base, tmp_path, use_cpu=True, say=lambda text: None)
    assert [result_of(tmp_path / clock.name)["files"]["kept"]["step"] for clock in clocks] == [4, 12]
    with pytest.raises(ValueError, match="second-valley has no number to set"):
        train_jobs(
            [job("a", text_files, rule_value=2.0)], random_base, tmp_path / "none", use_cpu=True, say=lambda text: None
        )
    (problem,) = job("a", text_files, stop_rule="fixed-epochs", rule_value=-1).problems()
    assert (
        problem
        == "stop_rule fixed-epochs: the rule fixed-epochs was given -1; its number, epochs to train, must be above 0"
    )


# -------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(random_base, text_files, tmp_path_factory):
    """(output folder, exit code, what was said) of jobs that end in every way there is."""
    folder = tmp_path_factory.mktemp("jobs")
    nan = folder / "nan.jsonl"
    nan.write_text('{"input": "a", "output": "b"}\n{"input": "a", "output": NaN}\n')
    heldout = {"eval_dataset": str(text_files["heldout"])}
    entries = [
        {"name": "stops", **heldout, "evaluate_epochs": True},
        {"name": "full", "early_stop": False, **heldout},
        {"name": "short", "max_steps": 3, "rank": 2},
        {"name": "diverges", "learning_rate": 1e30},
        {"name": "nan", "dataset": str(nan)},
        {"name": "missing", "dataset": str(folder / "none.jsonl")},
        {"name": "stops", "rank": 1},
        {"name": "nowhere", "target_modules": ["c_attn"]},
        {"name": "averaged", "average": 0.25, **heldout},
        {"name": "average", "average": 0.25, "max_steps": 5, **heldout},
    ]
    defaults = {
        "dataset": str(text_files["train"]),
        "rank": 4,
        "learning_rate": 5e-3,
        "batch_size": 4,
        "accumulation": 1,
    }
    config = folder / "jobs.json"
    config.write_text(json.dumps({"defaults": {**defaults, "epochs": 6, **STOPPING}, "jobs": entries}))
    output = folder / "output"
    command = ["--base_model", str(random_base), "--config", str(config), "--output_dir", str(output), "--bits", "32"]
    done = run_program([sys.executable, str(TREE / "multi_lora.py"), *command, "--use_cpu", "--max_jobs", "3"])
    return output, done.returncode, done.stdout


def run_program(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False
    )


def test_each_job_leaves_what_a_single_run_leaves(finished):
    output = finished[0]
    stops, full, short = (result_of(output / name) for name in ("stops", "full", "short"))
    assert [stops["outcome"], full["outcome"], short["outcome"]] == [
        "stopped_early",
        "budget_reached",
        "no_turning_point",
    ]
    assert (
        stops["files"]["kept"]["step"] == stops["detected_step"] - (3 * 2 - 2)
        and stops["last_step"] == stops["detected_step"] < 24
    )
    assert full["last_step"] == 24 and full["keep_step"] == stops["keep_step"]
    left = {path.name for path in (output / "stops").iterdir()}
    assert left == {"adapter", "adapter-last", "cs_history.jsonl", "result.json", "report.html"}
    assert {path.name for path in (output / "full").iterdir()} >= {"adapter", "adapter-turning-point"}
    assert {path.name for path in (output / "short").iterdir()} == left - {"adapter-last"}
    kept = adapter_of(output / "stops" / "adapter")
    assert same(kept, adapter_of(output / "full" / "adapter-turning-point"))  # the same data, seed and settings
    assert not same(kept, adapter_of(output / "stops" / "adapter-last"))


def test_a_job_keeps_its_average(finished):
    output = finished[0]
    stops, averaged, short = (result_of(output / name) for name in ("stops", "averaged", "average"))
    assert averaged["outcome"] == "stopped_early" and averaged["keep_step"] == stops["keep_step"]
    assert averaged["files"]["kept"]["averaged"] and not averaged["files"]["last"]["averaged"]
    assert averaged["heldout"]["kept"] != stops["heldout"]["kept"]
    assert short["outcome"] == "no_turning_point" and short["files"]["last"]["path"] == "adapter-last"
    assert short["heldout"]["average"] not in (None, short["heldout"]["last"])


def test_the_kept_adapter_has_the_held_out_loss_that_is_reported(finished, random_base, text_files):
    """By peft's own loading and the single trainer's collator."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    from text.collator import CausalCollator

    rows = [json.loads(line) for line in text_files["heldout"].read_text().splitlines()]
    batch = CausalCollator(AutoTokenizer.from_pretrained(random_base), 1024, 256)(rows)
    heldout = result_of(finished[0] / "stops")["heldout"]
    for name, key in (("adapter", "kept"), ("adapter-last", "last")):
        model = AutoPeftModelForCausalLM.from_pretrained(finished[0] / "stops" / name, dtype=torch.float32)
        with torch.no_grad():
            assert heldout[key] == pytest.approx(model(**batch).loss.item(), rel=1e-4)
    history = dict(read_history(finished[0] / "stops").heldout())
    assert history[result_of(finished[0] / "stops")["files"]["kept"]["step"]] == heldout["kept"] and len(history) >= 3
    assert heldout["before"] > heldout["kept"]


def test_bad_jobs_are_told_and_the_others_end_as_if_nothing_had_happened(finished, random_base, text_files, tmp_path):
    output, code, said = finished
    assert code == 3 and "Traceback" not in said and "Warning" not in said
    assert result_of(output / "diverges")["outcome"] == "diverged" and "diverges: Training diverged at step" in said
    assert re.search(r"nan: not trained: .*nan.jsonl, line 2: .*", said)
    assert re.search(r"missing: not trained: the data file .*none.jsonl does not exist", said)
    assert "stops: not trained: another job has this name already; give each a name of its own" in said
    assert re.search(r"nowhere: not trained: .*no linear layer is called c_attn", said)
    assert not (output / "nan").exists() and not (output / "missing").exists()
    good = job("stops", text_files, eval_dataset=str(text_files["heldout"]), evaluate_epochs=True)
    train_jobs([good], random_base, tmp_path / "good", bits=32, use_cpu=True, say=lambda text: None)
    assert (
        result_of(tmp_path / "good" / "stops")["files"]["kept"]["step"]
        == result_of(output / "stops")["files"]["kept"]["step"]
    )
    alone = [loss for _, loss in losses_of(tmp_path / "good" / "stops")]
    assert [loss for _, loss in losses_of(output / "stops")] == pytest.approx(alone, abs=1e-4)


def test_the_diverged_job_keeps_its_last_finite_weights(finished):
    folder = finished[0] / "diverges"
    assert all(bool(tensor.isfinite().all()) for tensor in adapter_of(folder / "adapter").values())
    assert "finite" in result_of(folder)["verdict"]


def test_the_overview_has_a_row_for_every_job(finished):
    output, _, said = finished
    page, overview = (output / "overview.html").read_text(), json.loads((output / "overview.json").read_text())
    assert [entry["name"] for entry in overview["jobs"]][:4] == ["stops", "full", "short", "diverges"]
    assert page.count("<tr>") == 11 and page.count("<polyline") >= 2 and page.count("not trained: ") == 4
    for name in ("stops", "full", "short"):
        assert f'href="{name}/report.html"' in page and (output / name / "report.html").is_file()
    saved = [24 - result_of(output / name)["last_step"] for name in ("stops", "averaged")]
    assert f"{saved[0]} steps, about" in page and f"The early stops saved {sum(saved)} of" in said
    assert "try it:" in said and "overview.html" in said


# -------------------------------------------------------------------------- interrupted and resumed


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(random_base, text_files, tmp_path, monkeypatch):
    """Two slots, three jobs, dropout, a step of accumulation under way; stopped at three
    moments."""
    jobs = [
        job(
            "first", text_files, dropout=0.1, average=0.25, max_steps=6, eval_dataset=str(text_files["heldout"]), seed=5
        ),
        job(
            "second",
            text_files,
            batch_size=2,
            accumulation=3,
            lr_scheduler_type="linear",
            max_steps=7,
            early_stop=False,
        ),
        job("third", text_files, rank=2, max_steps=5, priority=-1),
    ]
    options = {"bits": 32, "use_cpu": True, "max_jobs": 2, "say": lambda text: None}
    train_jobs(jobs, random_base, tmp_path / "whole", **options)

    rounds, plain_round = [], FusedTraining._round

    def counted(training):
        plain_round(training)
        rounds.append(1)
        if len(rounds) in (2, 5, 13):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(FusedTraining, "_round", counted)
    for resume in (False, True, True):
        with pytest.raises(Interrupted):
            train_jobs(jobs, random_base, tmp_path / "parts", resume=resume, **options)
    overview = train_jobs(jobs, random_base, tmp_path / "parts", resume=True, **options)
    assert [entry["name"] for entry in overview["jobs"]] == ["first", "second", "third"]
    for name in ("first", "second", "third"):
        whole, parts = tmp_path / "whole" / name, tmp_path / "parts" / name
        assert same(adapter_of(whole / "adapter"), adapter_of(parts / "adapter"))
        assert read_history(whole).records == read_history(parts).records
        changing = ("seconds", "settings")
        known = {key: value for key, value in result_of(whole).items() if key not in changing}
        assert known == {key: value for key, value in result_of(parts).items() if key not in changing}
        assert not list(parts.glob("state-*"))


def test_ctrl_c_says_how_to_go_on_and_going_on_ends_the_run(random_base, text_files, tmp_path, capsys, monkeypatch):
    config = tmp_path / "jobs.json"
    entry = {
        "name": "one",
        "dataset": str(text_files["train"]),
        "rank": 2,
        "batch_size": 4,
        "accumulation": 1,
        "max_steps": 4,
    }
    config.write_text(json.dumps({"jobs": [entry]}))
    command = ["--base_model", str(random_base), "--config", str(config), "--output_dir", str(tmp_path / "out")]
    command += ["--bits", "32", "--use_cpu"]
    plain_round = FusedTraining._round
    monkeypatch.setattr(FusedTraining, "_round", lambda self: (plain_round(self), os.kill(os.getpid(), signal.SIGTERM)))
    assert main(command) == 130
    assert "--resume true" in capsys.readouterr().out
    monkeypatch.setattr(FusedTraining, "_round", plain_round)
    assert main([*command, "--resume", "true"]) == 0
    assert result_of(tmp_path / "out" / "one")["last_step"] == 4
    assert "one: goes on from step 1." in capsys.readouterr().out
    assert main(command) == 2 and "is not empty" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- limits


def test_passes_hold_no_more_rows_and_slots_than_allowed(random_base, text_files, tmp_path, monkeypatch):
    widths, plain = [], FusedTraining._losses

    def noted(training, runs, batches, weights):
        widths.append([len(batch) for batch in batches])
        return plain(training, runs, batches, weights)

    monkeypatch.setattr(FusedTraining, "_losses", noted)
    jobs = [
        job(f"job{index}", text_files, rank=1, batch_size=2, max_steps=1 + index, priority=int(index == 3))
        for index in range(4)
    ]
    said = []
    train_jobs(jobs, random_base, tmp_path / "out", bits=32, use_cpu=True, max_jobs=3, max_rows=4, say=said.append)
    assert max(map(sum, widths)) == 4 and max(map(len, widths)) == 2
    starts = [text.split(":")[0] for text in said if ": starts" in text]
    assert starts == ["job3", "job0", "job1", "job2"]
    assert widths[:2] == [[2], [2, 2]]  # three slots, four rows


def test_memory_is_bounded_before_anything_is_trained(random_base, text_files, tmp_path):
    jobs = [job("one", text_files, max_steps=1), job("two", text_files, max_steps=1)]
    options = {"bits": 32, "use_cpu": True, "say": lambda text: None}
    with pytest.raises(ValueError, match="the base alone takes"):
        train_jobs(jobs, random_base, tmp_path / "a", memory_gb=1e-4, **options)
    little_more = 1.01e-9 * (random_base / "model.safetensors").stat().st_size
    with pytest.raises(ValueError, match="one: it needs about .* GB beside the base"):
        train_jobs(jobs, random_base, tmp_path / "b", memory_gb=little_more, **options)
    overview = train_jobs(jobs, random_base, tmp_path / "c", memory_gb=1.0, **options)
    assert overview["summary"].startswith("2 jobs")


BAD_COMMANDS = {
    "--max_row 3": "--max_row is unknown; did you mean --max_rows?",
    "--bits 5": "--bits 5: choose 4, 8, 16 or 32",
    "--load_8bit true --bits 4": "contradict each other",
    "--max_rows 2": "job one: batch_size 4 is above --max_rows 2",
}


@pytest.mark.parametrize("words", BAD_COMMANDS)
def test_bad_flags_end_with_one_message_and_code_2(words, random_base, text_files, tmp_path, capsys):
    config = tmp_path / "jobs.json"
    config.write_text(json.dumps({"jobs": [{"name": "one", "dataset": str(text_files["train"]), "batch_size": 4}]}))
    command = [
        "--base_model",
        str(random_base),
        "--config",
        str(config),
        "--output_dir",
        str(tmp_path / "out"),
        *words.split(),
    ]
    assert main(command) == 2
    assert BAD_COMMANDS[words] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------- templates and processes


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_the_templates_run(template, random_base, tmp_path):
    """With two steps a job on a few examples; whole runs of them are measured in
    tests/benchmarks."""
    jobs = [replace(entry, max_steps=2, max_train_samples=8, max_eval_samples=3) for entry in read_jobs(template)]
    overview = train_jobs(jobs, random_base, tmp_path / "out", bits=32, use_cpu=True, say=lambda text: None)
    assert {result["outcome"] for result in overview["jobs"]} <= {"no_turning_point", "stopped_early"}
    assert set(overview["chosen"]) == {entry.group for entry in jobs if entry.group}
    chosen = overview["chosen"].get("kitchen")
    if chosen:
        losses = {
            result["name"]: result["heldout"]["last"] for result in overview["jobs"] if result["group"] == "kitchen"
        }
        assert chosen["name"] == min(losses, key=losses.get)


@pytest.mark.parametrize("together", (False, True))
def test_two_processes_train_as_one(together, random_base, text_files, tmp_path):
    """Spread: each job on one of two gloo processes. Together: one job, data-parallel,
    micro-batches of an odd number of rows."""
    entries = [
        {"name": "a", "batch_size": 3, "max_steps": 4},
        {"name": "b", "rank": 2, "batch_size": 2, "max_steps": 3},
    ]
    entries = entries[:1] if together else entries
    defaults = {
        "dataset": str(text_files["train"]),
        "rank": 4,
        "learning_rate": 5e-3,
        "accumulation": 2,
        "max_train_samples": 13,
    }
    defaults |= {"eval_dataset": str(text_files["heldout"]), "cs_interval": 1, "window_size": 2}
    config = tmp_path / "jobs.json"
    config.write_text(json.dumps({"defaults": defaults, "jobs": entries}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    command = ["--base_model", str(random_base), "--config", str(config), "--bits", "32", "--use_cpu", "--output_dir"]
    done = run_program([*launcher, str(TREE / "multi_lora.py"), *command, str(tmp_path / "two")])
    assert done.returncode == 0, done.stdout
    assert main([*command, str(tmp_path / "one")]) == 0
    for entry in entries:
        one, two = tmp_path / "one" / entry["name"], tmp_path / "two" / entry["name"]
        assert [loss for _, loss in losses_of(two)] == pytest.approx([loss for _, loss in losses_of(one)], abs=1e-5)
        assert result_of(two)["heldout"] == pytest.approx(result_of(one)["heldout"], abs=1e-4)
    overview = json.loads((tmp_path / "two" / "overview.json").read_text())
    assert [result["name"] for result in overview["jobs"]] == [entry["name"] for entry in entries]
    assert done.stdout.count("overview:") == 1 and all(
        done.stdout.count(f"{entry['name']}: starts") == 1 for entry in entries
    )
