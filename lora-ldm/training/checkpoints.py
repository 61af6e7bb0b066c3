"""What a run saves on its way and at its end: names, LoRA files or whole models, deletions."""

import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from base.sd import SDModel
from network.full_unet import save_full_model
from network.lora_file import DTYPES, save_lora
from network.metadata import FileFacts


class CheckpointNames:
    """`NAME-000003.safetensors`, `NAME-step00000300.safetensors`, state folders, and when due."""

    def __init__(self, args: Namespace, total_epochs: int):
        self.args, self.folder = args, Path(args.output_dir)
        self.suffix = "" if args.train_full_unet else f".{args.save_model_as}"  # a whole model is a folder
        self.every_epochs = args.save_every_n_epochs
        if args.save_n_epoch_ratio:
            self.every_epochs = max(1, total_epochs // args.save_n_epoch_ratio)
        self.total_epochs = total_epochs

    def path(self, part: str = "") -> Path:
        """The normal name, or with a part: `-last`, `-turning-point`."""
        return self.folder / f"{self.args.output_name}{part}{self.suffix}"

    def state_path(self, part: str = "") -> Path:
        return self.folder / f"{self.args.output_name}{part}-state"

    def epoch_part(self, epoch: int) -> str:
        return f"-{epoch:06d}"

    def step_part(self, step: int) -> str:
        return f"-step{step:08d}"

    def epoch_due(self, epochs_done: int) -> bool:
        return bool(self.every_epochs) and epochs_done % self.every_epochs == 0 and epochs_done < self.total_epochs

    def step_due(self, step: int) -> bool:
        return bool(self.args.save_every_n_steps) and step % self.args.save_every_n_steps == 0

    def forget_epochs(self, epochs_done: int) -> None:
        """Delete the checkpoint and state that --save_last_n_epochs (.._state) no longer keeps."""
        keep, keep_state = self.args.save_last_n_epochs, self.args.save_last_n_epochs_state
        if keep:
            self._delete_file(self.epoch_part(epochs_done - keep * self.every_epochs))
        if keep_state or keep:
            self._delete_state(self.epoch_part(epochs_done - (keep_state or keep) * self.every_epochs))

    def forget_steps(self, step: int) -> None:
        """Delete what lies further back than --save_last_n_steps (.._state) steps."""
        keep, keep_state = self.args.save_last_n_steps, self.args.save_last_n_steps_state
        if keep:
            self._delete_file(self.step_part(self._last_too_old(step, keep)))
        if keep_state or keep:
            self._delete_state(self.step_part(self._last_too_old(step, keep_state or keep)))

    def _last_too_old(self, step, keep):
        too_old = step - keep - 1
        return too_old - too_old % self.args.save_every_n_steps

    def _delete_file(self, part):
        path = self.path(part)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)

    def _delete_state(self, part):
        shutil.rmtree(self.state_path(part), ignore_errors=True)


@dataclass(frozen=True)
class WeightFiles:
    """Writes weights under the run's names: a LoRA file with metadata, or the whole model."""

    names: CheckpointNames
    model: SDModel
    facts: FileFacts

    def save(
        self, part: str, tensors: dict[str, torch.Tensor], step: int, verdict: Optional[dict[str, str]] = None
    ) -> Path:
        """Write a step's weights; -> path. verdict: more metadata. First process only."""
        path, dtype = self.names.path(part), DTYPES[self.names.args.save_precision]
        if self.names.args.train_full_unet:
            save_full_model(path, self.model, tensors, dtype)
        else:
            save_lora(path, tensors, {**self.facts.of_step(step), **(verdict or {})}, dtype)
        return path
