"""Checkpoints: whole before they have a name, rotated by step, resumed at the end, refused where
they are damaged or another run's."""

import json
import os
import re
import shutil
import signal
import time

import pytest
from es_lora_llm import main
from safetensors.torch import load_file, save_file
from short_runs import ENVIRONMENT, adapter_of, flags, result_of, start

from training.checkpoints import forget_checkpoints
from training.trainer import LoraTrainer

SAVES = ["--save_strategy", "steps", "--save_steps", "2"]
STOPS = ["--early_stop", *SAVES]
AS_LONG = ["--max_steps", "8", *SAVES]


def files_of(folder):
    """{name: content} of what a run leaves, without times and versions."""
    read = {name: (folder / name).read_bytes() for name in ("cs_history.jsonl",)}
    adapters = {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("adapter*/adapter_*")}
    return {**read, **adapters}


@pytest.fixture(scope="module", params=["stopped", "budget", "not measured"])
def finished(request, random_base, text_files, tmp_path_factory):
    """(output folder, flags) of a run whose last checkpoint is of its last step."""
    more = {
        "stopped": STOPS + ["--save_steps", "1"],
        "budget": AS_LONG,
        "not measured": [*AS_LONG, "--calculate_cs", "False"],
    }
    output, words = tmp_path_factory.mktemp("runs") / "run", more[request.param]
    assert main(flags(random_base, text_files, output, *words)) == 0
    return output, words


def test_a_run_resumed_at_its_end_only_finishes(finished, random_base, text_files, tmp_path):
    output, words = finished
    killed = tmp_path / "run"
    shutil.copytree(output, killed)  # as a kill in the final save leaves it
    for name in ("result.json", "report.html"):
        (killed / name).unlink(missing_ok=True)
    for folder in killed.glob("adapter*"):
        shutil.rmtree(folder)
    assert main(flags(random_base, text_files, killed, *words, "--resume_from_checkpoint", "true")) == 0
    for key in ("outcome", "last_step", "keep_step", "detected_step"):
        assert result_of(killed)[key] == result_of(output)[key]
    assert adapter_of(killed / "adapter").keys() == adapter_of(output / "adapter").keys()
    for folder in output.glob("adapter*"):
        mine, theirs = killed / folder.name / "adapter_model.safetensors", folder / "adapter_model.safetensors"
        assert mine.read_bytes() == theirs.read_bytes()
    if (output / "cs_history.jsonl").exists():
        assert (killed / "cs_history.jsonl").read_bytes() == (output / "cs_history.jsonl").read_bytes()


def test_a_resumed_history_has_the_loss_of_all_steps_since_the_last_measurement(random_base, text_files, tmp_path):
    words = ["--max_steps", "8", "--cs_interval", "2", "--save_strategy", "steps", "--save_steps", "5"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(flags(random_base, text_files, whole, *words)) == 0
    shutil.copytree(whole, resumed)
    (resumed / "checkpoint-8").exists() and shutil.rmtree(resumed / "checkpoint-8")
    assert main(flags(random_base, text_files, resumed, *words, "--resume_from_checkpoint", "true")) == 0
    assert (resumed / "cs_history.jsonl").read_bytes() == (whole / "cs_history.jsonl").read_bytes()


def test_what_is_evaluated_at_an_epochs_end_is_in_the_checkpoint_of_its_last_step(random_base, text_files, tmp_path):
    words = ["--max_steps", "8", "--save_strategy", "steps", "--save_steps", "4", "--do_eval"]
    words += ["--eval_dataset", text_files["heldout"], "--eval_strategy", "epoch"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(flags(random_base, text_files, whole, *words)) == 0
    assert (whole / "cs_history.jsonl").read_text().count('"evaluation", "step": 4') == 1
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-8")
    assert main(flags(random_base, text_files, resumed, *words, "--resume_from_checkpoint", "true")) == 0
    assert (resumed / "cs_history.jsonl").read_bytes() == (whole / "cs_history.jsonl").read_bytes()


def test_the_newest_checkpoints_stay_whatever_the_times_of_their_folders_say(random_base, text_files, tmp_path):
    output = tmp_path / "run"
    arguments = flags(random_base, text_files, output, "--max_steps", "8", *SAVES, "--save_total_limit", "2")
    assert main(arguments) == 0
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    for old in (2, 40):  # the clock went back
        shutil.copytree(output / "checkpoint-8", output / f"checkpoint-{old}")
    now = time.time()
    os.utime(output / "checkpoint-2", (now + 100, now + 100))
    forget_checkpoints(output, 2)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-40", "checkpoint-8"]


@pytest.mark.parametrize("limit", [1, 2])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(random_base, text_files, tmp_path, limit):
    output = tmp_path / "run"
    words = flags(random_base, text_files, output, "--max_steps", "8", *SAVES, "--save_total_limit", limit)
    name_checkpoint = LoraTrainer._name_checkpoint

    def killed(self, aside, checkpoint):
        if checkpoint.name == "checkpoint-6":
            raise SystemExit(9)  # nothing after it is run, as after a kill
        name_checkpoint(self, aside, checkpoint)

    LoraTrainer._name_checkpoint = killed
    try:
        with pytest.raises(SystemExit):
            main(words)
    finally:
        LoraTrainer._name_checkpoint = name_checkpoint
    assert (output / "checkpoint-4" / "cs_state.json").is_file() and not (output / "checkpoint-6").exists()
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert result_of(output)["last_step"] == 8


@pytest.fixture(scope="module")
def saved(random_base, text_files, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "saved"
    assert main(flags(random_base, text_files, output, "--max_steps", "2", *SAVES)) == 0
    return output


WHOLE = [
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "cs_state.json"),
    *("cs_gradients.safetensors", "adapter_model.safetensors"),
]


@pytest.mark.parametrize("how", ["cut in half", "missing"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_checkpoint_with_a_damaged_or_missing_part_is_one_message(
    saved, random_base, text_files, tmp_path, capsys, name, how
):
    output = tmp_path / "run"
    shutil.copytree(saved, output)
    part = output / "checkpoint-2" / name
    if how == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    words = flags(random_base, text_files, output, "--max_steps", "4", "--resume_from_checkpoint", "true")
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("es_lora_llm:") <= 2
    assert re.search("is damaged|lacks|holds no|no complete checkpoint|does not fit", said)
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "more, told",
    [
        (["--lora_r", "2"], "does not fit this run: .* is \\(4, 64\\), here \\(2, 64\\)"),
        (["--lora_modules", "attention"], "is not one of this run's"),
        (["--optim", "adafactor"], "another optimizer"),
        (["--optim", "sgd"], "another optimizer"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(saved, random_base, text_files, tmp_path, capsys, more, told):
    output = tmp_path / "run"
    shutil.copytree(saved, output)
    words = flags(random_base, text_files, output, "--max_steps", "4", "--resume_from_checkpoint", "true", *more)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert re.search(told, said) and "Traceback" not in said


def test_half_an_adapter_in_a_checkpoint_is_refused_with_names_and_count(
    saved, random_base, text_files, tmp_path, capsys
):
    output = tmp_path / "run"
    shutil.copytree(saved, output)
    file = output / "checkpoint-2" / "adapter_model.safetensors"
    tensors = load_file(str(file))
    gone = [name for name in tensors if "lora_A" in name]
    save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, str(file))
    assert main(flags(random_base, text_files, output, "--max_steps", "4", "--resume_from_checkpoint", "true")) == 2
    said = capsys.readouterr().err
    assert any(f"{name} is missing" in said for name in gone) and f"({len(gone)} in all)" in said


def test_equal_runs_leave_equal_bytes(random_base, text_files, tmp_path, monkeypatch):
    runs = []
    for name in ("1", "2"):  # two processes, whose hashes of texts differ
        monkeypatch.setitem(ENVIRONMENT, "PYTHONHASHSEED", name)
        runs.append(start(flags(random_base, text_files, tmp_path / name, *STOPS)))
    for run in runs:
        assert "Stopped early" in run.communicate()[0] and run.returncode == 0
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_the_adapter_has_its_tokenizer_when_it_has_its_name(random_base, text_files, tmp_path, monkeypatch):
    import es_lora_llm

    def failing(*_):
        raise OSError(28, "No space left on device")

    output, set_up = tmp_path / "run", es_lora_llm.set_up

    def with_failing_tokenizer(settings):
        run = set_up(settings)
        monkeypatch.setattr(run.collator.tokenizer, "save_pretrained", failing)
        return run

    monkeypatch.setattr(es_lora_llm, "set_up", with_failing_tokenizer)
    assert main(flags(random_base, text_files, output, "--max_steps", "2")) == 1
    assert not (output / "adapter").exists() and not list(output.glob(".adapter*"))


def test_two_runs_in_one_folder_the_second_is_refused(random_base, text_files, tmp_path):
    arguments = flags(random_base, text_files, tmp_path / "run", "--max_steps", "12", *SAVES)
    runs = [start(arguments), start(arguments)]
    said = [run.communicate()[0] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], said
    told = said[[run.returncode for run in runs].index(2)]
    assert re.search(r"is held by es_lora_llm \(process|holds an earlier run", told)  # as far as the first had come
    header = (tmp_path / "run" / "cs_history.jsonl").read_text().count('"format"')
    assert header == 1 and not (tmp_path / "run" / ".es-lora.lock").exists()


def test_the_lock_of_a_killed_run_is_taken_over_and_said(random_base, text_files, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = flags(random_base, text_files, output, "--max_steps", "60", *SAVES)
    process = start(arguments)
    end = time.monotonic() + 120
    while not (output / "checkpoint-2").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    arguments = flags(random_base, text_files, output, "--max_steps", "4", "--resume_from_checkpoint", "true")
    left = json.loads((output / ".es-lora.lock").read_text())
    assert left["pid"] == process.pid
    capsys.readouterr()
    for folder in output.glob("checkpoint-*"):
        if folder.name != "checkpoint-2":
            shutil.rmtree(folder)
    assert main(arguments) == 0
    assert "is taken over: that run has died" in capsys.readouterr().out
    assert not (output / ".es-lora.lock").exists()


def test_what_is_not_the_runs_own_stays(random_base, text_files, tmp_path):
    output = tmp_path / "run"
    (output / "cs_snapshots").mkdir(parents=True)
    (output / "cs_snapshots" / "holiday.txt").write_text("mine")
    (output / ".notes.old").write_text("mine")
    assert main(flags(random_base, text_files, output, "--max_steps", "3")) == 0
    assert [path.name for path in (output / "cs_snapshots").iterdir()] == ["holiday.txt"]
    assert (output / ".notes.old").exists()


@pytest.mark.parametrize("name", ["result.json", "report.html"])
def test_a_folder_in_the_way_is_seen_before_training(random_base, text_files, tmp_path, capsys, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    assert main(flags(random_base, text_files, tmp_path / "run", "--overwrite_output_dir", "True")) == 2
    assert f"{name} is a folder and in the way" in capsys.readouterr().err
    assert not (tmp_path / "run" / "cs_history.jsonl").exists()
