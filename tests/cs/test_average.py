"""Averaged weights: the published formula, their place in the monitor, resumed and refused."""

import json

import pytest
import torch
from literal_average import is_average
from safetensors.torch import load_file
from test_monitor import ToyTraining, plan_of, same

from es_lora.average import WeightAverage
from es_lora.history import read_history, rule_for
from es_lora.monitor import EarlyStopMonitor
from es_lora.outcome import Outcome
from es_lora.rules import RuleSettings, make_rule
from es_lora.settings import StopSettings


def averaged_training(width, steps):
    """(the average, each step's weights) of a toy training."""
    training, seen = ToyTraining(), []
    average = WeightAverage(lambda: training.tensors, width)
    for step in range(1, steps + 1):
        training.step(step)
        average.update()
        seen.append(training.copy())
    return training, average, seen


@pytest.mark.parametrize("width", [0.1, 0.25, 0.4, 0.5])
def test_the_average_is_that_of_the_formula(width):
    training, average, seen = averaged_training(width, 40)
    assert is_average(average.tensors(), seen, width)
    assert not same(average.tensors(), training.tensors)


def test_the_average_of_the_first_step_is_its_weights_and_before_it_the_weights():
    training, average, seen = averaged_training(0.25, 1)
    assert same(average.tensors(), seen[0])
    assert same(WeightAverage(lambda: training.tensors, 0.25).tensors(), training.tensors)


def test_a_width_of_a_half_counts_every_step_alike():
    _, average, seen = averaged_training(0.5, 30)
    mean = torch.stack([step["0.up"] for step in seen]).mean(0)
    assert torch.allclose(average.tensors()["0.up"], mean, atol=1e-5)


def test_the_lag_is_the_width_as_a_share_of_the_steps():
    clock = {"t": torch.zeros(1)}
    average = WeightAverage(lambda: clock, 0.25)
    for step in range(1, 2001):
        clock["t"].fill_(float(step))
        average.update()
    assert average.tensors()["t"].item() == pytest.approx(0.75 * 2000, rel=1e-2)


def test_weights_of_16_bits_are_averaged_in_32():
    weights = {"w": torch.full((4,), 1.0, dtype=torch.bfloat16)}
    average = WeightAverage(lambda: weights, 0.4)
    average.update()
    for _ in range(600):  # a move of a thousandth is below the steps of bfloat16 at 1
        weights["w"].fill_(2.0)
        average.update()
    assert average.tensors()["w"].dtype == torch.bfloat16 and average.tensors()["w"][0] > 1.9


def test_in_place_the_weights_come_back_bit_for_bit_also_after_an_error():
    training, average, seen = averaged_training(0.25, 5)
    with average.in_place():
        assert same(training.tensors, average.tensors())
    assert same(training.tensors, seen[-1])
    with pytest.raises(RuntimeError), average.in_place():
        raise RuntimeError
    assert same(training.tensors, seen[-1])


@pytest.mark.parametrize("width", [0, -0.1, 0.51, 1, float("nan")])
def test_a_width_that_is_none_is_refused(width):
    with pytest.raises(ValueError, match="width must be above 0 and at most 0.5"):
        WeightAverage(dict, width)


def test_another_loras_average_is_refused():
    _, average, _ = averaged_training(0.25, 3)
    other = WeightAverage(lambda: {"0.up": torch.zeros(6, 4)}, 0.25)
    with pytest.raises(ValueError, match="belongs to other weights"):
        other.load_state_tensors(average.state_tensors())


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "given, width", [("0", 0.0), ("0.25", 0.25), ("auto", StopSettings(early_stop=True).average_width)]
)
def test_the_flag_is_a_width_or_auto(given, width):
    settings, problems = StopSettings(early_stop=True).given({"average": given})
    assert not problems and settings.average_width == width
    assert settings.as_flags()["average"] == ("auto" if given == "auto" else width)


@pytest.mark.parametrize("given", ["0.6", "-1", "nan", "wide"])
def test_a_bad_width_is_a_problem_that_names_the_flag(given):
    _, problems = StopSettings(early_stop=True).given({"average": given})
    assert len(problems) == 1 and problems[0].startswith(f"--average {given}: ")


def test_without_early_stopping_nothing_is_averaged_unless_asked_for():
    assert StopSettings().average_width == 0
    assert StopSettings(average=0.1).average_width == 0.1
    assert "add --early_stop" in StopSettings(calculate_cs=False, average=0.1).problems()[0]


def test_an_optimizer_that_averages_itself_needs_no_average():
    assert StopSettings(early_stop=True).without_average("--optim x").average_width == 0
    with pytest.raises(ValueError, match="--average 0.1: --optim x averages its weights itself; give --average 0"):
        StopSettings(early_stop=True, average=0.1).without_average("--optim x")


# ----------------------------------------------------------------------------- monitor and outcome


def run(folder, steps=80, resume_from=None, training=None, first=1, average=0.25, **options):
    training = training or ToyTraining()
    plan = plan_of(average=average)
    monitor = EarlyStopMonitor(
        folder, plan, training.layers(), lambda: training.tensors, resume_from=resume_from, **options
    )
    seen = {}
    for step in range(first, steps + 1):
        training.step(step)
        monitor.after_step()
        seen[step] = training.copy()
        if monitor.measure(step, step / 10):
            break
    return monitor, seen, training


def test_the_weights_of_the_turning_point_are_the_average_of_the_steps_up_to_it(tmp_path):
    monitor, seen, _ = run(tmp_path)
    kept = monitor.load_snapshot(monitor.decision.keep_step)
    steps = [seen[step] for step in range(1, monitor.decision.keep_step + 1)]
    assert is_average(kept, steps, 0.25)
    assert read_history(tmp_path).header["average"] == 0.25


def test_a_rule_decides_alike_with_and_without_an_average(tmp_path):
    decisions = [run(tmp_path / f"{width}", average=width)[0].decision for width in (0.0, 0.4)]
    assert decisions[0] == decisions[1] is not None


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    whole, _, _ = run(tmp_path / "whole")
    part, _, training = run(tmp_path / "part", steps=7)
    part.save_state(tmp_path / "state")
    resumed, _, _ = run(tmp_path / "part", resume_from=tmp_path / "state", training=training, first=8)
    assert same(resumed.kept_tensors(), whole.kept_tensors())
    step = whole.decision.keep_step
    assert same(resumed.load_snapshot(step), whole.load_snapshot(step))
    assert (tmp_path / "part" / "cs_history.jsonl").read_bytes() == (
        tmp_path / "whole" / "cs_history.jsonl"
    ).read_bytes()


def test_a_state_without_an_average_is_refused_with_the_way_out(tmp_path):
    single, _, training = run(tmp_path, steps=5, average=0.0)
    single.save_state(tmp_path / "state")
    assert not (tmp_path / "state" / "cs_average.safetensors").exists()
    with pytest.raises(ValueError, match="holds no averaged weights; go on with --average 0, or start anew"):
        run(tmp_path, resume_from=tmp_path / "state", training=training, first=6)


def test_a_held_out_loss_is_taken_of_both_and_decides_by_the_average(tmp_path):
    training = ToyTraining()
    plan = plan_of(rule="validation-patience", average=0.25)
    size = {"heldout_loss": lambda: float(training.tensors["0.up"].norm())}
    monitor = EarlyStopMonitor(tmp_path, plan, training.layers(), lambda: training.tensors, columns=size)
    for step in range(1, 5):
        training.step(step)
        monitor.after_step()
        live = training.copy()
        monitor.measure(step, step / 10)
        assert same(training.tensors, live)
        average = monitor.average.tensors()["0.up"].norm().item()
        assert monitor.last_record["heldout_loss"] == pytest.approx(live["0.up"].norm().item())
        assert monitor.last_record["heldout_loss_average"] == pytest.approx(average)
    assert monitor.rule.needs == ("heldout_loss_average",)
    assert rule_for(read_history(tmp_path), "recorded").needs == ("heldout_loss_average",)


@pytest.mark.parametrize("name, column", [("shadow", "shadow_loss"), ("validation-patience", "heldout_loss")])
def test_rules_of_a_loss_read_that_of_the_weights_that_are_kept(name, column):
    assert make_rule(name, RuleSettings(5, "lm", 10, 1)).needs == (column,)
    assert make_rule(name, RuleSettings(5, "lm", 10, 1, averaged=True)).needs == (f"{column}_average",)


def ending(folder, losses, resume_from=None, training=None, first=1):
    """A training whose budget is as many steps as there are losses; (monitor, training)."""
    training, stop = training or ToyTraining(), StopSettings(stop_rule="shadow", cs_interval=1, window_size=3)
    plan = stop.plan(["lm"], 100, len(losses))
    monitor = EarlyStopMonitor(
        folder,
        plan,
        training.layers(),
        lambda: training.tensors,
        columns={"shadow_loss": lambda: losses[monitor.measurements]},
        resume_from=resume_from,
    )
    for step in range(first, len(losses) + 1):
        training.step(step)
        monitor.measure(step, step / 100)
    return monitor, training


def test_a_run_that_ends_at_its_budget_keeps_the_lowest_loss_and_a_longer_one_decides_anew(tmp_path):
    monitor, training = ending(tmp_path / "run", [3.0, 2.0, 2.5, 2.4])
    assert (monitor.decision.keep_step, monitor.decision.detected_step) == (2, 4)
    assert monitor.load_snapshot(2).keys() == training.tensors.keys()
    monitor.save_state(tmp_path / "state")
    longer, _ = ending(tmp_path / "run", [3.0, 2.0, 2.5, 2.4, 1.9, 2.1], tmp_path / "state", training, 5)
    assert (longer.decision.keep_step, longer.decision.detected_step) == (5, 6)
    assert [event["step"] for event in read_history(tmp_path / "run").events] == [5]


PLAN = StopSettings(early_stop=True, average=0.25).plan(["lm"], 16, 204)


def test_an_outcome_says_which_weights_are_averaged(tmp_path):
    made = Outcome("no_turning_point", 204, 204, plan=PLAN, heldout={"average": 3.0, "last": 3.3})
    made.saved("kept", "adapter", 204)
    made.saved("last", "adapter-last", 204)
    assert made.sentence() == (
        "Trained to its budget of 204 steps. No evidence of overfitting yet: the average of the weights is kept. "
        "Held-out loss: 3.0000 there, 3.3000 at the last step (10.0% higher)."
    )
    made.write(tmp_path, {}, ())
    result = json.loads((tmp_path / "result.json").read_text())
    assert {what: entry["averaged"] for what, entry in result["files"].items()} == {"kept": True, "last": False}
    assert result["average"] == 0.25
    assert made.metadata("kept")["es_lora_averaged"] == "True"


def test_snapshots_of_an_average_are_in_the_weights_own_type(tmp_path):
    training = ToyTraining()
    training.tensors = {name: tensor.bfloat16() for name, tensor in training.tensors.items()}
    layers = ToyTraining().layers()
    monitor = EarlyStopMonitor(tmp_path, plan_of(average=0.1), layers, lambda: training.tensors)
    monitor.after_step()
    monitor.measure(1, 0.1)
    monitor.snapshots.wait()
    stored = load_file(str(monitor.snapshots.path(1)))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
