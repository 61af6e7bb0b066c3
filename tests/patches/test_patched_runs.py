"""The synthetic trainers, patched by the tool and trained for real."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from types import SimpleNamespace

import apply_patches
import pytest
import torch
from checkouts import BESIDE, SCRIPTS, commit, make_checkout
from literal_average import is_average
from safetensors import safe_open
from safetensors.torch import load_file

STOP = ["--early_stop", "--stop_rule", "second-valley", "--cs_interval", "1", "--window_size", "2"]


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory):
    """{(upstream, "plain" or "patched"): folder}"""
    made, root = {}, tmp_path_factory.mktemp("checkouts")
    for upstream in SCRIPTS:
        for kind in ("plain", "patched"):
            made[upstream, kind] = make_checkout(upstream, root / f"{upstream}-{kind}")
        commit(made[upstream, "patched"])
        assert apply_patches.main([str(made[upstream, "patched"]), "--yes"]) == 0
    return made


def train(folder, *flags):
    """Run a checkout's script as `python script.py flags` would, in this process: starting one
    takes seconds."""
    upstream = next(name for name, script in SCRIPTS.items() if (folder / script).exists())
    script, beside = str(folder / SCRIPTS[upstream]), str(folder / BESIDE[upstream])
    own = ("library", "networks", "musubi_tuner")
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        patch.syspath_prepend(beside)
        for name in [name for name in sys.modules if name.split(".")[0] in own]:
            patch.delitem(sys.modules, name)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                code = end.code
    for name in [name for name in sys.modules if name.split(".")[0] in own]:
        del sys.modules[name]
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def losses(done):
    return [line for line in done.stdout.split("\n") if line.startswith("loss")]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def step_file(folder, step):
    return load_file(folder / f"lora-step{step:08d}.safetensors")


@pytest.fixture(scope="module")
def full(checkouts, tmp_path_factory):
    """The unpatched training to its end, every step saved."""
    folder = tmp_path_factory.mktemp("full")
    return folder, train(checkouts["sd-scripts", "plain"], "--output_dir", folder, "--save_every_n_steps", 1)


def test_stop_leaves_both_loops_and_keeps_the_weights_of_the_turning_point(checkouts, full, tmp_path):
    plain_folder, plain = full
    done = train(checkouts["sd-scripts", "patched"], "--output_dir", tmp_path, *STOP)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "lora-es-lora" / "result.json").read_text())
    kept, last = result["keep_step"], result["last_step"]
    assert result["outcome"] == "stopped_early" and kept < last < 40
    assert losses(done) == losses(plain)[:last]
    assert "the end" in done.stdout and f"end of epoch {-(-last // 8)}" in done.stdout
    assert f"end of epoch {-(-last // 8) + 1}" not in done.stdout
    assert same(load_file(tmp_path / "lora.safetensors"), step_file(plain_folder, kept))
    assert same(load_file(tmp_path / "lora-last.safetensors"), step_file(plain_folder, last))
    with safe_open(tmp_path / "lora.safetensors", "pt") as handle:
        metadata = handle.metadata()
    assert metadata["ss_steps"] == str(kept) and metadata["ss_epoch"] == str(-(-kept // 8))
    assert metadata["es_lora_step"] == metadata["es_lora_keep_step"] == str(kept)
    assert metadata["es_lora_detected_step"] == str(last)
    with safe_open(tmp_path / "lora-last.safetensors", "pt") as handle:
        assert handle.metadata()["es_lora_step"] == handle.metadata()["ss_steps"] == str(last)
    history = [
        json.loads(line) for line in (tmp_path / "lora-es-lora" / "cs_history.jsonl").read_text().split("\n")[:-1]
    ]
    assert [line["step"] for line in history[1:-1]] == list(range(1, last + 1))
    assert set(history[1]["cs"]) == {"te", "unet", "all"} and history[0]["decided_on"] == "unet"
    assert float.fromhex(losses(done)[4].split()[1]) == pytest.approx(history[5]["loss"], rel=1e-6)
    assert "logged 1 te_cs/step total_cs/step unet_cs/step" in done.stdout
    assert not (tmp_path / "lora-es-lora" / "cs_snapshots").exists()
    assert (tmp_path / "lora-es-lora" / "report.html").read_text().startswith("<!doctype html>")


def test_a_process_of_its_own_finds_everything_beside_the_trainer(checkouts, tmp_path):
    patched = checkouts["sd-scripts", "patched"]
    command = [sys.executable, "train_network.py", "--output_dir", str(tmp_path), *STOP]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=patched, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "ES-LoRA: Stopped early at step" in done.stdout, done.stderr


def test_off_is_the_unpatched_training(checkouts, full, tmp_path):
    plain_folder, plain = full
    done = train(checkouts["sd-scripts", "patched"], "--output_dir", tmp_path)
    assert losses(done) == losses(plain) and len(losses(done)) == 40
    assert same(load_file(tmp_path / "lora.safetensors"), load_file(plain_folder / "lora.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors"]


def test_measuring_alone_trains_to_the_end_and_saves_the_turning_point_beside_it(checkouts, full, tmp_path):
    plain_folder, plain = full
    done = train(checkouts["sd-scripts", "patched"], "--output_dir", tmp_path, "--calculate_cs", *STOP[1:])
    assert losses(done) == losses(plain)
    kept = json.loads((tmp_path / "lora-es-lora" / "result.json").read_text())["keep_step"]
    assert same(load_file(tmp_path / "lora.safetensors"), load_file(plain_folder / "lora.safetensors"))
    assert same(load_file(tmp_path / "lora-turning-point.safetensors"), step_file(plain_folder, kept))


@pytest.mark.parametrize("stops", [True, False])
def test_an_average_is_that_of_the_steps_own_files(checkouts, full, tmp_path, stops):
    plain_folder, _ = full
    flags = STOP if stops else [*STOP, "--max_train_steps", 6]  # too short for the rule
    done = train(checkouts["sd-scripts", "patched"], "--output_dir", tmp_path, "--average", "0.25", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "lora-es-lora" / "result.json").read_text())
    last, kept = result["last_step"], result["keep_step"] if stops else 6
    steps = [step_file(plain_folder, step) for step in range(1, last + 1)]
    assert is_average(load_file(tmp_path / "lora.safetensors"), steps[:kept], 0.25)
    assert same(load_file(tmp_path / "lora-last.safetensors"), steps[-1])
    with safe_open(tmp_path / "lora.safetensors", "pt") as handle:
        assert handle.metadata()["es_lora_averaged"] == "True"


def test_accumulated_micro_steps_are_one_measurement(checkouts, tmp_path):
    done = train(
        checkouts["sd-scripts", "patched"], "--output_dir", tmp_path, "--gradient_accumulation_steps", 2, *STOP,
        "--network_train_unet_only", "--network_dim", 1,
    )  # fmt: skip
    result = json.loads((tmp_path / "lora-es-lora" / "result.json").read_text())
    assert len(losses(done)) == 2 * result["last_step"]
    header = json.loads((tmp_path / "lora-es-lora" / "cs_history.jsonl").read_text().split("\n")[0])
    assert header["steps_per_epoch"] == 4


def test_resume_goes_on_counting_and_decides_like_an_uninterrupted_run(checkouts, tmp_path):
    patched, whole, first, second = checkouts["sd-scripts", "patched"], *(tmp_path / n for n in ("whole", "a", "b"))
    train(patched, "--output_dir", whole, *STOP)
    done = train(patched, "--output_dir", first, *STOP, "--max_train_steps", 8, "--save_state")
    assert json.loads((first / "lora-es-lora" / "result.json").read_text())["outcome"] == "no_turning_point", (
        done.stderr
    )
    again = train(patched, "--output_dir", second, *STOP, "--resume", first / "lora-state")
    assert again.returncode == 0, again.stderr
    assert same(load_file(second / "lora.safetensors"), load_file(whole / "lora.safetensors"))
    read = lambda folder: (folder / "lora-es-lora" / "cs_history.jsonl").read_text()  # noqa: E731
    assert read(second) == read(whole)


def test_state_without_cs_and_wrong_flags_end_with_one_line_and_code_2(checkouts, tmp_path):
    patched = checkouts["sd-scripts", "patched"]
    train(patched, "--output_dir", tmp_path, "--max_train_steps", 2, "--save_state")
    done = train(patched, "--output_dir", tmp_path, "--early_stop", "--resume", tmp_path / "lora-state")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did not measure CS" in done.stderr
    done = train(patched, "--output_dir", tmp_path, "--early_stop", "--stop_rule", "best", "--cs_interval", "0")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--stop_rule best: stop rule 'best' is unknown" in done.stderr and "--cs_interval 0: give" in done.stderr


# -------------------------------------------------------------------------------------------- qlora

TRAINER = [
    "--max_steps", 30, "--save_steps", 1, "--learning_rate", "0.02", "--logging_steps", 1, "--report_to", "none",
    "--per_device_train_batch_size", 4, "--disable_tqdm", "True", "--dataloader_pin_memory", "False",
    "--save_only_model", "True",
]  # fmt: skip


def adapter(folder):
    return load_file(folder / "adapter_model" / "adapter_model.safetensors")


def test_qlora_stops_and_leaves_the_turning_point_as_it_saves_adapters(checkouts, tmp_path):
    plain = train(checkouts["qlora", "plain"], "--output_dir", tmp_path / "plain", *TRAINER)
    done = train(checkouts["qlora", "patched"], "--output_dir", tmp_path / "stopped", *TRAINER, *STOP)
    assert plain.returncode == 0 and done.returncode == 0, plain.stderr + done.stderr
    first = next(line for line in done.stdout.split("\n") if line.startswith("ES-LoRA"))
    assert first == "ES-LoRA: early stopping is on."
    result = json.loads((tmp_path / "stopped" / "result.json").read_text())
    kept, last = result["keep_step"], result["last_step"]
    assert result["outcome"] == "stopped_early" and last < 30
    assert same(adapter(tmp_path / "stopped" / "turning-point"), adapter(tmp_path / "plain" / f"checkpoint-{kept}"))
    assert same(
        adapter(tmp_path / "stopped" / f"checkpoint-{last}"), adapter(tmp_path / "plain" / f"checkpoint-{last}")
    )
    assert json.loads((tmp_path / "stopped" / "turning-point" / "es_lora.json").read_text())["keep_step"] == kept
    total = sum(float(tensor.double().sum()) for tensor in adapter(tmp_path / "stopped" / "turning-point").values())
    after = next(line for line in done.stdout.split("\n") if line.startswith("after training"))
    assert float.fromhex(after.split()[-1]) == pytest.approx(total, abs=1e-9)  # the model holds the turning point again


@pytest.mark.parametrize("stops", [True, False])
def test_qlora_keeps_the_average_of_the_steps_own_files(checkouts, tmp_path, stops):
    flags = STOP if stops else [*STOP, "--max_steps", 6]  # too short for the rule
    done = train(checkouts["qlora", "patched"], "--output_dir", tmp_path, *TRAINER, "--average", "0.25", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    steps = [adapter(tmp_path / f"checkpoint-{step}") for step in range(1, result["last_step"] + 1)]
    kept = tmp_path / result["files"]["kept"]["path"]
    assert kept.name == ("turning-point" if stops else "average")
    assert is_average(adapter(kept), steps[: result["keep_step"] if stops else 6], 0.25)
    total = sum(float(tensor.double().sum()) for tensor in adapter(kept).values())
    after = next(line for line in done.stdout.split("\n") if line.startswith("after training"))
    assert float.fromhex(after.split()[-1]) == pytest.approx(total, abs=1e-9)  # the model holds the average


def test_qlora_off_says_so_and_full_finetuning_is_a_message(checkouts, tmp_path):
    done = train(checkouts["qlora", "patched"], "--output_dir", tmp_path / "off", *TRAINER, "--max_steps", 1)
    assert "ES-LoRA: installed, and off; --early_stop switches it on." in done.stdout
    done = train(
        checkouts["qlora", "patched"], "--output_dir", tmp_path / "ff", *TRAINER, *STOP, "--full_finetune", "True"
    )
    assert done.returncode == 2 and "no LoRA layer to measure" in done.stderr


# ------------------------------------------------------------------------------------- musubi-tuner


def test_musubi_tuner_stops_and_keeps_the_weights_of_the_turning_point(checkouts, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    plain = train(checkouts["musubi-tuner", "plain"], "--output_dir", whole, "--save_every_n_steps", 1)
    done = train(checkouts["musubi-tuner", "patched"], "--output_dir", stopped, *STOP)
    assert done.returncode == 0 and "the end" in done.stdout, done.stderr
    result = json.loads((stopped / "lora-es-lora" / "result.json").read_text())
    kept, last = result["keep_step"], result["last_step"]
    assert result["outcome"] == "stopped_early" and kept < last < 40
    assert losses(done) == losses(plain)[:last]
    assert same(load_file(stopped / "lora.safetensors"), step_file(whole, kept))
    assert same(load_file(stopped / "lora-last.safetensors"), step_file(whole, last))
    header = json.loads((stopped / "lora-es-lora" / "cs_history.jsonl").read_text().split("\n")[0])
    assert header["trainer"] == "musubi-tuner"
    off = train(checkouts["musubi-tuner", "patched"], "--output_dir", tmp_path / "off")
    assert losses(off) == losses(plain)
    assert sorted(path.name for path in (tmp_path / "off").iterdir()) == ["lora.safetensors"]


def test_musubi_tuner_goes_on_from_a_state(checkouts, tmp_path):
    patched, whole, first, second = checkouts["musubi-tuner", "patched"], *(tmp_path / name for name in "abc")
    train(patched, "--output_dir", whole, *STOP)
    train(patched, "--output_dir", first, *STOP, "--max_train_steps", 8, "--save_state")
    again = train(patched, "--output_dir", second, *STOP, "--resume", first / "lora-state")
    assert again.returncode == 0, again.stderr
    assert same(load_file(second / "lora.safetensors"), load_file(whole / "lora.safetensors"))


# ---------------------------------------------------------------------------------------- diffusers

WEIGHTS = "pytorch_lora_weights.safetensors"
EACH_STEP = ["--checkpointing_steps", 1]


@pytest.fixture(scope="module")
def script_run(checkouts, tmp_path_factory):
    """The unpatched script to its end, every step saved."""
    folder = tmp_path_factory.mktemp("script")
    return folder, train(checkouts["diffusers", "plain"], "--output_dir", folder, *EACH_STEP)


def unet(folder):
    """The denoiser's part of a file: the miniature's checkpoints hold no more."""
    return {name: value for name, value in load_file(folder / WEIGHTS).items() if name.startswith("unet.")}


@pytest.mark.parametrize("more", [[], ["--train_text_encoder"]], ids=["denoiser", "with text encoder"])
def test_a_script_stops_and_saves_the_turning_point_and_the_last_weights(checkouts, script_run, tmp_path, more):
    (whole, plain), stopped = script_run, tmp_path / "stopped"
    if more:
        whole = tmp_path / "whole"
        plain = train(checkouts["diffusers", "plain"], "--output_dir", whole, *EACH_STEP, *more)
    done = train(checkouts["diffusers", "patched"], "--output_dir", stopped, *STOP, *more)
    assert done.returncode == 0 and "the end" in done.stdout, done.stderr
    result = json.loads((stopped / "es-lora" / "result.json").read_text())
    kept, last = result["keep_step"], result["last_step"]
    assert result["outcome"] == "stopped_early" and kept < last < 40
    assert losses(done) == losses(plain)[:last]
    assert f"end of epoch {-(-last // 8)}" in done.stdout and f"end of epoch {-(-last // 8) + 1}" not in done.stdout
    assert same(unet(stopped), unet(whole / f"checkpoint-{kept}"))
    assert same(unet(stopped / "last"), unet(whole / f"checkpoint-{last}"))
    with safe_open(stopped / "last" / WEIGHTS, "pt") as handle:
        assert handle.metadata()["parts"] == ("text_encoder unet" if more else "unet")
    cs = json.loads((stopped / "es-lora" / "cs_history.jsonl").read_text().split("\n")[1])["cs"]
    assert set(cs) == ({"unet", "te", "all"} if more else {"unet", "all"})
    assert not same(load_file(stopped / WEIGHTS), load_file(stopped / "last" / WEIGHTS))


def test_a_script_with_the_flags_off_is_the_unpatched_one(checkouts, script_run, tmp_path):
    plain_folder, plain = script_run
    done = train(checkouts["diffusers", "patched"], "--output_dir", tmp_path)
    assert losses(done) == losses(plain)
    assert same(load_file(tmp_path / WEIGHTS), load_file(plain_folder / WEIGHTS))
    assert sorted(path.name for path in tmp_path.iterdir()) == [WEIGHTS]


def test_a_script_that_only_measures_saves_the_turning_point_beside_the_end(checkouts, script_run, tmp_path):
    plain_folder, plain = script_run
    done = train(checkouts["diffusers", "patched"], "--output_dir", tmp_path, "--calculate_cs", *STOP[1:])
    assert losses(done) == losses(plain)
    kept = json.loads((tmp_path / "es-lora" / "result.json").read_text())["keep_step"]
    assert same(load_file(tmp_path / WEIGHTS), load_file(plain_folder / WEIGHTS))
    assert same(unet(tmp_path / "turning-point"), unet(plain_folder / f"checkpoint-{kept}"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_script_keeps_the_average_of_its_steps_in_the_type_it_saves(checkouts, script_run, tmp_path, dtype):
    plain_folder, _ = script_run
    flags = [*STOP, "--average", "0.25", "--save_dtype", dtype]
    done = train(checkouts["diffusers", "patched"], "--output_dir", tmp_path, *flags)
    result = json.loads((tmp_path / "es-lora" / "result.json").read_text())
    steps = [unet(plain_folder / f"checkpoint-{step}") for step in range(1, result["last_step"] + 1)]
    saved = unet(tmp_path)
    assert {value.dtype for value in saved.values()} == {getattr(torch, dtype)}, done.stderr
    if dtype == "float32":
        assert is_average(saved, steps[: result["keep_step"]], 0.25)
    last = {name: value.to(getattr(torch, dtype)) for name, value in steps[-1].items()}
    assert same(unet(tmp_path / "last"), last)


def test_a_script_that_saves_copies_saves_the_kept_weights_alone_and_says_so(checkouts, script_run, tmp_path):
    plain_folder, _ = script_run
    done = train(checkouts["diffusers", "patched"], "--output_dir", tmp_path, *STOP, "--save_copies")
    result = json.loads((tmp_path / "es-lora" / "result.json").read_text())
    assert same(unet(tmp_path), unet(plain_folder / f"checkpoint-{result['keep_step']}"))
    assert f"only {WEIGHTS} is saved" in done.stdout and not (tmp_path / "last").exists()


def test_a_script_goes_on_from_a_checkpoint_with_its_history(checkouts, tmp_path):
    patched, whole, parts = checkouts["diffusers", "patched"], tmp_path / "whole", tmp_path / "parts"
    train(patched, "--output_dir", whole, *STOP)
    train(patched, "--output_dir", parts, *STOP, "--max_train_steps", 8, "--checkpointing_steps", 8)
    again = train(patched, "--output_dir", parts, *STOP, "--resume_from_checkpoint", "checkpoint-8")
    assert again.returncode == 0, again.stderr
    assert same(load_file(parts / WEIGHTS), load_file(whole / WEIGHTS))
    read = lambda folder: (folder / "es-lora" / "cs_history.jsonl").read_text()  # noqa: E731
    assert read(parts) == read(whole)


def test_a_script_with_a_checkpoint_without_history_says_so_and_wrong_flags_end_it(checkouts, tmp_path):
    patched = checkouts["diffusers", "patched"]
    train(patched, "--output_dir", tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 2)
    done = train(patched, "--output_dir", tmp_path, *STOP, "--resume_from_checkpoint", "checkpoint-2")
    assert done.returncode == 0 and "holds no CS history; measuring begins anew" in done.stdout
    done = train(patched, "--output_dir", tmp_path, "--early_stop", "--cs_interval", "0")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--cs_interval 0: give" in done.stderr
