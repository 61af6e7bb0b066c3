"""The state of a run on disk: all that --resume needs to go on as if it had never stopped.

A state is a folder: lora.safetensors, optimizer.pt (tensors and numbers only), random-RANK.pt,
progress.json, files of the early-stop monitor and the shadows. It appears whole or not at all."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from safetensors.torch import save_file

from base.files import read_json, readable
from base.random_state import random_state, restore_random_state
from base.tensor_files import differences, first_line, read_tensors, shapes_of
from es_lora.command_line import is_out_of_memory
from es_lora.files import flush_all, replace_folder
from es_lora.monitor import EarlyStopMonitor
from training.optimizers import Optimization
from training.processes import Processes
from training.shadows import ShadowNetworks

SHADOWS_NAME = "shadows.safetensors"
FORMAT = "es-lora-ldm-state/1"
LARGEST_COUNT = 2**53  # of steps and losses; above it a float does not count on


@dataclass
class Progress:
    """Where a run stands. step: completed optimizer steps; the losses: the logs' sums so far."""

    seed: int
    steps_per_epoch: int
    step: int = 0
    loss_sum: float = 0.0  # since the last CS measurement
    loss_count: int = 0
    epoch_loss_sum: float = 0.0  # since the epoch began
    epoch_loss_count: int = 0

    @property
    def epoch(self) -> tuple[int, int]:
        """Completed epochs, and steps done in the one that has begun."""
        return divmod(self.step, self.steps_per_epoch)

    def add_loss(self, loss: float) -> None:
        self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
        self.epoch_loss_sum, self.epoch_loss_count = self.epoch_loss_sum + loss, self.epoch_loss_count + 1

    def take_mean_loss(self) -> Optional[float]:
        """Mean loss since the last call; None where there was no step."""
        mean = self.loss_sum / self.loss_count if self.loss_count else None
        self.loss_sum, self.loss_count = 0.0, 0
        return mean

    def begin_epoch(self) -> None:
        self.epoch_loss_sum, self.epoch_loss_count = 0.0, 0

    @property
    def epoch_mean_loss(self) -> float:
        return self.epoch_loss_sum / self.epoch_loss_count if self.epoch_loss_count else float("nan")


def save_state(
    folder: Path,
    processes: Processes,
    progress: Progress,
    network: Any,
    optimization: Optimization,
    monitor: Optional[EarlyStopMonitor],
    shadows: Optional[ShadowNetworks],
) -> None:
    """Write a state folder; every process calls it; it gets its name when all have written."""
    aside = folder.with_name(f".{folder.name}.part")
    try:
        if processes.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            _write_parts(aside, processes, progress, network, optimization, monitor, shadows)
        processes.accelerator.wait_for_everyone()
        torch.save(random_state(), aside / f"random-{processes.rank}.pt")
        processes.accelerator.wait_for_everyone()
        if processes.is_main:
            flush_all(aside)
            replace_folder(aside, folder)
            if monitor is not None:
                monitor.state_saved(folder)
    finally:
        if processes.is_main:
            shutil.rmtree(aside, ignore_errors=True)
    processes.accelerator.wait_for_everyone()


def _write_parts(aside, processes, progress, network, optimization, monitor, shadows):
    """What the first process writes."""
    aside.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.tensors().items()}
    save_file(tensors, aside / "lora.safetensors")
    scaler = processes.accelerator.scaler
    parts = {**optimization.state(), "scaler": scaler.state_dict() if scaler is not None else None}
    torch.save(_plain(parts), aside / "optimizer.pt")
    content = {"format": FORMAT, "processes": processes.count, **asdict(progress)}
    (aside / "progress.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    if monitor is not None:
        monitor.save_state(aside)
    if shadows is not None:
        save_file(shadows.training.state_tensors(), aside / SHADOWS_NAME)


def read_progress(folder: Union[str, Path]) -> Progress:
    """The Progress of a state folder. Raises ValueError where the folder is no state."""
    file = Path(folder) / "progress.json"
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume {folder}: it is not a state folder of this trainer ({error})") from error
    if content.pop("format", None) != FORMAT:
        raise ValueError(f"--resume {folder}: its format is not {FORMAT}")
    content.pop("processes", None)
    kinds = {field.name: (int, float) if field.type is float else (int,) for field in fields(Progress)}
    problems = [f"it lacks {name}" for name in sorted(kinds.keys() - content.keys())]
    problems += [f"{name} is not known" for name in sorted(content.keys() - kinds.keys())]
    for name in kinds.keys() & content.keys():
        value = content[name]
        is_number = isinstance(value, kinds[name]) and not isinstance(value, bool) and math.isfinite(value)
        least = {"steps_per_epoch": 1}.get(name, -math.inf if name.endswith("loss_sum") else 0)
        if not is_number or not least <= value < LARGEST_COUNT:
            problems.append(f"{name} is {value!r:.40}")
    if problems:
        raise ValueError(f"--resume {folder}: progress.json is damaged: {'; '.join(problems)}; use an earlier state")
    return Progress(**content)


def newest_state(folder: Path) -> Optional[Path]:
    """The state of the most steps in an output folder, or None."""
    states = [state for state in folder.glob("*-state") if (state / "progress.json").is_file()]
    return max(states, key=lambda state: read_progress(state).step, default=None)


def load_state(
    folder: Union[str, Path],
    processes: Processes,
    network: Any,
    optimization: Optimization,
    shadows: Optional[ShadowNetworks],
) -> None:
    """Put weights, optimizer, scheduler, shadows, random states back; Progress is read before.
    Raises ValueError where a file lacks or is damaged, or where network, optimizer, shadows or
    number of processes differ."""
    folder, accelerator = Path(folder), processes.accelerator
    saved = read_json(folder / "progress.json").get("processes")
    if saved != processes.count:
        raise ValueError(f"--resume {folder}: saved by {saved} processes, this run has {processes.count}")
    files = ["lora.safetensors", "optimizer.pt", f"random-{processes.rank}.pt"]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"--resume {folder}: it lacks {', '.join(missing)}; use an earlier state")
    tensors, live = read_tensors(folder / "lora.safetensors"), network.tensors()
    problems = differences(shapes_of(tensors), shapes_of(live))
    if problems:
        fix = "use the base, rank, modules and --network_args that the run began with"
        raise ValueError(f"--resume {folder}: lora.safetensors does not fit this network: {'; '.join(problems)}; {fix}")
    network.load_tensors(tensors)
    state = _read_pickle(folder / "optimizer.pt")
    with fits(folder, "optimizer or scheduler"):
        optimization.load(state)
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
    if shadows is not None:
        if not (folder / SHADOWS_NAME).is_file():
            raise ValueError(f"--resume {folder}: that run had no shadows; resume without --shadows, or start anew")
        with fits(folder, "shadows"):
            shadows.training.load_state_tensors(read_tensors(folder / SHADOWS_NAME))
    for file in sorted(folder.glob("*.safetensors")):
        read_tensors(file)  # which refuses those of the measurements too where they are not finite
    random = _read_pickle(folder / files[-1])
    with readable(folder / files[-1]):
        restore_random_state(random)


@contextlib.contextmanager
def fits(folder: Path, what: str) -> Iterator[None]:
    """Whatever a part of a state is not taken for is a ValueError that names the state."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        message = f"saved with another {what}, network or data, or damaged ({first_line(error)})"
        raise ValueError(f"--resume {folder}: {message}") from error


def _read_pickle(file):
    """The content of a pickle of tensors and plain values, no code."""
    with readable(file):
        return torch.load(file, map_location="cpu", weights_only=True)


def _plain(value):
    """The same without numpy scalars and subclassed containers, which weights only refuses."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else list(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value
