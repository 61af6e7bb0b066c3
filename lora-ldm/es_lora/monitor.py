"""The monitor: measures CS, writes the history, keeps snapshots and asks the rule."""

import json
import math
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Union

import torch
from safetensors.torch import save_file

from cs_fluctuation import FluctuationSeries, LoraLayer, measure_layers
from es_lora.average import WeightAverage
from es_lora.files import read_text, write_text_whole, write_whole
from es_lora.gradient_evidence import GradientEvidence
from es_lora.history import HISTORY_FORMAT, HISTORY_NAME
from es_lora.rules import AVERAGED, Decision
from es_lora.settings import MeasurementPlan
from es_lora.snapshots import SNAPSHOT_FOLDER, SnapshotStore
from es_lora.weights import stored_tensors

STATE_NAME = "cs_state.json"
GRADIENTS_NAME = "cs_gradients.safetensors"
AVERAGE_NAME = "cs_average.safetensors"
FLUCTUATION_SCALAR = "cs_fluctuation/step"
SCORED_TWICE = ("heldout_loss",)  # columns that are measured on the averaged weights as well
MEASURED = ("step", "epoch", "cs", "cs_matrix", "cs_row", "delta_norm", "fluctuation", "loss", "lr")  # in every run


def scalars(record: Dict[str, Any]) -> Dict[str, float]:
    """{published name: value} of a measurement, for TensorBoard and the like."""
    cs = record["cs"]
    values = {f"{part}_cs/step": value for part, value in cs.items() if part != "all"}
    values["total_cs/step"] = cs["all"]
    if "lm" in cs:
        values = {"cs/steps": cs["lm"]}
    if record["fluctuation"] is not None:
        values[FLUCTUATION_SCALAR] = record["fluctuation"]
    return values


class EarlyStopMonitor:
    """Measures CS as its plan says, averages, writes the history, keeps snapshots, asks the rule.

    folder: where cs_history.jsonl and the snapshots go. plan: of es_lora.settings.
    layers: the LoRA layers, live. tensors: gives {name: live tensor}, what a snapshot holds, or the
    average of it; None keeps no snapshots.
    header: further facts for the first line of the history.
    evidence: a GradientEvidence over the trained matrices, or None: grad_evidence is null.
    columns: {name: function} of further columns, called at every measurement: a float or None.
    resume_from: a folder that save_state wrote; the history goes on from there.
    It never exits, prints or kills: `measure` returns the Decision once, and the trainer acts.
    Raises FileExistsError where the folder holds the history of another run, FileNotFoundError
    where resume_from holds no state, ValueError for a component that no layer has and for a rule
    that needs a column that is not recorded."""

    def __init__(
        self,
        folder: Union[str, Path],
        plan: MeasurementPlan,
        layers: Sequence[LoraLayer],
        tensors: Optional[Callable[[], Dict[str, torch.Tensor]]],
        *,
        header: Optional[Dict[str, Any]] = None,
        resume_from: Union[str, Path, None] = None,
        evidence: Optional[GradientEvidence] = None,
        columns: Optional[Dict[str, Callable[[], Optional[float]]]] = None,
    ):
        self.columns, self.evidence = columns if columns is not None else {}, evidence
        self.folder, self.layers, self.tensors = Path(folder), list(layers), tensors or dict
        self.plan, self.rule, self.reduction = plan, plan.rule(), plan.stop.cs_reduction
        self.history_path = self.folder / HISTORY_NAME
        self._check()
        if resume_from is None and self.history_path.exists():
            raise FileExistsError(f"{self.history_path} is the history of another run; choose another output folder")
        self.decision: Optional[Decision] = None
        self.series = FluctuationSeries(plan.window)
        self.measurements = 0
        self.notes: Dict[str, Any] = {}  # what the trainer saved beside the state it goes on from
        self._state_folder: Optional[Path] = None  # the newest whole checkpoint
        self._state_measurements = 0  # those that it holds
        self.last_record: Optional[Dict[str, Any]] = None  # the history line written last
        self.average: Optional[WeightAverage] = None
        if tensors is not None and plan.average:
            self.average = WeightAverage(tensors, plan.average)
        self.snapshots: Optional[SnapshotStore] = None
        if tensors is not None:
            bytes_each = sum(tensor.numel() * tensor.element_size() for tensor in tensors().values())
            count, disk_bytes = self.rule.lookback() + 1, plan.stop.snapshot_disk_gb * 1e9
            self.snapshots = SnapshotStore(self.folder / SNAPSHOT_FOLDER, count, bytes_each, disk_bytes)
        self.header = {"format": HISTORY_FORMAT, **plan.header(), **(header or {})}
        self._lines: List[Dict[str, Any]] = []
        if resume_from is not None:
            self._load_state(Path(resume_from))

    def _check(self) -> None:
        components = {layer.component for layer in self.layers} | {"all"}
        if not self.layers:
            raise ValueError("no LoRA layer to measure; CS needs at least one frozen weight with a LoRA update")
        if self.plan.component not in components:
            raise ValueError(
                f"component {self.plan.component!r} has no LoRA layers; choose one of {sorted(components)}"
            )
        if self.reduction not in ("matrix", "row"):
            raise ValueError(f"CS reduction {self.reduction!r} is unknown; use 'matrix' or 'row'")
        recorded = {*MEASURED, *self.columns, *(["grad_evidence"] if self.evidence is not None else [])}
        if self.plan.average:
            recorded |= {name + AVERAGED for name in SCORED_TWICE if name in self.columns}
        missing = [column for column in self.rule.needs if column not in recorded]
        if missing:
            needed = f"the rule {self.rule.name} needs {', '.join(missing)}, which is not recorded here"
            raise ValueError(f"{needed}: provide it among the columns, or choose another rule")

    def _write(self, line: Dict[str, Any]) -> None:
        new = [line] if self._lines else [self.header, line]
        self._lines.append(line)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.history_path, "a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(entry, allow_nan=False) + "\n" for entry in new))

    def after_step(self) -> None:
        """Take the weights of a completed optimizer step into the average. Call it after each
        one, before `measure`."""
        if self.average is not None:
            self.average.update()

    def kept_tensors(self) -> Dict[str, torch.Tensor]:
        """{name: tensor} of the weights that are kept now: averaged, or the live ones."""
        return self.average.tensors() if self.average is not None else self.tensors()

    def _measured_columns(self) -> Dict[str, Optional[float]]:
        values = {name: function() for name, function in self.columns.items()}
        if self.average is not None:
            with self.average.in_place():
                values.update({name + AVERAGED: self.columns[name]() for name in SCORED_TWICE if name in values})
        return values

    def measure(self, step: int, epoch: float, **columns: Any) -> Optional[Decision]:
        """Measure after optimizer step `step`; returns the rule's Decision once, None otherwise.

        columns: further columns of the history (loss, lr, ...); a value that is not finite is null.
        Raises NonFiniteWeightsError, before anything is recorded, for diverged weights."""
        measured = measure_layers(self.layers)
        cs = measured[f"cs_{self.reduction}"]
        record: Dict[str, Any] = {"step": step, "epoch": round(epoch, 6), "cs": cs, **measured}
        record["fluctuation"] = self.series.update(record["cs"][self.plan.component]).fluctuation
        record["grad_evidence"] = self.evidence.value() if self.evidence is not None else None
        for name, value in {**columns, **self._measured_columns()}.items():
            record[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        if self.snapshots is not None:
            self.snapshots.put(self.measurements, step, self.kept_tensors())
        self.measurements += 1
        self.last_record = record
        self._write(record)
        decision = self.rule.update(record) if self.decision is None else None
        at_end = decision is None and self.decision is None and self.plan.is_last(step)
        if at_end:
            decision = self.rule.at_end(record)
        if decision is not None:
            self._decide(decision, at_end)
            return self.decision
        return None

    def _decide(self, decision: Decision, at_end: bool) -> None:
        if self.snapshots is not None:
            kept = self.snapshots.nearest_before(decision.keep_step)
            if kept is None:  # thinned out and just resumed
                kept, self.snapshots.every = decision.detected_step, 1
                self.snapshots.put(self.measurements - 1, kept, self.kept_tensors())
            if kept != decision.keep_step:
                decision = replace(
                    decision, keep_step=kept, reason=f"{decision.reason} The nearest step still kept is {kept}."
                )
            self.snapshots.pin(kept)
        self.decision = decision
        facts = {"detected_at": decision.detected_step, "usable": list(decision.usable), "reason": decision.reason}
        self.note("turning_point", decision.keep_step, **facts, **({"at_end": True} if at_end else {}))

    def note(self, event: str, step: int, **facts: Any) -> None:
        """Write an event into the history, such as an evaluation with its heldout_loss."""
        self._write({"event": event, "step": step, **facts})

    def note_heldout(self, step: int, loss: Optional[float], averaged: bool = False) -> None:
        """Write the held-out loss of a step's weights, or of their average, where it is finite."""
        if loss is not None and math.isfinite(loss):
            self.note("evaluation", step, **{"heldout_loss" + (AVERAGED if averaged else ""): loss})

    def latest_snapshot_step(self) -> Optional[int]:
        """The newest step whose weights are kept; they are finite."""
        return self.snapshots.kept[-1][1] if self.snapshots is not None and self.snapshots.kept else None

    def load_snapshot(self, step: int) -> Dict[str, torch.Tensor]:
        """{name: tensor} of that step, on the CPU. Raises FileNotFoundError if it is not kept."""
        if self.snapshots is None:
            raise FileNotFoundError("this run keeps no snapshots")
        return self.snapshots.load(step)

    def state_dict(self) -> Dict[str, Any]:
        """Everything but the snapshots themselves, as plain JSON values."""
        return {"lines": list(self._lines), "snapshots": list(self.snapshots.kept) if self.snapshots else []}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on from a saved state: series and rule see the records again; history is rewritten."""
        self._lines = [line for line in state["lines"] if not self._decides_anew(line)]
        for line in self._lines:
            if line.get("event") == "turning_point":
                self.decision = Decision(line["step"], line["detected_at"], tuple(line["usable"]), line["reason"])
            elif "event" not in line:
                self.series.update(line["cs"][self.plan.component])
                self.measurements += 1
                if self.decision is None:
                    self.rule.update(line)
        lines = [self.header, *self._lines] if self._lines else []
        write_text_whole(self.history_path, "".join(json.dumps(line) + "\n" for line in lines))

    def _decides_anew(self, line: Dict[str, Any]) -> bool:
        """Whether it is a decision at the end of a budget, and this run's is a longer one."""
        return bool(line.get("at_end")) and not self.plan.is_last(line["detected_at"])

    def save_state(self, folder: Union[str, Path], **notes: Any) -> None:
        """Put the state and hard links to the snapshots into a checkpoint's folder.
        notes: plain values of the trainer's own, which `notes` holds after a resume."""
        if self.snapshots is not None:
            self.snapshots.copy_to(Path(folder) / SNAPSHOT_FOLDER)
        for name, part in ((GRADIENTS_NAME, self.evidence), (AVERAGE_NAME, self.average)):
            if part is not None:
                write_whole(Path(folder) / name, partial(save_file, part.state_tensors()))
        write_text_whole(Path(folder) / STATE_NAME, json.dumps({**self.state_dict(), "notes": notes}))

    def state_saved(self, folder: Union[str, Path]) -> None:
        """Say that the checkpoint in `folder` is whole: the one before it loses its snapshots.

        Else every checkpoint would hold a window of snapshots. An older checkpoint can still be
        resumed; its run then keeps a later step if the turning point lies before the resumption. Of
        two of the same measurement both can be resumed."""
        before, measured = self._state_folder, self._state_measurements
        self._state_measurements = self.measurements
        if before is not None and before != Path(folder) and before.is_dir() and measured != self.measurements:
            times = before.stat()
            shutil.rmtree(before / SNAPSHOT_FOLDER, ignore_errors=True)
            os.utime(before, ns=(times.st_atime_ns, times.st_mtime_ns))  # trainers rotate by these
        self._state_folder = Path(folder)

    def _load_state(self, folder: Path) -> None:
        if not (folder / STATE_NAME).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {STATE_NAME}: that run did not measure CS; go on without it (--calculate_cs False) "
                "or start anew"
            )
        lacking = "take an older checkpoint, or start anew"
        if self.evidence is not None and not (folder / GRADIENTS_NAME).is_file():
            raise ValueError(f"{folder} holds no {GRADIENTS_NAME}, the means of the gradients: {lacking}")
        if self.average is not None and not (folder / AVERAGE_NAME).is_file():
            raise ValueError(f"{folder} holds no averaged weights; go on with --average 0, or start anew")
        try:
            state = json.loads(read_text(folder / STATE_NAME))
            self.notes = dict(state.get("notes", {}))
            if not all(list(map(type, pair)) == [int, int] for pair in state["snapshots"]):
                raise TypeError("its snapshots are no pairs of numbers")
            if self.snapshots is not None:
                self.snapshots.copy_from(folder / SNAPSHOT_FOLDER, state["snapshots"])
            for name, part in ((GRADIENTS_NAME, self.evidence), (AVERAGE_NAME, self.average)):
                if part is not None:
                    part.load_state_tensors(dict(stored_tensors(folder / name)))
            self.load_state_dict(state)
        except (AttributeError, KeyError, TypeError, IndexError, json.JSONDecodeError, RecursionError) as error:
            words = f"{type(error).__name__}: {error}"
            raise ValueError(f"the state of the measurements in {folder} is damaged ({words}): {lacking}") from error
        self._state_folder, self._state_measurements = folder, self.measurements
        if self.snapshots is not None and self.decision is not None:
            if not self.snapshots.path(self.decision.keep_step).is_file():  # found now rather than missed at the end
                raise ValueError(
                    f"{folder} no longer holds the weights of its turning point, step {self.decision.keep_step}: a "
                    "newer checkpoint took them over; go on from the newest one, or start anew"
                )
            self.snapshots.pin(self.decision.keep_step)

    def close(self) -> None:
        """Delete the snapshots and watch no more gradients; the history stays."""
        if self.evidence is not None:
            self.evidence.close()
        if self.snapshots is not None:
            self.snapshots.delete()
