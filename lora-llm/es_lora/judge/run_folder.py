"""The adapters of one run in their order: names, steps and epochs, as other trainers leave them."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from es_lora.files import read_text
from es_lora.history import HISTORY_NAME, History, is_number, is_whole, read_history
from es_lora.inputs.json_text import parsed_json
from es_lora.judge.adapter_files import DIFFUSERS_NAME, PEFT_NAME, PICKLE_NAME, QLORA_FOLDER, file_metadata
from es_lora.weights import pickle_advice

# kohya's, ai-toolkit's and OneTrainer's names; the last: step, epoch and step of the epoch.
_FILE_NAME = re.compile(
    r"(?P<run>.*?)(?:-step(?P<kohya>[0-9]{8})|_(?P<toolkit>[0-9]{9})|-(?P<epoch>[0-9]{6})"
    r"|[0-9-]{10}_[0-9-]{8}-save-(?P<trainer>[0-9]{1,12})-(?P<epochs>[0-9]{1,12})-(?P<rest>[0-9]{1,12}))?$"
)


@dataclass
class Checkpoint:
    """One saved adapter of the run, after `step` optimizer steps. columns: its measurements.
    unjudged: what these do not see of it, in words."""

    name: str
    file: Path
    step: int
    columns: Dict[str, Any] = field(default_factory=dict)
    unjudged: str = ""


@dataclass
class Found:
    """An adapter file, and what its name and metadata tell of its place in the run."""

    name: str
    file: Path
    step: Optional[int]
    epoch: Optional[int]
    metadata: Dict[str, str]


def _number(text: Any) -> Optional[int]:
    """The whole number that a text of a name or of metadata is, else None."""
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,12}", str(text)) else None


def _object(text: str) -> Dict[str, Any]:
    """A JSON object; an empty one for any other text."""
    try:
        value = parsed_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _folder_checkpoints(folder: Path, problems: Dict[str, str]) -> List[Found]:
    """PEFT's and diffusers' folders: checkpoint-N, and adapters that tell their step."""
    found = []
    for place in [folder, *sorted(entry for entry in folder.iterdir() if entry.is_dir())]:
        name = "." if place == folder else place.name
        inside = (place, place / QLORA_FOLDER, place / "unet")  # qlora.py and PEFT's image example: a folder deeper
        known = (where / known for where in inside for known in (PEFT_NAME, DIFFUSERS_NAME))
        file = next((path for path in known if path.is_file()), None)
        number = re.match(r"checkpoint-([0-9]{1,12})$", place.name) if place != folder else None
        if file is None:
            pickled = [where / PICKLE_NAME for where in inside if (where / PICKLE_NAME).is_file()]
            if pickled:
                problems[name] = pickle_advice(pickled[0])
            elif number or (place / "adapter_config.json").is_file():
                problems[name] = f"it holds no {PEFT_NAME} or {DIFFUSERS_NAME} (pickle files are not read)"
            continue
        metadata = file_metadata(file)
        checkpoint = Found(name, file, int(number[1]) if number else None, None, metadata)
        if checkpoint.step is None:
            facts = _object(metadata.get("es_lora", "{}"))
            step = _step_of(place, facts) if facts else _state(place).get("global_step")
            checkpoint.step = step if is_whole(step) else None
        found.append(checkpoint)
    return found


def _step_of(place: Path, facts: Dict[str, Any]) -> Optional[int]:
    """The step of an adapter of es_lora_llm.py or its callback: what its metadata says.

    An adapter of an earlier version says only the kept and the last step. There, a run that stopped
    early has `adapter-last` beside the kept `adapter`; one that went on has `adapter-turning-point`
    beside the last. None where it could be of either."""
    if "step" in facts:
        return facts["step"]
    kept, last = facts.get("kept_step"), facts.get("last_step")
    if place.name.endswith("-last") or kept is None or place.with_name(f"{place.name}-turning-point").is_dir():
        return last
    if place.name.endswith("-turning-point") or place.with_name(f"{place.name}-last").is_dir():
        return kept
    return kept if kept == last else None


def _state(folder: Path) -> Dict[str, Any]:
    try:
        return _object(read_text(folder / "trainer_state.json"))
    except (OSError, ValueError):
        return {}


def _file_checkpoints(folder: Path, problems: Dict[str, str]) -> List[Found]:
    """kohya's files of a run: NAME-000003 (epoch), NAME-step00000500, NAME-last or else NAME;
    ai-toolkit's NAME_000000500 (step); OneTrainer's NAME<time>-save-500-5-0 (step, epoch)."""
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name not in (PEFT_NAME, DIFFUSERS_NAME)]
    named = {file: match for file in files for match in [_FILE_NAME.match(file.stem)] if match}
    runs = sorted({match["run"] for match in named.values() if _place(match) != (None, None)})
    if len(runs) > 1:
        raise ValueError(
            f"{folder} holds the checkpoints of {len(runs)} runs ({', '.join(runs)}); give a folder of one run"
        )
    last = runs[0] + ("-last" if runs and (folder / f"{runs[0]}-last.safetensors").is_file() else "") if runs else None
    found = []
    for file, match in named.items():
        metadata = file_metadata(file)
        step, epoch = _place(match)
        if step is None and "es_lora_step" in metadata:
            step = _number(metadata["es_lora_step"])
        elif step is None and "training_info" in metadata:  # ai-toolkit
            step = _number(_object(metadata["training_info"]).get("step"))
        elif step is None and (epoch is not None or file.stem == last or last is None):
            step = _number(metadata.get("ss_steps", metadata.get("ss_max_train_steps") if epoch is None else None))
        if step is None and epoch is None:
            problems[file.name] = "neither its name nor its metadata tells at which step it was saved"
            continue
        found.append(Found(file.name, file, step, epoch, metadata))
    return found


def _place(match: "re.Match[str]") -> Tuple[Optional[int], Optional[int]]:
    """(step, epoch) that a file's name tells; an epoch only where it had just ended."""
    step = _number(match["kohya"] or match["toolkit"] or match["trainer"])
    return step, _number(match["epochs"] if match["rest"] == "0" else match["epoch"])


def _steps_per_epoch(checkpoints: Sequence[Found]) -> Optional[int]:
    """Optimizer steps an epoch, from the newest checkpoint: kohya's metadata or a Trainer state."""
    for checkpoint in sorted(checkpoints, key=lambda c: (c.step or 0, c.epoch or 0), reverse=True):
        metadata = checkpoint.metadata
        state = _state(checkpoint.file.parent) or _state(checkpoint.file.parent.parent)  # qlora.py's lies above
        if checkpoint.epoch and checkpoint.step:
            return max(1, round(checkpoint.step / checkpoint.epoch))
        batches = _number(metadata.get("ss_num_batches_per_epoch"))
        if batches:
            return math.ceil(batches / (_number(metadata.get("ss_gradient_accumulation_steps")) or 1))
        epoch: Any = state.get("epoch")
        step: Any = state.get("global_step")
        if is_number(epoch) and is_whole(step, 1) and epoch > 1e-6:
            return max(1, round(step / epoch))
    return None


@dataclass
class Run:
    """What the folder holds: checkpoints by step, what was passed over, a history's facts."""

    checkpoints: List[Checkpoint]
    steps_per_epoch: int
    problems: Dict[str, str]
    history: Optional[History]
    counts_epochs: bool = False  # no step is known, so that the numbers of epochs stand for them


def read_run(folder: Path, steps_per_epoch: Optional[int] = None) -> Run:
    """Find a run's checkpoints and steps. FileNotFoundError or ValueError where there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the folder that holds the saved adapters")
    problems: Dict[str, str] = {}
    found = _folder_checkpoints(folder, problems)
    found += _file_checkpoints(folder, problems)
    if not found:
        known = f"checkpoint-*/{PEFT_NAME}, checkpoint-*/{DIFFUSERS_NAME}, NAME-000003.safetensors, "
        known += "NAME-step00000500.safetensors"
        named = "".join(f"; {name}: {problem}" for name, problem in problems.items())
        raise FileNotFoundError(f"{folder} holds no LoRA checkpoints; known are {known}{named}")
    history = read_history(folder) if (folder / HISTORY_NAME).is_file() else None
    per_epoch = steps_per_epoch or (history.header["steps_per_epoch"] if history else _steps_per_epoch(found))
    counts_epochs = per_epoch is None and all(checkpoint.step is None for checkpoint in found)
    per_epoch = 1 if counts_epochs else per_epoch
    if per_epoch is None:
        raise ValueError(f"nothing in {folder} tells how many optimizer steps an epoch has; give --steps_per_epoch N")
    by_step: Dict[int, Checkpoint] = {}
    # Numbered checkpoints first: a kept adapter is often the same step again.
    for checkpoint in sorted(found, key=lambda c: not re.search(r"\d", c.name)):
        step = checkpoint.step if checkpoint.step is not None else checkpoint.epoch and checkpoint.epoch * per_epoch
        if step is None:
            problems[checkpoint.name] = "nothing tells at which step it was saved"
        elif step in by_step:
            problems[checkpoint.name] = f"it is of step {step}, as {by_step[step].name} is"
        else:
            by_step[step] = Checkpoint(checkpoint.name, checkpoint.file, round(step))
    return Run([by_step[step] for step in sorted(by_step)], per_epoch, problems, history, counts_epochs)
