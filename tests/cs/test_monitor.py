"""The monitor: history, snapshots that are copies, bounded disk, resume equal to an uninterrupted
run."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cs_fluctuation import LoraLayer, NonFiniteWeightsError
from es_lora.history import read_history
from es_lora.monitor import EarlyStopMonitor
from es_lora.settings import StopSettings

WINDOW = 3


class ToyTraining:
    """Two adapted layers whose LoRA weights take a seeded step at a time."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(6, 5, generator=generator) for _ in range(2)]
        self.tensors = {}
        for index in range(2):
            self.tensors[f"{index}.down"] = torch.randn(2, 5, generator=generator)
            self.tensors[f"{index}.up"] = torch.zeros(6, 2)

    def layers(self):
        return [
            LoraLayer(str(i), "lm", self.weights[i], self.tensors[f"{i}.down"], self.tensors[f"{i}.up"])
            for i in range(2)
        ]

    def step(self, number):
        generator = torch.Generator().manual_seed(number)
        for tensor in self.tensors.values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)

    def copy(self):
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def restore(self, tensors):
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)


def plan_of(rule="second-valley", components=("lm",), **stop):
    settings = StopSettings(stop_rule=rule, window_size=WINDOW, cs_interval=1, cs_reduction="matrix", **stop)
    return settings.plan(components, 10, 1000)


def monitor_of(folder, training, rule="second-valley", **options):
    stop = {"snapshot_disk_gb": options.pop("snapshot_disk_bytes") / 1e9} if "snapshot_disk_bytes" in options else {}
    return EarlyStopMonitor(folder, plan_of(rule, **stop), training.layers(), lambda: training.tensors, **options)


def run(folder, steps=80, **options):
    """Train until the rule decides; (decision, {step: the weights then}, the monitor)."""
    training = ToyTraining()
    monitor, seen = monitor_of(folder, training, **options), {}
    for step in range(1, steps + 1):
        training.step(step)
        seen[step] = training.copy()
        if monitor.measure(step, step / 10, loss=1.0 / step):
            return monitor.decision, seen, monitor
    return None, seen, monitor


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_turning_point_snapshot_holds_the_weights_of_that_step(tmp_path):
    decision, seen, monitor = run(tmp_path)
    assert decision.keep_step == decision.detected_step - (3 * WINDOW - 2)
    assert same(monitor.load_snapshot(decision.keep_step), seen[decision.keep_step])
    assert not same(seen[decision.keep_step], seen[decision.detected_step])


def test_no_more_files_lie_on_disk_than_can_still_be_asked_for(tmp_path):
    training = ToyTraining()
    monitor = monitor_of(tmp_path, training)
    for step in range(1, 12):
        training.step(step)
        assert monitor.measure(step, 0.0) is None
        monitor.snapshots.wait()
        files = sorted((tmp_path / "cs_snapshots").iterdir())
        assert len(files) == min(step, 3 * WINDOW - 1)
    monitor.close()
    assert not (tmp_path / "cs_snapshots").exists()


def test_a_disk_limit_thins_the_snapshots_and_keeps_the_nearest_before(tmp_path):
    exact = run(tmp_path / "exact")[0]
    size = sum(tensor.numel() * 4 for tensor in ToyTraining().tensors.values())
    every = monitor_of(tmp_path / "plan", ToyTraining(), snapshot_disk_bytes=5 * size).snapshots.every
    decision, seen, monitor = run(tmp_path / "thin", snapshot_disk_bytes=5 * size)
    assert every > 1
    assert decision.detected_step == exact.detected_step
    assert exact.keep_step - every < decision.keep_step < exact.keep_step
    assert "nearest step still kept" in decision.reason
    assert same(monitor.load_snapshot(decision.keep_step), seen[decision.keep_step])


@pytest.mark.parametrize("files", [2, 3, 4, 6, 8])
def test_the_disk_limit_is_never_exceeded(tmp_path, files):
    training = ToyTraining()
    size = sum(tensor.numel() * 4 for tensor in training.tensors.values())
    monitor = monitor_of(tmp_path, training, snapshot_disk_bytes=files * size)
    for step in range(1, 40):
        training.step(step)
        if monitor.measure(step, 0.0):
            break
        monitor.snapshots.wait()
        assert len(list((tmp_path / "cs_snapshots").iterdir())) <= files


def test_a_limit_below_two_snapshots_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--snapshot_disk_gb"):
        monitor_of(tmp_path, ToyTraining(), snapshot_disk_bytes=10)


def test_resume_gives_the_same_history_decision_and_weights(tmp_path):
    decision, seen, _ = run(tmp_path / "whole")
    for interrupted_at in (2, decision.detected_step - 3):
        training, folder = ToyTraining(), tmp_path / f"parts-{interrupted_at}"
        monitor = monitor_of(folder, training)
        for step in range(1, interrupted_at + 1):
            training.step(step)
            monitor.measure(step, step / 10, loss=1.0 / step)
        monitor.save_state(tmp_path / f"checkpoint-{interrupted_at}")
        saved = training.copy()
        for step in range(interrupted_at + 1, interrupted_at + 4):  # these steps are lost in the kill
            training.step(step)
            monitor.measure(step, step / 10, loss=1.0 / step)
        monitor.snapshots.wait()  # a process that was killed writes no more
        training = ToyTraining()
        training.restore(saved)
        monitor = monitor_of(folder, training, resume_from=tmp_path / f"checkpoint-{interrupted_at}")
        for step in range(interrupted_at + 1, 81):
            training.step(step)
            if monitor.measure(step, step / 10, loss=1.0 / step):
                break
        assert monitor.decision == decision
        assert same(monitor.load_snapshot(decision.keep_step), seen[decision.keep_step])
        assert (folder / "cs_history.jsonl").read_text() == (tmp_path / "whole" / "cs_history.jsonl").read_text()


def test_a_resume_after_the_decision_still_has_the_turning_point(tmp_path):
    decision, seen, monitor = run(tmp_path / "run")
    monitor.save_state(tmp_path / "checkpoint")
    again = monitor_of(tmp_path / "run", ToyTraining(), resume_from=tmp_path / "checkpoint")
    assert again.decision == decision
    assert same(again.load_snapshot(decision.keep_step), seen[decision.keep_step])
    assert again.measure(99, 9.9) is None


def test_only_the_newest_checkpoint_holds_snapshots_and_an_older_one_can_still_be_resumed(tmp_path):
    decision = run(tmp_path / "whole")[0]
    training, folder, early = ToyTraining(), tmp_path / "run", decision.keep_step + 2
    monitor = monitor_of(folder, training)
    for step in range(1, decision.detected_step):
        training.step(step)
        monitor.measure(step, step / 10, loss=1.0 / step)
        if step in (early, decision.detected_step - 1):
            monitor.save_state(tmp_path / f"checkpoint-{step}")
            monitor.state_saved(tmp_path / f"checkpoint-{step}")
        if step == early:
            saved = training.copy()
    assert [path.parent.name for path in tmp_path.glob("checkpoint-*/cs_snapshots")] == [f"checkpoint-{step}"]
    training = ToyTraining()
    training.restore(saved)
    monitor = monitor_of(folder, training, resume_from=tmp_path / f"checkpoint-{early}")
    for step in range(early + 1, decision.detected_step + 1):
        training.step(step)
        monitor.measure(step, step / 10, loss=1.0 / step)
    assert monitor.decision.detected_step == decision.detected_step
    assert monitor.decision.keep_step == early + 1 and "nearest step still kept" in monitor.decision.reason
    assert monitor.load_snapshot(early + 1)


def test_training_on_after_the_decision_keeps_it_and_the_newest_finite_weights(tmp_path):
    training = ToyTraining()
    monitor, kept = monitor_of(tmp_path, training), None
    for step in range(1, 60):
        training.step(step)
        if monitor.measure(step, 0.0):
            kept = monitor.load_snapshot(monitor.decision.keep_step)
    assert same(monitor.load_snapshot(monitor.decision.keep_step), kept)
    assert monitor.latest_snapshot_step() == 59
    assert same(monitor.load_snapshot(59), training.copy())
    assert len(list((tmp_path / "cs_snapshots").iterdir())) == 2


def test_divergence_is_raised_before_anything_is_recorded(tmp_path):
    training = ToyTraining()
    monitor = monitor_of(tmp_path, training)
    training.step(1)
    monitor.measure(1, 0.1)
    good = training.copy()
    training.tensors["0.up"][0, 0] = float("nan")
    with pytest.raises(NonFiniteWeightsError):
        monitor.measure(2, 0.2)
    assert len(read_history(tmp_path).records) == 1
    assert same(monitor.load_snapshot(monitor.latest_snapshot_step()), good)


def test_history_is_a_header_then_lines_that_any_reader_can_parse(tmp_path):
    decision, _, _ = run(tmp_path, header={"seed": 7})
    lines = [json.loads(line) for line in (tmp_path / "cs_history.jsonl").read_text().splitlines()]
    header, events = lines[0], [line for line in lines if "event" in line]
    assert header["format"] == "cs-history/1" and header["window"] == WINDOW and header["seed"] == 7
    assert {"cs_interval", "steps_per_epoch", "reduction", "decided_on", "rule"} <= header.keys()
    assert {"step", "epoch", "cs", "cs_row", "cs_matrix", "delta_norm", "loss", "fluctuation"} <= lines[1].keys()
    assert lines[1]["cs"] == lines[1]["cs_matrix"]
    assert events == [
        {
            "event": "turning_point",
            "step": decision.keep_step,
            "detected_at": decision.detected_step,
            "usable": list(decision.usable),
            "reason": decision.reason,
        }
    ]


def test_a_value_that_is_not_finite_becomes_null(tmp_path):
    training = ToyTraining()
    monitor = monitor_of(tmp_path, training)
    monitor.measure(1, 0.1, loss=float("nan"))
    assert read_history(tmp_path).records[0]["loss"] is None


def test_another_runs_history_is_not_written_over(tmp_path):
    run(tmp_path)
    before = (tmp_path / "cs_history.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="another output folder"):
        monitor_of(tmp_path, ToyTraining())
    assert (tmp_path / "cs_history.jsonl").read_bytes() == before


def test_a_checkpoint_without_monitor_is_refused(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(FileNotFoundError, match="calculate_cs"):
        monitor_of(tmp_path / "run", ToyTraining(), resume_from=tmp_path / "checkpoint")


def test_an_unknown_component_and_no_layers_are_refused(tmp_path):
    training = ToyTraining()
    plan = plan_of(components=("unet",))
    with pytest.raises(ValueError, match="'unet' has no LoRA layers"):
        EarlyStopMonitor(tmp_path, plan, training.layers(), None)
    with pytest.raises(ValueError, match="no LoRA layer"):
        EarlyStopMonitor(tmp_path, plan, [], None)


KILLED_WRITER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from es_lora.snapshots import SnapshotStore
store = SnapshotStore(Path(sys.argv[2]), 4, 8_000_000, 1e9)
print("ready", flush=True)
for step in range(1, 100000):
    store.put(step, step, {"x": torch.full((2_000_000,), float(step))})
"""


def test_a_kill_at_any_time_leaves_whole_snapshots_only(tmp_path):
    tree = Path(__file__).resolve().parents[2] / "lora-llm"
    seen = 0
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_WRITER, str(tree), str(folder)], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(0.3 + 0.17 * attempt)
        process.kill()
        process.wait()
        for file in folder.glob("step-*.safetensors"):
            step = int(file.stem.split("-")[1])
            assert torch.equal(load_file(str(file))["x"], torch.full((2_000_000,), float(step)))
            seen += 1
    assert seen > 0


def test_two_checkpoints_of_the_same_measurement_can_both_be_resumed(tmp_path):
    training, folder = ToyTraining(), tmp_path / "run"
    monitor = monitor_of(folder, training)
    step = 0
    while monitor.decision is None:
        step += 1
        training.step(step)
        monitor.measure(step, step / 10, loss=1.0 / step)
    for name in ("of the step", "of the end"):
        monitor.save_state(tmp_path / name)
        monitor.state_saved(tmp_path / name)
    monitor.close()
    for name in ("of the step", "of the end"):
        again = monitor_of(folder, ToyTraining(), resume_from=tmp_path / name)
        assert again.load_snapshot(monitor.decision.keep_step)
    shutil.rmtree(tmp_path / "of the end" / "cs_snapshots")
    with pytest.raises(ValueError, match="no longer holds the weights of its turning point.*go on from the newest"):
        monitor_of(folder, ToyTraining(), resume_from=tmp_path / "of the end")
