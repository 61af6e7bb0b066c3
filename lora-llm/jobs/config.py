"""Jobs of multi_lora.py: what a job is, and the toml, yaml or json file that lists them.

    [defaults]                    # for every job
    dataset = "notes.jsonl"       # relative to the current folder or, if it is not there, to this
        file's
    rank = 8

    [[jobs]]
    name = "notes"

    [grid]                        # every job once for each combination
    rank = [8, 32, 128]
    learning_rate = [1e-4, 3e-4]

A job's own `grid` (`[jobs.grid]`) expands that job alone; the overview names the best of each grid.
"""

import itertools
import json
import math
import re
import typing
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Optional, Union

import tomllib
import yaml
from transformers import SchedulerType

from es_lora.command_line import nearest
from es_lora.files import read_text
from es_lora.inputs.bounds import LARGEST_FLOAT32, MOST
from es_lora.inputs.json_text import not_too_deep, parsed_json
from es_lora.inputs.toml_text import parsed_toml
from es_lora.settings import StopSettings
from text.conversations import LEARN_TURNS
from text.formats import Format
from text.spec import DataSpec

PATH_KEYS = ("dataset", "eval_dataset", "mmlu_dir")
USUAL_STOP = StopSettings(early_stop=True)
NOT_OF_A_JOB = ("calculate_cs", "shadows", "shadow_rank", "shadow_interval")  # always measured; shadows need passes
STOP_KEYS = [entry.name for entry in fields(StopSettings) if entry.name not in NOT_OF_A_JOB] + ["valley"]

_usual = USUAL_STOP.as_flags()
StopKeys = make_dataclass("StopKeys", [(key, Any, field(default=_usual.get(key))) for key in STOP_KEYS], kw_only=True)


@dataclass
class Job(StopKeys):
    """One adapter to train: its data, its hyperparameters, and how it is stopped.

    Names are those of es_lora_llm.py, without `lora_`. dataset, dataset_format, eval_dataset,
    train_subject, mmlu_dir: its sources and formats. learn_turns: all or last answers of a
    conversation. eval_dataset_size: examples (below 1 a
    fraction) held out of the training data; 0 for none. max_steps: optimizer steps; it wins over
    epochs. Beside these, and by keyword, the flags of early stopping that STOP_KEYS lists.
    early_stop False: train to the budget and save the turning point beside. evaluate_epochs: score
    the held-out examples after every epoch too. priority: the highest waiting job gets a free slot
    first. group: what it is compared with in the end."""

    name: str
    dataset: str = ""
    dataset_format: Optional[str] = None
    learn_turns: str = "all"
    eval_dataset: Optional[str] = None
    eval_dataset_size: float = 0
    max_train_samples: Optional[int] = None
    max_eval_samples: Optional[int] = None
    train_subject: Optional[str] = None
    mmlu_dir: str = "data/mmlu"
    source_max_len: int = 1024
    target_max_len: int = 256
    train_on_source: bool = False
    rank: int = 64
    alpha: float = 16
    dropout: float = 0.0
    target_modules: Union[str, list] = "all"
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "constant"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    batch_size: int = 1
    accumulation: int = 16
    epochs: float = 10
    max_steps: Optional[int] = None
    group_by_length: bool = True
    seed: int = 42
    evaluate_epochs: bool = False
    priority: int = 0
    group: Optional[str] = None

    def data_spec(self, cache_dir: Optional[str] = None, conversations: Optional[Format] = None) -> DataSpec:
        """What its rows are read by. conversations: what reads conversations, see DataSpec."""
        return DataSpec(
            self.dataset,
            self.dataset_format,
            eval_dataset=self.eval_dataset,
            eval_dataset_size=self.eval_dataset_size,
            max_train_samples=self.max_train_samples,
            max_eval_samples=self.max_eval_samples,
            train_subject=self.train_subject,
            mmlu_dir=self.mmlu_dir,
            cache_dir=cache_dir,
            seed=self.seed,
            evaluate=bool(self.eval_dataset or self.eval_dataset_size),
            conversations=conversations,
        )

    def stop_settings(self) -> tuple[StopSettings, list[str]]:
        """(its settings of early stopping, what is wrong with them)."""
        stop, problems = USUAL_STOP.given(vars(self))
        return stop, [problem.removeprefix("--") for problem in problems]

    def problems(self) -> list[str]:
        """What is wrong with its values, a sentence each that says what is allowed."""
        found = []
        for name, hint in _HINTS.items():
            if not _fits(getattr(self, name), hint):
                found.append(f"{name} = {getattr(self, name)!r:.80}: give {_in_words(hint)}")
        if found:
            return found  # the ranges below compare numbers
        found += name_problems(self.name)
        if not self.dataset:
            found.append("dataset is missing: give a json, jsonl, csv or tsv file, mmlu, or a hub name")
        numbers = {name: getattr(self, name) for name in _HINTS if _is_number(getattr(self, name))}
        found += [
            f"{name} = {value!r:.40}: must be at most {_most(name):g}"
            for name, value in numbers.items()
            if abs(value) > _most(name)
        ]
        for allowed, (names, fits) in _RANGES.items():
            wrong = [(name, getattr(self, name)) for name in names]
            found += [
                f"{name} = {value}: must be {allowed}" for name, value in wrong if _is_number(value) and not fits(value)
            ]
        if self.learn_turns not in LEARN_TURNS:
            found.append(f"learn_turns = {self.learn_turns!r}: choose one of {', '.join(LEARN_TURNS)}")
        if self.lr_scheduler_type not in SCHEDULES:
            found.append(f"lr_scheduler_type = {self.lr_scheduler_type!r}: choose one of {', '.join(SCHEDULES)}")
        return found + self.stop_settings()[1]


# Stems of what the run writes beside the folders of its jobs, and names that Windows keeps.
OWN_NAMES = ("overview", "states", "random_state", "con", "nul", "aux", "prn")
MOST_TOLD = 20  # problems, in one message
LONGEST_NAME = 200  # bytes
MOST_JOBS = 1000  # in one run, those of all grids together
_HINTS = {name: hint for name, hint in typing.get_type_hints(Job).items() if name not in STOP_KEYS}
_RANGES = {  # what is allowed: (names, whether a value is); NaN is in none of them
    "at least 1": (
        ("rank", "batch_size", "accumulation", "max_steps", "max_train_samples", "max_eval_samples", "source_max_len")
        + ("target_max_len",),
        lambda value: value >= 1,
    ),
    "above 0": (("alpha", "learning_rate", "epochs"), lambda value: value > 0),
    "0 or more": (("weight_decay", "max_grad_norm", "eval_dataset_size", "seed"), lambda value: value >= 0),
    "at least 0 and below 1": (("dropout", "warmup_ratio"), lambda value: 0 <= value < 1),
}
_MOST = {"seed": 2**32 - 1, "rank": 2**20, "epochs": MOST, "eval_dataset_size": MOST}
# Schedules that need nothing but the number of warm-up and of all steps.
SCHEDULES = [kind.value for kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP, SchedulerType.LINEAR)]
SCHEDULES += [
    kind.value for kind in (SchedulerType.COSINE, SchedulerType.COSINE_WITH_RESTARTS, SchedulerType.POLYNOMIAL)
]


def name_problems(name: str) -> list[str]:
    """What is wrong with a job's name, which names its folder."""
    if not re.fullmatch(r"\w[\w.+=-]*", name):
        return [f"name = {name!r:.80}: it names a folder; use letters, digits and . _ - + = only"]
    if len(name.encode()) > LONGEST_NAME:
        return [f"name = {name:.40}...: it has {len(name.encode())} bytes; a folder's name may have {LONGEST_NAME}"]
    if name.endswith(".") or folder_key(name).split(".")[0] in OWN_NAMES or re.fullmatch(r"\d+-states.*", name):
        return [f"name = {name!r}: the run itself writes what is called so; choose another name"]
    return []


def _most(name: str) -> float:
    """The largest value of a number that makes sense: of a count, of what is computed with."""
    return _MOST.get(name, LARGEST_FLOAT32 if float in _kinds(_HINTS[name]) else MOST)


def folder_key(name: str) -> str:
    """What is equal for names that some disk takes for one: those that differ by case alone."""
    return unicodedata.normalize("NFKC", name).casefold()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kinds(hint: Any) -> tuple[type, ...]:
    return typing.get_args(hint) or (hint,)


def _fits(value: Any, hint: Any) -> bool:
    kinds = _kinds(hint)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def _in_words(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list of texts"}
    return " or ".join(words[kind] for kind in _kinds(hint) if kind in words)


def read_jobs(path: Union[str, Path]) -> list[Job]:
    """The jobs of a toml, yaml or json file, grids expanded, in order.

    Raises FileNotFoundError where it is missing, ValueError, with every problem found, where it is
    wrong. Names given twice are left to the caller: they concern one job, not the file."""
    path = Path(path).expanduser()
    content = _read(path)
    problems = _unknown(content, ("defaults", "jobs", "grid"), "the file")
    defaults, grid = content.get("defaults", {}), content.get("grid", {})
    entries = content.get("jobs", [])
    if not isinstance(defaults, dict) or not isinstance(grid, dict) or not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: give a list of [[jobs]], and, if you like, tables [defaults] and [grid]")
    problems += _unknown(defaults, [name for name in JOB_KEYS if name != "name"], "[defaults]") + _grid_problems(
        grid, "[grid]"
    )
    wanted: list[tuple[dict[str, Any], dict[str, list]]] = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            problems.append(f'job {number}: give it a name = "..."')
            continue
        where = f"job {number} ({entry['name']:.80})"
        own_grid = entry.get("grid", {})
        found = _unknown(entry, (*JOB_KEYS, "grid"), where) + _grid_problems(own_grid, f"{where}, grid")
        problems += found
        if not found:
            wanted.append(({**defaults, **entry}, {**grid, **own_grid}))
    _raise(path, problems)
    count = sum(math.prod(map(len, combined.values())) for _, combined in wanted)
    if count > MOST_JOBS:
        problems.append(f"its grids make {count} jobs, and a run takes {MOST_JOBS} at most; give fewer values")
    _raise(path, problems)
    jobs = [job for values, combined in wanted for job in _expanded(values, combined, path.parent)]
    _raise(path, [f"job {job.name:.80}: {problem}" for job in jobs for problem in job.problems()])
    return jobs


def _raise(path: Path, problems: Sequence[str]) -> None:
    """Raises ValueError where there are problems; of many the first few."""
    told = list(dict.fromkeys(problems))
    if told:
        more = [f"and {len(told) - MOST_TOLD} more"] if len(told) > MOST_TOLD else []
        raise ValueError(f"{path}: " + "; ".join([*told[:MOST_TOLD], *more]))


JOB_KEYS = [entry.name for entry in fields(Job)]


class _YamlLoader(yaml.SafeLoader):
    """Reads 1e-4 as a number: YAML 1.1 wants 1.0e-4."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parsed_yaml(text: str) -> Any:
    try:
        return not_too_deep(lambda text: yaml.load(text, _YamlLoader), text)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # a date that is none, an unhashable key
        raise json.JSONDecodeError(" ".join(str(error).split()), "", 0) from None


def _read(path: Path) -> dict[str, Any]:
    readers = {
        ".toml": lambda text: parsed_toml(text, f"--config {path}", tomllib.loads, "name the file .json"),
        ".yaml": _parsed_yaml,
        ".yml": _parsed_yaml,
        ".json": parsed_json,
    }
    if path.suffix.lower() not in readers:
        raise ValueError(f"--config {path}: unknown kind of file '{path.suffix}'; give {', '.join(readers)}")
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: there is no such file")
    text = read_text(path)
    try:
        content = readers[path.suffix.lower()](text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: give a list of [[jobs]], and, if you like, tables [defaults] and [grid]")
    return content


def _unknown(table: dict[str, Any], known: Any, where: str) -> list[str]:
    problems = []
    for key in table:
        if key not in known:
            hint = nearest(str(key), known) or f"; known are {', '.join(known)}"
            problems.append(f"{where}: {key} is unknown{hint}")
    return problems


def _grid_problems(grid: Any, where: str) -> list[str]:
    if not isinstance(grid, dict):
        return [f"{where}: give lists of values, such as rank = [8, 32]"]
    problems = _unknown(grid, [name for name in JOB_KEYS if name not in ("name", "group")], where)
    empty = [key for key, values in grid.items() if not isinstance(values, list) or not values]
    return problems + [f"{where}: {key} = {grid[key]!r:.80}: give a list of values" for key in empty]


def _expanded(entry: dict[str, Any], grid: dict[str, list], folder: Path) -> list[Job]:
    """One job a combination of the grid, named after what it sets; without a grid, the job."""
    values = {key: _found(item, folder) if key in PATH_KEYS else item for key, item in entry.items() if key != "grid"}
    jobs = []
    for combination in itertools.product(*grid.values()):
        chosen = dict(zip(grid, combination))
        named = "-".join([values["name"], *(f"{key}{_short(value)}" for key, value in chosen.items())])
        group = {"group": values.get("group") or values["name"]} if grid else {}
        chosen = {key: _found(value, folder) if key in PATH_KEYS else value for key, value in chosen.items()}
        jobs.append(Job(**{**values, **chosen, **group, "name": named}))
    return jobs


def _short(value: Any) -> str:
    if isinstance(value, str) and "/" in value:
        text = Path(value).stem
    else:
        text = f"{value:g}" if type(value) is float else str(value)
    return re.sub(r"[^\w.+=-]", "_", text)


def _found(value: Any, folder: Path) -> Any:
    """A path as given where it leads somewhere; else beside the configuration file."""
    if isinstance(value, str) and value and not Path(value).expanduser().exists() and (folder / value).exists():
        return str(folder / value)
    return value
