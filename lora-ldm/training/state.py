"""The state of a run on disk: all that --resume needs to go on as if it had never stopped.

A state is a folder: lora.safetensors, optimizer.pt (tensors and numbers only), random-RANK.pt, progress.json, and the
files of the early-stop monitor and of the shadows. It appears whole or not at all.
"""

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from es_lora.files import replace_folder

SHADOWS_NAME = "shadows.safetensors"
FORMAT = "es-lora-ldm-state/1"


@dataclass
class Progress:
    """Where a run stands. step: completed optimizer steps; the losses are what the logs have summed up so far."""

    seed: int
    steps_per_epoch: int
    step: int = 0
    loss_sum: float = 0.0  # since the last CS measurement
    loss_count: int = 0
    epoch_loss_sum: float = 0.0  # since the epoch began
    epoch_loss_count: int = 0

    @property
    def epoch(self):
        """Completed epochs, and steps done in the one that has begun."""
        return divmod(self.step, self.steps_per_epoch)

    def add_loss(self, loss):
        self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
        self.epoch_loss_sum, self.epoch_loss_count = self.epoch_loss_sum + loss, self.epoch_loss_count + 1

    def take_mean_loss(self):
        """Mean loss since the last call; None where there was no step."""
        mean = self.loss_sum / self.loss_count if self.loss_count else None
        self.loss_sum, self.loss_count = 0.0, 0
        return mean

    def begin_epoch(self):
        self.epoch_loss_sum, self.epoch_loss_count = 0.0, 0

    @property
    def epoch_mean_loss(self):
        return self.epoch_loss_sum / self.epoch_loss_count if self.epoch_loss_count else float("nan")


def random_state():
    """The random states of Python, numpy and torch (CPU and CUDA), as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, python_gauss = random.getstate()
    return {
        "python": [version, list(words), python_gauss],
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state):
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_state(folder, accelerator, progress, tensors, optimizer, scheduler, monitor, shadows=None):
    """Write a state folder; every process calls it, and the folder gets its name when all have written."""
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.part")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside / "lora.safetensors")
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "scaler": scaler}
        torch.save(_plain(state), aside / "optimizer.pt")
        content = {"format": FORMAT, "processes": accelerator.num_processes, **asdict(progress)}
        (aside / "progress.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        if monitor is not None:
            monitor.save_state(aside)
        if shadows is not None:
            save_file(shadows.training.state_tensors(), aside / SHADOWS_NAME)
    accelerator.wait_for_everyone()
    torch.save(random_state(), aside / f"random-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for file in aside.rglob("*"):
            _flush(file)
        replace_folder(aside, folder)
        if monitor is not None:
            monitor.state_saved(folder)
    accelerator.wait_for_everyone()


def read_progress(folder):
    """The Progress of a state folder. Raises ValueError where the folder is no state."""
    file = Path(folder) / "progress.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--resume {folder}: it is not a state folder of this trainer ({error})") from error
    if content.pop("format", None) != FORMAT:
        raise ValueError(f"--resume {folder}: its format is not {FORMAT}")
    content.pop("processes")
    return Progress(**content)


def load_state(folder, accelerator, network, optimizer, scheduler, shadows=None):
    """Put weights, optimizer, scheduler, shadows and random states back; the caller has read the Progress already.

    Raises ValueError where network, optimizer, shadows or the number of processes are not those of the state.
    """
    folder = Path(folder)
    own = folder / f"random-{accelerator.process_index}.pt"
    saved = json.loads((folder / "progress.json").read_text(encoding="utf-8"))["processes"]
    if saved != accelerator.num_processes:
        raise ValueError(f"--resume {folder}: saved by {saved} processes, this run has {accelerator.num_processes}")
    network.load_tensors(load_file(folder / "lora.safetensors"))
    state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    try:
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    except (ValueError, KeyError) as error:
        raise ValueError(f"--resume {folder}: saved with another optimizer, scheduler or network ({error})") from error
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    if shadows is not None:
        if not (folder / SHADOWS_NAME).is_file():
            raise ValueError(f"--resume {folder}: that run had no shadows; resume without --shadows, or start anew")
        shadows.training.load_state_tensors(load_file(folder / SHADOWS_NAME))
    restore_random_state(torch.load(own, map_location="cpu", weights_only=True))


def _plain(value):
    """The same without numpy scalars and subclassed containers, which a load with weights only would refuse."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else list(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _flush(file):
    if file.is_file():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
