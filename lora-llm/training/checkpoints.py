"""Checkpoints of a run: which are whole, which one to go on from, what an earlier run left."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from es_lora.history import HISTORY_NAME
from es_lora.monitor import STATE_NAME
from es_lora.snapshots import SNAPSHOT_FOLDER, clear_snapshots
from es_lora.weights import refuse_nonfinite, stored_tensors
from settings.flags import Settings, TrainingArguments

FILES = (HISTORY_NAME, "result.json", "report.html", "predictions.jsonl")  # what a run leaves
ANOTHER = "take an older checkpoint, or start anew"
FOLDERS = ("adapter", "adapter-last", "adapter-turning-point", SNAPSHOT_FOLDER, "model")


def forget_checkpoints(output_dir: Path, limit: Optional[int]) -> None:
    """Delete all but the newest `limit` checkpoints, by their steps; None: all stay."""
    if limit is not None and limit > 0:
        for folder in _by_step(output_dir.glob("checkpoint-*"))[:-limit]:
            shutil.rmtree(folder)


def _by_step(folders: Iterable[Path]) -> list[Path]:
    known = [folder for folder in folders if folder.name.partition("-")[2].isdigit()]
    return sorted(known, key=lambda folder: int(folder.name.partition("-")[2]))


def complete_checkpoints(output_dir: Path, with_monitor: bool) -> list[Path]:
    """The checkpoints of a run that were written to their end, oldest first."""
    marker = STATE_NAME if with_monitor else "trainer_state.json"
    return _by_step(folder for folder in output_dir.glob("checkpoint-*") if (folder / marker).is_file())


def checkpoint_to_resume(settings: Settings) -> Optional[str]:
    """The checkpoint of --resume_from_checkpoint: a checkpoint folder, a run's folder, or true."""
    if settings.resume is None:
        return None
    training = settings.training
    folder = Path(training.output_dir) if settings.resume is True else Path(settings.resume)
    if (folder / "trainer_state.json").is_file():
        return _whole(folder, training)
    checkpoints = complete_checkpoints(folder, settings.stop.calculate_cs)
    if not checkpoints:
        raise FileNotFoundError(
            f"--resume_from_checkpoint: {folder} holds no complete checkpoint; give a checkpoint-N folder or the "
            "folder of a run that saved one (--save_steps), or start anew"
        )
    training.resume_from_checkpoint = str(checkpoints[-1])
    return _whole(checkpoints[-1], training)


def _whole(checkpoint: Path, training: TrainingArguments) -> str:
    """The checkpoint. Raises ValueError where a part of it is missing or damaged, or holds NaN."""
    named = f"--resume_from_checkpoint {checkpoint}"
    random_state = f"rng_state_{training.process_index}.pth" if training.world_size > 1 else "rng_state.pth"
    parts = [name for name in ("optimizer.pt", "scheduler.pt", random_state) if not (checkpoint / name).is_file()]
    if parts:
        raise ValueError(f"{named} lacks {', '.join(parts)}; {ANOTHER}")
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", random_state):
        try:
            _read(checkpoint / name)
        except Exception as error:  # whatever torch and json say of a damaged file
            raise ValueError(f"{named}: {name} is damaged ({first_line(error)}); {ANOTHER}") from error
    for file in checkpoint.glob("*.safetensors"):
        refuse_nonfinite(stored_tensors(file), named)
    return str(checkpoint)


def _read(file: Path) -> Any:
    if file.suffix == ".json":
        state = TrainerState.load_from_json(str(file))
        if not isinstance(state.global_step, int) or state.global_step < 1:
            raise ValueError(f"its global_step is {state.global_step}")
        return state
    with safe_globals():
        return torch.load(file, map_location="cpu", weights_only=True)


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no more is known').splitlines()[0][:200]}"


def check_fits(checkpoint: str, model: PeftModel) -> None:
    """Raises ValueError where a checkpoint's adapter is not one of this model, by name or shape."""
    file = Path(checkpoint) / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"--resume_from_checkpoint {checkpoint} lacks {file.name}; {ANOTHER}")
    own = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    with safe_open(str(file), framework="pt") as handle:
        saved = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}
    wrong = [f"{name} is missing" for name in own if name not in saved]
    wrong += [f"{name} is not one of this run's" for name in saved if name not in own]
    both = [name for name in own if name in saved and own[name] != saved[name]]
    wrong += [f"{name} is {saved[name]}, here {own[name]}" for name in both]
    if wrong:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} does not fit this run: {'; '.join(wrong[:3])} ({len(wrong)} in "
            "all); give the base, the rank and the modules of that run, or start anew"
        )


def check_optimizer(checkpoint: str, optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where a checkpoint's optimizer is of another kind or of other weights."""
    saved = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
    groups, own = saved["param_groups"], optimizer.state_dict()["param_groups"]
    facts = [(len(g["params"]), set(g) - {"initial_lr"}) for g in groups]
    if facts != [(len(g["params"]), set(g) - {"initial_lr"}) for g in own]:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} was saved with another optimizer; give the --optim of that run, or "
            "start anew"
        )


def delete_earlier_run(folder: Path) -> None:
    """--overwrite_output_dir: remove what a run leaves, and nothing else that may lie there."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    clear_snapshots(folder / SNAPSHOT_FOLDER)
    for pattern in ("checkpoint-*", "adapter", "adapter-*", "runs", "model"):
        for path in filter(Path.is_dir, folder.glob(pattern)):
            shutil.rmtree(path)
