"""A state that is resumed at or after the end: nothing is trained, and the run finishes as the one
that was not disturbed."""

from pathlib import Path

import pytest
import torch
from ldm_runs import result_of, run, train

from network.lora_file import load_lora

EARLY = dict(early_stop=True, stop_rule="second-valley", window_size=3, cs_interval=1, max_train_steps=40)
ENDED = ("outcome", "keep_step", "detected_step", "last_step", "total_steps", "reason")


def left(folder):
    """What a finished run has come to: facts, history and tensors."""
    result, folder = result_of(folder), Path(folder)
    files = {what: entry["path"] for what, entry in result["files"].items() if what != "state"}
    tensors = {what: load_lora(folder / name)[0] for what, name in files.items()}
    history = folder / "cs_history.jsonl"
    return {name: result[name] for name in ENDED}, history.read_bytes() if history.exists() else None, tensors


def assert_same(one, other):
    assert one[:2] == other[:2] and one[2].keys() == other[2].keys()
    for what, tensors in one[2].items():
        assert all(torch.equal(value, other[2][what][name]) for name, value in tensors.items()), what


def kill_in_the_final_save(folder):
    """What a kill right after the last state leaves."""
    for path in Path(folder).iterdir():
        if path.suffix in (".safetensors", ".html") or path.name == "result.json":
            path.unlink()


@pytest.fixture(scope="module")
def stopped(base, images, tmp_path_factory):
    """A run that stopped early and left its state."""
    out = tmp_path_factory.mktemp("stopped")
    train(base, images, out, **EARLY, save_state_on_train_end=True)
    return out


def test_a_state_that_holds_the_decision_stops_at_once_and_finishes(base, images, stopped, capsys):
    undisturbed = left(stopped)
    assert undisturbed[0]["outcome"] == "stopped_early" and undisturbed[0]["last_step"] < 40
    state = stopped / "lora-state"
    files = sorted(path.name for path in state.rglob("*"))
    for _ in range(2):  # it can be done again
        kill_in_the_final_save(stopped)
        assert run(base, images, stopped, **EARLY, save_state_on_train_end=True, resume=str(state)) == 0
        assert_same(left(stopped), undisturbed)
        assert (stopped / "report.html").is_file() and result_of(stopped)["files"]["state"]["path"] == "lora-state"
        assert sorted(path.name for path in state.rglob("*")) == files


def test_without_early_stop_a_state_with_a_decision_goes_on_to_its_budget(base, images, tmp_path):
    full = {**EARLY, "early_stop": False, "calculate_cs": True, "save_state": True, "max_train_steps": 24}
    train(base, images, tmp_path / "whole", **full)
    undisturbed = left(tmp_path / "whole")
    assert undisturbed[0]["outcome"] == "budget_reached" and undisturbed[0]["detected_step"] < 20
    train(base, images, tmp_path / "short", **{**full, "max_train_steps": 20})
    train(base, images, tmp_path / "again", **full, resume=str(tmp_path / "short/lora-state"))
    assert_same(left(tmp_path / "again"), undisturbed)


@pytest.mark.parametrize("more", [{}, dict(calculate_cs=True, cs_interval=2), dict(early_stop=True, average=0.3)])
def test_a_state_at_the_end_of_the_budget_only_finishes(base, images, tmp_path, more):
    settings = dict(max_train_steps=6, save_state=True, save_every_n_steps=3, **more)
    train(base, images, tmp_path / "out", **settings)
    undisturbed = left(tmp_path / "out")
    for state in ("lora-state", "lora-step00000006-state"):
        kill_in_the_final_save(tmp_path / "out")
        train(base, images, tmp_path / "out", **settings, resume=str(tmp_path / "out" / state))
        assert_same(left(tmp_path / "out"), undisturbed)


def test_a_state_of_an_epochs_last_step_has_missed_nothing_of_the_epoch(base, images, tmp_path):
    settings = dict(calculate_cs=True, cs_interval=2, validation_split=0.34, max_train_steps=6, save_state=True)
    settings["stop_rule"] = "second-valley"  # which decides nothing in so few steps
    train(base, images, tmp_path / "out", **settings, save_every_n_steps=2)
    undisturbed = left(tmp_path / "out")
    assert undisturbed[1].count(b'"evaluation"') == 3
    for step in (2, 4, 6):
        state = tmp_path / f"out/lora-step0000000{step}-state"
        train(base, images, tmp_path / f"{step}", **settings, resume=str(state))
        assert_same(left(tmp_path / f"{step}"), undisturbed)
