"""Copies of the LoRA weights on disk, bounded, and safe under a kill at any time."""

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from safetensors.torch import load_file, save_file

from es_lora.files import link_or_copy, write_whole

SNAPSHOT_FOLDER = "cs_snapshots"


def clear_snapshots(folder: Path) -> None:
    """Remove snapshots, and their folder if nothing else lies in it."""
    for file in folder.glob("step-*.safetensors"):
        file.unlink(missing_ok=True)
    for aside in folder.glob(".step-*.tmp"):
        shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):  # there is no folder, or something else lies in it
        folder.rmdir()


class SnapshotStore:
    """Copies of the LoRA weights of the last `count` measurements, on disk, written by a thread.

    A snapshot is safe under a kill (written aside, then renamed), and at most one is on its way at
    a time. Where `count` of them would exceed disk_bytes, only those of every n-th measurement are
    kept (`every`). Raises ValueError where not even one fits."""

    def __init__(self, folder: Path, count: int, snapshot_bytes: int, disk_bytes: float):
        if 2 * snapshot_bytes > disk_bytes:
            raise ValueError(
                f"a snapshot of the LoRA weights takes {snapshot_bytes / 1e9:.3g} GB and two must fit into the "
                f"{disk_bytes / 1e9:.3g} GB allowed; raise --snapshot_disk_gb or lower the rank"
            )
        self.folder, self.count = folder, count
        # Thinned out, the window needs a snapshot before its start, and one while it is replaced.
        self.every = max(1, math.ceil(count / max(1, disk_bytes // max(1, snapshot_bytes) - 2)))
        self.pinned_step: Optional[int] = None
        self.kept: List[Tuple[int, int]] = []  # (measurement, step), oldest first
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._pending: Any = None
        clear_snapshots(folder)  # left there by a run that was killed

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def wait(self) -> None:
        """Return when the last snapshot is on disk; raises an error of the writer (a full disk)."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def put(self, measurement: int, step: int, tensors: Dict[str, torch.Tensor]) -> None:
        """Copy this step's tensors, hand them to the writer, delete what is not needed again."""
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
        """Keep the newest entry not after the oldest one needed, and later ones; give the rest."""
        oldest_needed = self.kept[-1][0] - self.count + 1
        first = max((m for m, _ in self.kept if m <= oldest_needed), default=0)
        old_steps = [step for measurement, step in self.kept if measurement < first and step != self.pinned_step]
        self.kept = [entry for entry in self.kept if entry[1] not in old_steps]
        return old_steps

    def nearest_before(self, step: int) -> Optional[int]:
        """The newest kept step at or before `step`, else the oldest kept; None without any."""
        return max((s for _, s in self.kept if s <= step), default=self.kept[0][1] if self.kept else None)

    def pin(self, step: int) -> None:
        """Keep this step for good and, from now on, only the newest one beside it."""
        self.wait()
        self.pinned_step, self.count, self.every = step, 1, 1
        for old in self._forget_old():
            self.path(old).unlink(missing_ok=True)

    def load(self, step: int) -> Dict[str, torch.Tensor]:
        """{name: tensor} of a kept step, on the CPU. Raises FileNotFoundError for other steps."""
        self.wait()
        if not self.path(step).is_file():
            raise FileNotFoundError(
                f"no snapshot of step {step} in {self.folder}; kept are {[s for _, s in self.kept]}"
            )
        return load_file(str(self.path(step)))

    def copy_to(self, folder: Path) -> None:
        self.wait()
        for _, step in self.kept:
            link_or_copy(self.path(step), folder / self.path(step).name)

    def copy_from(self, folder: Path, kept: Sequence[Sequence[int]]) -> None:
        self.kept = [(index, step) for index, step in kept if (folder / self.path(step).name).is_file()]
        for _, step in self.kept:
            link_or_copy(folder / self.path(step).name, self.path(step))

    def delete(self) -> None:
        """Remove every snapshot: the run has ended and what it keeps has been saved."""
        self._writer.shutdown()
        clear_snapshots(self.folder)
