"""Checkpoints of a run: which are whole, which one to go on from, what an earlier run left."""

import shutil
from pathlib import Path
from typing import Optional

from es_lora.history import HISTORY_NAME
from es_lora.monitor import STATE_NAME
from es_lora.snapshots import SNAPSHOT_FOLDER
from es_lora.weights import refuse_nonfinite, stored_tensors
from settings.flags import Settings


def complete_checkpoints(output_dir: Path, with_monitor: bool) -> list[Path]:
    """The checkpoints of a run that were written to their end, oldest first."""
    marker = STATE_NAME if with_monitor else "trainer_state.json"
    folders = [folder for folder in output_dir.glob("checkpoint-*") if (folder / marker).is_file()]
    return sorted(folders, key=lambda folder: int(folder.name.split("-")[1]))


def checkpoint_to_resume(settings: Settings) -> Optional[str]:
    """The checkpoint of --resume_from_checkpoint: a checkpoint folder, a run's folder, or true."""
    if settings.resume is None:
        return None
    training = settings.training
    folder = Path(training.output_dir) if settings.resume is True else Path(settings.resume)
    if (folder / "trainer_state.json").is_file():
        return _finite(folder)
    checkpoints = complete_checkpoints(folder, settings.stop.calculate_cs)
    if not checkpoints:
        raise FileNotFoundError(
            f"--resume_from_checkpoint: {folder} holds no complete checkpoint; give a checkpoint-N folder or the "
            "folder of a run that saved one (--save_steps), or start anew"
        )
    training.resume_from_checkpoint = str(checkpoints[-1])
    return _finite(checkpoints[-1])


def _finite(checkpoint: Path) -> str:
    """The checkpoint. Raises ValueError where its weights hold NaN or infinity."""
    for file in checkpoint.glob("*.safetensors"):
        refuse_nonfinite(stored_tensors(file), f"--resume_from_checkpoint {checkpoint}")
    return str(checkpoint)


def delete_earlier_run(folder: Path) -> None:
    """--overwrite_output_dir: remove what a run leaves, and nothing else that may lie there."""
    for name in (HISTORY_NAME, "result.json", "report.html", "predictions.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for pattern in ("checkpoint-*", "adapter", "adapter-*", SNAPSHOT_FOLDER, "runs", "model"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
