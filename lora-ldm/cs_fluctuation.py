"""CS, CS-Fluctuation, the early-stop monitor and its snapshots.

The method is that of "Towards Personalized AI: Early-stopping Low-Rank Adaptation of Foundation Models" (ICLR 2024
R2-FM workshop). CS is the cosine similarity between a frozen weight W and its LoRA update B A; CS-Fluctuation tells how
much that similarity still moves. This file knows no trainer: it sees tensors, steps and a rule (stop_rules.py).

The same file stands in lora-ldm/ and lora-llm/ and is copied into other trainers by the patches, so it runs on Python
3.8, torch 1.13 and numpy 1.24 as well.
"""

import json
import math
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from gradient_evidence import GradientEvidence
from safetensors.torch import load_file, save_file

HISTORY_NAME = "cs_history.jsonl"
HISTORY_FORMAT = "cs-history/1"
STATE_NAME = "cs_state.json"
GRADIENTS_NAME = "cs_gradients.safetensors"
SNAPSHOT_FOLDER = "cs_snapshots"
BLOCK_VALUES = 4_000_000  # largest part of a weight that is held in float32 at once


MEASURED = ("step", "epoch", "cs", "cs_matrix", "cs_row", "delta_norm", "fluctuation", "loss", "lr")  # in every run


class NonFiniteWeightsError(RuntimeError):
    """A LoRA weight is NaN or infinite: training has diverged."""


# ------------------------------------------------------------------------------------------------ the cosines


class DenseWeight:
    """A frozen weight held as a tensor (out, in) or, for a convolution, (out, in, kh, kw).

    A kind of weight that is stored otherwise (quantised, transposed) overrides `dense`.
    """

    def __init__(self, weight: Any):
        self.weight = weight

    def dense(self) -> torch.Tensor:
        """W as stored, or made for this one use and dropped after it."""
        return self.weight

    def _row_blocks(self):
        weight = self.dense().detach()
        rows = max(1, BLOCK_VALUES // max(1, weight[0].numel()))
        for start in range(0, weight.shape[0], rows):
            block = weight[start : start + rows].flatten(1)  # (rows, in)
            yield block.to(torch.promote_types(block.dtype, torch.float32))

    def project(self, down: torch.Tensor) -> torch.Tensor:
        """W A^T (out, r) for lora_down A (r, in)."""
        return torch.cat([block @ down.to(block).T for block in self._row_blocks()])

    def row_norms(self) -> torch.Tensor:
        """||W[i]|| for every row i (out,)."""
        return torch.cat([block.norm(dim=1) for block in self._row_blocks()])


class LoraLayer:
    """One adapted layer: the frozen weight and live references to its LoRA matrices.

    name: the layer's name in its model. component: "unet", "te", "te1", "te2", "lm", ...
    weight: a tensor (out, in) or (out, in, kh, kw), or any object with `project(down)` and `row_norms()` as DenseWeight.
    down: lora_down A (r, in) or (r, in, kh, kw). up: lora_up B (out, r) or (out, r, 1, 1).
    """

    def __init__(self, name: str, component: str, weight: Any, down: torch.Tensor, up: torch.Tensor):
        self.name, self.component, self.down, self.up = name, component, down, up
        self.weight = DenseWeight(weight) if isinstance(weight, torch.Tensor) else weight
        self._weight_norms: Optional[torch.Tensor] = None

    def weight_norms(self) -> torch.Tensor:
        """||W[i]|| (out,), computed once: the weight is frozen."""
        if self._weight_norms is None:
            self._weight_norms = self.weight.row_norms()
        return self._weight_norms


@torch.no_grad()
def _row_products(layer: LoraLayer) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per row i: <W[i], (BA)[i]>, ||W[i]|| and ||(BA)[i]||, each (out,). B A is never formed."""
    dtype = torch.promote_types(layer.down.dtype, torch.float32)
    down = layer.down.detach().flatten(1).to(dtype)  # A (r, in)
    projected = layer.weight.project(down)  # U = W A^T (out, r)
    up = layer.up.detach().flatten(1).to(projected)  # B (out, r)
    gram = (down @ down.T).to(projected)  # G = A A^T (r, r)
    dots = (projected * up).sum(1)
    update_norms = ((up @ gram) * up).sum(1).clamp_min(0).sqrt()  # rounding may leave a tiny negative square
    return dots, layer.weight_norms().to(projected), update_norms


def _quotient(dots: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """dots / norms, and 0 where a norm is 0: a zero update or a zero weight has no direction."""
    return torch.where(norms > 0, dots / torch.where(norms > 0, norms, torch.ones_like(norms)), torch.zeros_like(dots))


def _cosines(layer: LoraLayer) -> torch.Tensor:
    """(matrix cosine, row cosine, squared norm of B A) as one tensor (3,) on the layer's device."""
    dots, weight_norms, update_norms = _row_products(layer)
    matrix = _quotient(dots.sum(), weight_norms.norm() * update_norms.norm())
    row = _quotient(dots, weight_norms * update_norms).mean()
    return torch.stack([matrix, row, update_norms.square().sum()])


def layer_cosine(layer: LoraLayer, reduction: str = "matrix") -> float:
    """CS of one layer (paper, section 3).

    "matrix": <W, BA> / (||W|| ||BA||). "row": the mean over rows i of cos(W[i], (BA)[i]).

    Raises ValueError for another reduction.
    """
    if reduction not in ("matrix", "row"):
        raise ValueError(f"CS reduction {reduction!r} is unknown; use 'matrix' (diffusion) or 'row' (language models)")
    return _cosines(layer)[0 if reduction == "matrix" else 1].item()


def measure_each(layers: Sequence[LoraLayer]) -> List[List[float]]:
    """[matrix cosine, row cosine, squared norm of B A] of every layer. One transfer from the device.

    Raises NonFiniteWeightsError where a LoRA matrix holds NaN or infinity.
    """
    values = [_cosines(layer) for layer in layers]
    table = torch.stack([value.to(values[0]) for value in values]).tolist()
    for layer, row in zip(layers, table):
        if not math.isfinite(sum(row)):
            raise NonFiniteWeightsError(f"the LoRA weights of layer {layer.name} are NaN or infinite: training has diverged")
    return table


def measure_layers(layers: Sequence[LoraLayer]) -> Dict[str, Dict[str, float]]:
    """Both cosines and the update norm of all layers: {"cs_matrix", "cs_row", "delta_norm": {component: value}}.

    A component's cosine is the mean over its layers, "all" the mean over all layers; delta_norm is the root of the
    summed squares of ||BA||.
    Raises NonFiniteWeightsError where a LoRA matrix holds NaN or infinity.
    """
    table = measure_each(layers)
    result: Dict[str, Dict[str, float]] = {"cs_matrix": {}, "cs_row": {}, "delta_norm": {}}
    components = list(dict.fromkeys(layer.component for layer in layers))
    for component in [*components, "all"]:
        rows = [row for layer, row in zip(layers, table) if component in ("all", layer.component)]
        result["cs_matrix"][component] = math.fsum(row[0] for row in rows) / len(rows)
        result["cs_row"][component] = math.fsum(row[1] for row in rows) / len(rows)
        result["delta_norm"][component] = math.sqrt(math.fsum(row[2] for row in rows))
    return result


def mean_cosine(layers: Sequence[LoraLayer], reduction: str = "matrix") -> Dict[str, float]:
    """CS {component: mean over its layers, "all": mean over all layers}."""
    return measure_layers(layers)[f"cs_{reduction}"]


# ------------------------------------------------------------------------------------------------ CS-Fluctuation


@dataclass(frozen=True)
class FluctuationPoint:
    """What the series knows after one measurement; None until enough measurements are there."""

    mean_cs: Optional[float]  # MA: mean of the last M values of CS
    difference: Optional[float]  # D: MA_k - MA_(k-1)
    mean_difference: Optional[float]  # X: mean of the last M values of D
    fluctuation: Optional[float]  # F: population variance of the last M values of X


class FluctuationSeries:
    """CS-Fluctuation of a stream of CS values in O(M) memory (paper, section 3).

    window: M, in measurements. The first F comes with measurement 3M-1.
    """

    def __init__(self, window: int):
        if window < 1:
            raise ValueError(f"window is {window}; it counts measurements and must be at least 1")
        self.window = window
        self._cs: deque = deque(maxlen=window)
        self._differences: deque = deque(maxlen=window)
        self._mean_differences: deque = deque(maxlen=window)
        self._previous_mean: Optional[float] = None

    def _mean_if_full(self, values: deque) -> Optional[float]:
        return math.fsum(values) / self.window if len(values) == self.window else None

    def update(self, cs: float) -> FluctuationPoint:
        """Take the next CS value; means are computed afresh, so that a constant series gives exactly 0."""
        self._cs.append(cs)
        mean_cs = self._mean_if_full(self._cs)
        difference = None
        if mean_cs is not None and self._previous_mean is not None:
            difference = mean_cs - self._previous_mean
            self._differences.append(difference)
        self._previous_mean = mean_cs
        mean_difference = self._mean_if_full(self._differences)
        fluctuation = None
        if mean_difference is not None:
            self._mean_differences.append(mean_difference)
            centre = self._mean_if_full(self._mean_differences)
            if centre is not None:
                fluctuation = math.fsum((x - centre) ** 2 for x in self._mean_differences) / self.window
        return FluctuationPoint(mean_cs, difference, mean_difference, fluctuation)


# ------------------------------------------------------------------------------------------------ snapshots


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write(temporary path)` make the file, flush it to the disk, then give it its name in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def write_text_whole(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)  # no disk, no time; a snapshot never changes after it has its name
    except OSError:
        write_whole(target, lambda temporary: shutil.copyfile(source, temporary))


class SnapshotStore:
    """Copies of the LoRA weights of the last `count` measurements, on disk, written by a thread of its own.

    A snapshot is safe under a kill (written aside, then renamed), and at most one is on its way at a time. Where `count`
    of them would exceed disk_bytes, only those of every n-th measurement are kept (`every`).
    Raises ValueError where not even one fits.
    """

    def __init__(self, folder: Path, count: int, snapshot_bytes: int, disk_bytes: float):
        if 2 * snapshot_bytes > disk_bytes:
            raise ValueError(
                f"a snapshot of the LoRA weights takes {snapshot_bytes / 1e9:.3g} GB and two must fit into the "
                f"{disk_bytes / 1e9:.3g} GB allowed; raise --snapshot_disk_gb or lower the rank"
            )
        self.folder, self.count = folder, count
        # Thinned out, the window still needs one snapshot before its start, and one more lies there while it is replaced.
        self.every = max(1, math.ceil(count / max(1, disk_bytes // max(1, snapshot_bytes) - 2)))
        self.pinned_step: Optional[int] = None
        self.kept: List[Tuple[int, int]] = []  # (measurement, step), oldest first
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._pending: Any = None
        shutil.rmtree(folder, ignore_errors=True)  # left there by a run that was killed

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def wait(self) -> None:
        """Return when the last snapshot is on disk; an error of the writer (a full disk) is raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def put(self, measurement: int, step: int, tensors: Dict[str, torch.Tensor]) -> None:
        """Copy the tensors of this step, hand them to the writer, and let it delete what can no longer be asked for."""
        if measurement % self.every:
            return
        self.wait()
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self.kept.append((measurement, step))
        self._pending = self._writer.submit(self._write, step, copies, self._forget_old())

    def _write(self, step: int, copies: Dict[str, torch.Tensor], old_steps: List[int]) -> None:
        write_whole(self.path(step), lambda temporary: save_file(copies, str(temporary)))
        for old in old_steps:
            self.path(old).unlink(missing_ok=True)

    def _forget_old(self) -> List[int]:
        """Keep the newest entry at or before the oldest measurement needed, and all after it; give the other steps."""
        oldest_needed = self.kept[-1][0] - self.count + 1
        first = max((m for m, _ in self.kept if m <= oldest_needed), default=0)
        old_steps = [step for measurement, step in self.kept if measurement < first and step != self.pinned_step]
        self.kept = [entry for entry in self.kept if entry[1] not in old_steps]
        return old_steps

    def nearest_before(self, step: int) -> Optional[int]:
        """The newest kept step at or before `step`, the oldest kept one where there is none, None where none is kept."""
        return max((s for _, s in self.kept if s <= step), default=self.kept[0][1] if self.kept else None)

    def pin(self, step: int) -> None:
        """Keep this step for good and, from now on, only the newest one beside it."""
        self.wait()
        self.pinned_step, self.count, self.every = step, 1, 1
        for old in self._forget_old():
            self.path(old).unlink(missing_ok=True)

    def load(self, step: int) -> Dict[str, torch.Tensor]:
        """{name: tensor} of a kept step, on the CPU. Raises FileNotFoundError where it is not kept."""
        self.wait()
        if not self.path(step).is_file():
            raise FileNotFoundError(f"no snapshot of step {step} in {self.folder}; kept are {[s for _, s in self.kept]}")
        return load_file(str(self.path(step)))

    def copy_to(self, folder: Path) -> None:
        self.wait()
        for _, step in self.kept:
            _link_or_copy(self.path(step), folder / self.path(step).name)

    def copy_from(self, folder: Path, kept: Sequence[Sequence[int]]) -> None:
        self.kept = [(index, step) for index, step in kept if (folder / self.path(step).name).is_file()]
        for _, step in self.kept:
            _link_or_copy(folder / self.path(step).name, self.path(step))

    def delete(self) -> None:
        """Remove every snapshot: the run has ended and what it keeps has been saved."""
        self._writer.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ the monitor


@dataclass(frozen=True)
class Decision:
    """A rule's answer: the weights of keep_step are the result, and those of the steps in `usable` (first, last) would do."""

    keep_step: int
    detected_step: int
    usable: Tuple[int, int]
    reason: str  # one plain sentence


class EarlyStopMonitor:
    """Measures CS every cs_interval optimizer steps, writes the history, keeps snapshots and asks the rule.

    folder: where cs_history.jsonl and the snapshots go. rule: an object of stop_rules.
    layers: the LoRA layers, live. tensors: gives {name: live tensor}, what a snapshot holds; None keeps no snapshots.
    reduction: "matrix" or "row", the cosine that the rule sees as column `cs`. header: further facts for line one.
    evidence: a GradientEvidence over the trained matrices, for the column grad_evidence; None leaves it null.
    columns: {name: function} of further columns; each is called at every measurement and gives a float or None.
    resume_from: a folder that save_state wrote; the history goes on from there.
    It never exits, prints or kills: `measure` returns the Decision once, and the trainer acts.
    Raises FileExistsError where the folder holds the history of another run, FileNotFoundError where resume_from holds
    no state, ValueError for a component that no layer has and for a rule that needs a column that is not recorded.
    """

    def __init__(
        self,
        folder: Union[str, Path],
        rule: Any,
        layers: Sequence[LoraLayer],
        tensors: Optional[Callable[[], Dict[str, torch.Tensor]]],
        *,
        cs_interval: int,
        reduction: str,
        header: Optional[Dict[str, Any]] = None,
        snapshot_disk_bytes: float = 20e9,
        resume_from: Union[str, Path, None] = None,
        evidence: Optional[GradientEvidence] = None,
        columns: Optional[Dict[str, Callable[[], Optional[float]]]] = None,
    ):
        self.columns, self.evidence = columns if columns is not None else {}, evidence
        self.folder, self.rule, self.layers, self.tensors = Path(folder), rule, list(layers), tensors
        self.cs_interval, self.reduction, self.component = cs_interval, reduction, rule.settings.component
        self.history_path = self.folder / HISTORY_NAME
        self._check()
        if resume_from is None and self.history_path.exists():
            raise FileExistsError(f"{self.history_path} is the history of another run; choose another output folder")
        self.decision: Optional[Decision] = None
        self.series = FluctuationSeries(rule.settings.window)
        self.measurements = 0
        self._state_folder: Optional[Path] = None  # the newest whole checkpoint
        self.last_record: Optional[Dict[str, Any]] = None  # the history line written last
        self.snapshots: Optional[SnapshotStore] = None
        if tensors is not None:
            bytes_each = sum(tensor.numel() * tensor.element_size() for tensor in tensors().values())
            store = self.folder / SNAPSHOT_FOLDER
            self.snapshots = SnapshotStore(store, rule.lookback() + 1, bytes_each, snapshot_disk_bytes)
        self.header = {
            "format": HISTORY_FORMAT,
            "cs_interval": cs_interval,
            "reduction": reduction,
            "decided_on": self.component,
            "rule": rule.name,
            "window": rule.settings.window,
            "steps_per_epoch": rule.settings.steps_per_epoch,
            "valley": rule.settings.valley,
            "rule_value": rule.settings.value,
            **(header or {}),
        }
        self._lines: List[Dict[str, Any]] = []
        if resume_from is not None:
            self._load_state(Path(resume_from))

    def _check(self) -> None:
        components = {layer.component for layer in self.layers} | {"all"}
        if not self.layers:
            raise ValueError("no LoRA layer to measure; CS needs at least one frozen weight with a LoRA update")
        if self.component not in components:
            raise ValueError(f"component {self.component!r} has no LoRA layers; choose one of {sorted(components)}")
        if self.reduction not in ("matrix", "row"):
            raise ValueError(f"CS reduction {self.reduction!r} is unknown; use 'matrix' or 'row'")
        recorded = {*MEASURED, *self.columns, *(["grad_evidence"] if self.evidence is not None else [])}
        missing = [column for column in self.rule.needs if column not in recorded]
        if missing:
            needed = f"the rule {self.rule.name} needs {', '.join(missing)}, which is not recorded here"
            raise ValueError(f"{needed}: provide it among the columns, or choose another rule")

    def due(self, step: int) -> bool:
        """Whether `step`, counted in completed optimizer steps, is one to measure at."""
        return step > 0 and step % self.cs_interval == 0

    def _write(self, line: Dict[str, Any]) -> None:
        new = [line] if self._lines else [self.header, line]
        self._lines.append(line)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.history_path, "a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(entry, allow_nan=False) + "\n" for entry in new))

    def measure(self, step: int, epoch: float, **columns: Any) -> Optional[Decision]:
        """Measure after optimizer step `step`; returns the rule's Decision once, None otherwise.

        columns: further columns of the history (loss, lr, heldout_loss, ...); a value that is not finite becomes null.
        Raises NonFiniteWeightsError, before anything is recorded, where the weights have diverged.
        """
        measured = measure_layers(self.layers)
        record = {"step": step, "epoch": round(epoch, 6), "cs": measured[f"cs_{self.reduction}"], **measured}
        record["fluctuation"] = self.series.update(record["cs"][self.component]).fluctuation
        record["grad_evidence"] = self.evidence.value() if self.evidence is not None else None
        measured_now = {name: function() for name, function in self.columns.items()}
        for name, value in {**columns, **measured_now}.items():
            record[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        if self.snapshots is not None:
            self.snapshots.put(self.measurements, step, self.tensors())
        self.measurements += 1
        self.last_record = record
        self._write(record)
        decision = self.rule.update(record) if self.decision is None else None
        if decision is not None:
            self._decide(decision)
            return self.decision
        return None

    def _decide(self, decision: Decision) -> None:
        if self.snapshots is not None:
            kept = self.snapshots.nearest_before(decision.keep_step)
            if kept is None:  # thinned out and just resumed
                kept, self.snapshots.every = decision.detected_step, 1
                self.snapshots.put(self.measurements - 1, kept, self.tensors())
            if kept != decision.keep_step:
                decision = replace(decision, keep_step=kept, reason=f"{decision.reason} The nearest step still kept is {kept}.")
            self.snapshots.pin(kept)
        self.decision = decision
        facts = {"detected_at": decision.detected_step, "usable": list(decision.usable), "reason": decision.reason}
        self.note("turning_point", decision.keep_step, **facts)

    def note(self, event: str, step: int, **facts: Any) -> None:
        """Write an event into the history, such as an evaluation with its heldout_loss."""
        self._write({"event": event, "step": step, **facts})

    def latest_snapshot_step(self) -> Optional[int]:
        """The newest step whose weights are kept; they are finite."""
        return self.snapshots.kept[-1][1] if self.snapshots is not None and self.snapshots.kept else None

    def load_snapshot(self, step: int) -> Dict[str, torch.Tensor]:
        """{name: tensor} as at that step, on the CPU. Raises FileNotFoundError where it is not kept."""
        if self.snapshots is None:
            raise FileNotFoundError("this run keeps no snapshots")
        return self.snapshots.load(step)

    def state_dict(self) -> Dict[str, Any]:
        """Everything but the snapshots themselves, as plain JSON values."""
        return {"lines": list(self._lines), "snapshots": list(self.snapshots.kept) if self.snapshots else []}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on from a saved state: series and rule see the recorded measurements again, the history is rewritten."""
        self._lines = list(state["lines"])
        for line in self._lines:
            if line.get("event") == "turning_point":
                self.decision = Decision(line["step"], line["detected_at"], tuple(line["usable"]), line["reason"])
            elif "event" not in line:
                self.series.update(line["cs"][self.component])
                self.measurements += 1
                if self.decision is None:
                    self.rule.update(line)
        lines = [self.header, *self._lines] if self._lines else []
        write_text_whole(self.history_path, "".join(json.dumps(line) + "\n" for line in lines))

    def save_state(self, folder: Union[str, Path]) -> None:
        """Put the state and hard links to the snapshots into a checkpoint's folder."""
        if self.snapshots is not None:
            self.snapshots.copy_to(Path(folder) / SNAPSHOT_FOLDER)
        if self.evidence is not None:
            state = self.evidence.state_tensors()
            write_whole(Path(folder) / GRADIENTS_NAME, lambda temporary: save_file(state, str(temporary)))
        write_text_whole(Path(folder) / STATE_NAME, json.dumps(self.state_dict()))

    def state_saved(self, folder: Union[str, Path]) -> None:
        """Say that the checkpoint in `folder` is whole: the one before it no longer needs its snapshots, and loses them.

        Without that, every checkpoint would hold a window of snapshots on the disk. An older checkpoint can still be resumed;
        its run then keeps a later step if the turning point lies before the resumption.
        """
        if self._state_folder is not None and self._state_folder != Path(folder):
            shutil.rmtree(self._state_folder / SNAPSHOT_FOLDER, ignore_errors=True)
        self._state_folder = Path(folder)

    def _load_state(self, folder: Path) -> None:
        if not (folder / STATE_NAME).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {STATE_NAME}: that run did not measure CS; go on without it (--calculate_cs False) "
                "or start anew"
            )
        state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        if self.snapshots is not None:
            self.snapshots.copy_from(folder / SNAPSHOT_FOLDER, state["snapshots"])
        if self.evidence is not None and (folder / GRADIENTS_NAME).is_file():
            self.evidence.load_state_tensors(load_file(str(folder / GRADIENTS_NAME)))
        self.load_state_dict(state)
        self._state_folder = folder
        if self.snapshots is not None and self.decision is not None:
            self.snapshots.load(self.decision.keep_step)  # found now rather than missed at the end
            self.snapshots.pin(self.decision.keep_step)

    def close(self) -> None:
        """Delete the snapshots and watch no more gradients; the history stays."""
        if self.evidence is not None:
            self.evidence.close()
        if self.snapshots is not None:
            self.snapshots.delete()
