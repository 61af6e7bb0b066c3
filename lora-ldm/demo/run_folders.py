"""What the page may use: runs in the folders it was started with, named bases and pictures.

A browser chooses by the names that are offered here. A name that was not offered is refused,
whatever it spells: no path that comes from a browser is ever opened."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from es_lora.files import read_text
from es_lora.history import HISTORY_NAME, History, read_history, replay, rule_for
from es_lora.inputs.json_text import parsed_json
from es_lora.outcome import RESULT_NAME
from es_lora.rules import Decision

TREE = Path(__file__).resolve().parents[1]
EXAMPLE = TREE / "demo" / "example_run"
EXAMPLE_NAME = "the default run (example)"
LOG_NAME = "train.log"
LOG_BYTES = 2**16  # of its end are read
MOST_BYTES = 2**24  # of a result
# Of result.json, what the page reads: its kind, where it is there.
RESULT_FIELDS = {"outcome": str, "verdict": str, "reason": str, "settings": dict, "files": dict}
RESULT_FIELDS.update(last_step=int, total_steps=int)
OF_EARLIER_VERSIONS = ("outcome", "last_step", "turning_step", "total_steps", "reason")  # which wrote no verdict
DEPTH = 3  # folders below a root in which runs are looked for
_PREVIEW = re.compile(
    r".+?-(?P<part>base|turning-point|last|step(?P<step>\d{8})|(?P<epoch>\d{6}))_(?P<number>\d+)_(?P<seed>\d+)\.png"
)
_FIRST, _BETWEEN, _TURNING_POINT, _LAST = range(4)


@dataclass(frozen=True)
class Preview:
    """A picture that the run made of prompt `number`; `moment`: when, in words; `order` sorts."""

    path: Path
    moment: str
    order: tuple
    number: int
    seed: int


@dataclass(frozen=True)
class Run:
    """A folder that a trainer has written to, or writes to now."""

    name: str
    folder: Path

    def result(self) -> Optional[dict[str, Any]]:
        """The content of result.json as a dictionary, None while there is none that is whole."""
        try:
            return read_result(self.folder)
        except (OSError, ValueError):
            return None

    def damage(self) -> list[str]:
        """What of the folder cannot be read, a line each; empty where all that is there can."""
        lines = []
        for read in (read_result, read_history):
            try:
                read(self.folder)
            except FileNotFoundError:
                pass
            except (OSError, ValueError) as error:
                lines.append(f"{self.name}: {error}")
        for name in (HISTORY_NAME, RESULT_NAME):
            if (self.folder / name).is_dir():
                lines.append(f"{self.name}: {name} is a folder, not a file")
        missing = [name for name in self._named_weights().values() if not (self.folder / name).exists()]
        lines += [f"{self.name}: {RESULT_NAME} names {name}, which is not there" for name in dict.fromkeys(missing)]
        return lines

    def settings(self) -> dict[str, Any]:
        return (self.result() or {}).get("settings", {})

    def history(self) -> Optional[History]:
        """The recorded measurements, None where nothing was measured yet."""
        try:
            history = read_history(self.folder)
        except (OSError, ValueError):
            return None
        return history if history.records else None

    def weights(self) -> dict[str, Path]:
        """{what they are: path} of the LoRA files, those of the end first."""
        found = {}
        for label, name in self._named_weights().items():
            path = self.folder / name
            if path.is_file() and not path.is_symlink():
                found[label] = path
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in found.values() and path.is_file() and not path.is_symlink():
                found[path.stem] = path
        return found

    def _named_weights(self) -> dict[str, str]:
        """{what they are: file name} of the weights that result.json names."""
        result = self.result() or {}
        files = result.get("files", {})
        kept_is = "turning point" if result.get("outcome") == "stopped_early" else "last"
        if kept_is == "last" and "last" in files:
            kept_is = "average"
        labels = {"kept": kept_is, "turning_point": "turning point", "last": "last"}
        return {label: _file_name(files[key]) for key, label in labels.items() if files.get(key)}

    def previews(self) -> list[Preview]:
        """Previews in the order of training."""
        found = []
        for path in (self.folder / "sample").glob("*.png"):
            match = _PREVIEW.fullmatch(path.name)
            if match and path.is_file() and not path.is_symlink():
                moment, order = _moment(match)
                found.append(Preview(path, moment, order, int(match["number"]), int(match["seed"])))
        return sorted(found, key=lambda preview: (preview.order, preview.number))

    def log_lines(self, count: int = 12) -> list[str]:
        """The last lines that the trainer printed; of a progress bar its last state."""
        try:
            with open(self.folder / LOG_NAME, "rb") as file:
                file.seek(max(0, os.path.getsize(file.name) - LOG_BYTES))
                text = file.read(LOG_BYTES).decode(errors="replace")
        except OSError:
            return []
        return [line.rsplit("\r", 1)[-1] for line in text.rstrip("\r\n ").split("\n") if line.strip()][-count:]

    def verdict(self) -> str:
        """What came of it, or how it stands, in plain words."""
        result, history = self.result(), self.history()
        if result is not None:
            return verdict_of(result)
        if history is None:
            return "Nothing is measured yet."
        done = f"Step {history.last_step()} of {history.header.get('total_steps', '?')}."
        decision = decision_of(history)
        if decision is None:
            return f"{done} No evidence of overfitting yet."
        return f"{done} The turning point was step {decision.keep_step}. {decision.reason}"


class ExampleRun(Run):
    """The run that comes with the project. The paths of its settings begin at the project."""

    def settings(self) -> dict[str, Any]:
        paths = ("pretrained_model_name_or_path", "train_data_dir")
        settings = super().settings()
        return {**settings, **{name: str(TREE.parent / settings[name]) for name in paths if name in settings}}


def read_result(folder: Path) -> dict[str, Any]:
    """The content of result.json. Raises FileNotFoundError, or ValueError for one that is none."""
    path = folder / RESULT_NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{RESULT_NAME} is damaged: it is {path.stat().st_size} bytes long")
    try:
        result = parsed_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{RESULT_NAME} is damaged: {error}") from error
    if not isinstance(result, dict):
        raise ValueError(f"{RESULT_NAME} is damaged: it holds a {type(result).__name__}, no object")
    result = {name: value for name, value in result.items() if value is not None or name == "turning_step"}
    wrong = [name for name, kind in RESULT_FIELDS.items() if not isinstance(result.get(name, kind()), kind)]
    files = result.get("files", {})
    wrong += ["files"] if "files" not in wrong and not all(map(_names_a_file, files.values())) else []
    wrong += [name for name in OF_EARLIER_VERSIONS if "verdict" not in result and name not in result]
    if wrong:
        raise ValueError(f"{RESULT_NAME} is damaged: {', '.join(wrong)} missing or of another kind")
    return result


def _names_a_file(saved):
    path = saved.get("path") if isinstance(saved, dict) else saved  # a name before the format es-lora-result/1
    return path is None or isinstance(path, str)


def _file_name(saved):
    return Path((saved.get("path") if isinstance(saved, dict) else saved) or "none").name or "none"


def verdict_of(result: dict) -> str:
    """The sentence of result.json. Earlier versions did not write it, but all that it says."""
    if "verdict" in result:
        return result["verdict"]
    last, turning = result["last_step"], result["turning_step"]
    if turning is None:
        return result["reason"]
    total = result["total_steps"]
    ended = {
        "diverged": f"Training diverged (NaN or Inf) in step {last + 1}.",
        "interrupted": f"Interrupted after step {last} of {total}; the state is saved.",
        "stopped_early": f"Stopped after step {last} of {total}: overfitting began at about step {turning}.",
    }
    going_on = f"Trained all {last} steps, as asked. The turning point was step {turning}."
    return f"{ended.get(result['outcome'], going_on)} {result['reason']}"


def decision_of(history: History) -> Optional[Decision]:
    """The Decision of the rule that the run was recorded with, None where it has not decided."""
    return replay(rule_for(history, "recorded"), history.records, history.decided_at_end())


def _moment(match):
    if match["step"]:
        return f"step {int(match['step'])}", (_BETWEEN, int(match["step"]))
    if match["epoch"]:
        epoch = int(match["epoch"])
        return ("at first", (_FIRST, 1)) if epoch == 0 else (f"epoch {epoch}", (_BETWEEN, epoch))
    moments = {"base": ("no LoRA", _FIRST), "turning-point": ("turning point", _TURNING_POINT), "last": ("last", _LAST)}
    words, rank = moments[match["part"]]
    return words, (rank, 0)


@dataclass
class Places:
    """The folders, bases and picture folders that the page was started with.

    roots: folders with runs; new ones go into the first.
    bases: {name shown: diffusers folder, checkpoint file or hub name}.
    images: {name shown: folder of <repeats>_<name> folders}.
    example: a folder with a run that is offered while the roots hold none."""

    roots: list
    bases: dict = field(default_factory=dict)
    images: dict = field(default_factory=dict)
    example: Optional[Path] = None

    def runs(self) -> dict[str, Run]:
        """{name: Run}, the latest written first. Links that lead out of the roots are skipped."""
        found = []
        for root in self.roots:
            for folder in _folders_below(root):
                if any((folder / name).is_file() for name in (HISTORY_NAME, RESULT_NAME, LOG_NAME)):
                    found.append((folder.stat().st_mtime, Run(self.name_of(folder), folder)))
        if not found and self.example is not None:
            return {EXAMPLE_NAME: ExampleRun(EXAMPLE_NAME, self.example)}
        return {run.name: run for _, run in sorted(found, key=lambda pair: -pair[0])}

    def name_of(self, folder: Path) -> str:
        """What a folder below a root is called on the page."""
        root = next(root for root in self.roots if folder.is_relative_to(root))
        inside = folder.relative_to(root).as_posix()
        return inside if len(self.roots) == 1 else f"{root.name}/{inside}"

    def run(self, name: str) -> Run:
        return offered(self.runs(), name, "run")

    def base(self, name: str) -> str:
        return offered(self.bases, name, "base")

    def image_folder(self, name: str) -> Path:
        return offered(self.images, name, "picture folder")

    def base_of(self, run: Run) -> Optional[str]:
        """The name of the offered base that a run was trained on, None where it is not offered."""
        wanted = str(run.settings().get("pretrained_model_name_or_path") or "")
        same = [name for name, base in self.bases.items() if wanted and _same_place(base, wanted)]
        return same[0] if same else None

    def images_of(self, run: Run) -> Optional[Path]:
        """The offered picture folder that a run was trained on, None where it is not offered."""
        wanted = str(run.settings().get("train_data_dir") or "")
        return next((folder for folder in self.images.values() if wanted and _same_place(folder, wanted)), None)


def offered(choices: dict[str, Any], name: str, kind: str) -> Any:
    """choices[name]. Raises ValueError for a name that was not offered."""
    if name not in choices:
        raise ValueError(f"{name!r} is no {kind} that this page was started with")
    return choices[name]


def _folders_below(root):
    for place, folders, files in os.walk(root):
        folder = Path(place)
        deep_enough = len(folder.relative_to(root).parts) >= DEPTH
        is_model = "model_index.json" in files
        folders[:] = [] if deep_enough or is_model else sorted(name for name in folders if not name.startswith("."))
        yield folder


def _same_place(first, second):
    return first == second or Path(first).exists() and Path(first).resolve() == Path(second).resolve()
