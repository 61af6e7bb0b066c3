"""One training run with early stopping, whatever the trainer: the flags, the plan, the monitor, the verdict.

Copied into a patched trainer beside es_lora_hook.py, which knows the trainers. Python 3.8, torch 1.13.
"""

import argparse
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

from cs_fluctuation import NonFiniteWeightsError
from es_lora.files import write_text_whole
from es_lora.gradient_evidence import GradientEvidence
from es_lora.history import HISTORY_NAME
from es_lora.monitor import MEASURED, EarlyStopMonitor
from es_lora.report import write_report
from es_lora.rules import DEFAULT_RULE, RULES, check_rule, value_of_valley
from es_lora.settings import StopSettings

# The columns of the history that a rule can have here.
RECORDED = {*MEASURED, "grad_evidence"}
STEP_NAME = "es_lora_step.json"  # in a saved state: the optimizer steps done, which upstream does not carry everywhere

# ------------------------------------------------------------------------------------------------ flags

FLAGS: Dict[str, Tuple[type, Any, str]] = {
    "calculate_cs": (bool, False, "measure CS, the cosine between the frozen weights and their LoRA updates"),
    "early_stop": (bool, False, "stop at the turning point of CS and keep its weights (switches --calculate_cs on)"),
    "cs_interval": (str, "auto", "optimizer steps between measurements, or auto: about ten an epoch"),
    "window_size": (str, "auto", "measurements in the window of CS-Fluctuation, or auto: about one epoch"),
    "stop_rule": (str, DEFAULT_RULE, f"the rule that decides: {', '.join(RULES)}"),
    "valley": (int, 2, "which valley of CS-Fluctuation the rule nth-valley stops at"),
    "rule_value": (float, None, "the number of the other rules: epochs, a threshold (default: the rule's own)"),
    "cs_reduction": (str, None, "matrix: cosine of whole matrices; row: mean cosine of their rows"),
    "cs_component": (str, None, "whose CS decides: unet, te, te1, te2, lm or all (default: unet, where it is trained)"),
    "snapshot_disk_gb": (float, 20.0, "disk that the snapshots of the LoRA weights may use"),
}


def _truth(text: Any) -> bool:
    if str(text).lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return str(text).lower() in ("true", "1", "yes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags, in a parser of sd-scripts (and so in its --config_file)."""
    group = parser.add_argument_group("early stopping (ES-LoRA)")
    for name, (kind, default, text) in FLAGS.items():
        names = [f"--{name}"] + (["--cs_steps"] if name == "cs_interval" else [])
        if kind is bool:
            group.add_argument(*names, type=_truth, nargs="?", const=True, default=default, help=text)
        else:
            group.add_argument(*names, type=kind, default=default, help=text)


def training_argument(name: str) -> Any:
    """The dataclass field of a flag, for qlora's TrainingArguments."""
    _, default, text = FLAGS[name]
    aliases = {"aliases": ["--cs_steps"]} if name == "cs_interval" else {}
    return dataclasses.field(default=default, metadata={"help": text, **aliases})


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags, checked. cs_interval, window, component: None means automatic."""

    early_stop: bool
    cs_interval: Optional[int]
    window: Optional[int]
    rule: str
    valley: int
    value: Optional[float]
    reduction: str
    component: Optional[str]
    disk_bytes: float


def read_settings(args: Any, reduction: str) -> Optional[Settings]:
    """The early-stop flags out of the trainer's arguments, None where it is off.

    reduction: the trainer's usual one. Raises ValueError with every problem at once; values may come from a TOML file.
    """
    problems: List[str] = []

    def truth(name: str) -> bool:
        try:
            return _truth(getattr(args, name))
        except argparse.ArgumentTypeError as error:
            problems.append(f"--{name}: {error}")
            return True

    calculate_cs, early_stop = truth("calculate_cs"), truth("early_stop")
    if not (calculate_cs or early_stop):
        return None

    def count(name: str) -> Optional[int]:
        value = getattr(args, name)
        if value in (None, "auto"):
            return None
        if isinstance(value, bool) or not str(value).isdigit() or int(value) < 1:
            problems.append(f"--{name} is {value!r}; give a whole number from 1, or auto")
            return None
        return int(value)

    interval, window = count("cs_interval"), count("window_size")
    chosen = args.cs_reduction or reduction
    if args.stop_rule not in RULES:
        problems.append(f"--stop_rule is {args.stop_rule!r}; choose one of {', '.join(RULES)}")
    elif not RECORDED.issuperset(RULES[args.stop_rule].needs):
        missing = ", ".join(column for column in RULES[args.stop_rule].needs if column not in RECORDED)
        problems.append(f"--stop_rule {args.stop_rule} needs {missing}, which is not recorded here; choose another")
    is_number = isinstance(args.valley, int) and args.valley > 0
    if not is_number or (args.stop_rule == "second-valley" and args.valley != 2):
        problems.append(
            f"--valley is {args.valley!r}; give a number from 1, with --stop_rule nth-valley where it is not 2"
        )
    if args.stop_rule in RULES:
        try:
            check_rule(args.stop_rule, value=args.rule_value)
        except (ValueError, TypeError) as error:
            problems.append(f"--rule_value: {error}")
    if chosen not in ("matrix", "row"):
        problems.append(f"--cs_reduction is {chosen!r}; choose matrix or row")
    if not isinstance(args.snapshot_disk_gb, (int, float)) or not args.snapshot_disk_gb > 0:
        problems.append(f"--snapshot_disk_gb is {args.snapshot_disk_gb!r}; give the gigabytes that snapshots may use")
    if problems:
        raise ValueError("; ".join(problems))
    disk_bytes = args.snapshot_disk_gb * 1e9
    number = value_of_valley(args.stop_rule, args.valley)
    rest = (args.valley, args.rule_value if number is None else number, chosen, args.cs_component, disk_bytes)
    return Settings(early_stop, interval, window, args.stop_rule, *rest)


def say(text: str) -> None:
    print(f"ES-LoRA: {text}", flush=True)


# ------------------------------------------------------------------------------------------------ one run

GO_ON, STOP, FAILED = range(3)  # what the main process tells the others after a measurement


def heard_by_all(answer: int, device: Any) -> int:
    """The main process's answer, on every process."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return answer
    tensor = torch.tensor([answer], device="cpu" if distributed.get_backend() == "gloo" else device)
    distributed.broadcast(tensor, 0)
    return int(tensor.item())


class EarlyStopRun:
    """Plan, monitor and verdict of one training run. The monitor lives on the main process, its answers on all.

    folder: where history, snapshots and report go. layers: live LoRA layers. tensors: what a snapshot holds.
    steps_per_epoch, more_steps: optimizer steps of an epoch, and still to come. batches_per_epoch: backward passes of
    an epoch on one process. resume_from: a saved state's folder.
    """

    def __init__(self, settings: Settings, folder: Path, layers: List[Any], tensors: Callable, steps_per_epoch: int,
                 more_steps: int, batches_per_epoch: int, is_main: bool, resume_from: Optional[Path],
                 header: Dict[str, Any]):  # fmt: skip
        self.settings, self.folder, self.steps_per_epoch = settings, folder, steps_per_epoch
        self.step = _resumed_step(resume_from)  # completed optimizer steps
        self.stopped = False
        self.diverged: Optional[str] = None
        self._losses: List[torch.Tensor] = []
        components = list(dict.fromkeys(layer.component for layer in layers))
        alone = components[0] if len(components) == 1 else "all"
        component = settings.component or ("unet" if "unet" in components else alone)
        if component not in (*components, "all"):
            raise ValueError(f"--cs_component is {component!r}; trained are {', '.join(components)} (or all)")
        stop = StopSettings(
            True,
            settings.early_stop,
            settings.cs_interval,
            settings.window,
            settings.rule,
            settings.value,
            settings.reduction,
            component,
            snapshot_disk_gb=settings.disk_bytes / 1e9,
        )
        self.plan = stop.plan(components, steps_per_epoch, self.step + more_steps)
        self.monitor: Optional[EarlyStopMonitor] = None
        if not is_main:
            return
        if resume_from is None:
            _put_aside(folder / HISTORY_NAME)
        self.monitor = EarlyStopMonitor(
            folder,
            self.plan,
            layers,
            tensors,
            header=header,
            resume_from=resume_from,
            evidence=GradientEvidence(tensors().values(), batches_per_epoch),
        )
        say(
            f"on. CS of {len(layers)} layers ({', '.join(components)}; {component} decides) is measured every "
            f"{self.plan.cs_interval} steps, window M = {self.plan.window}, rule {settings.rule}; an epoch has "
            f"{steps_per_epoch} steps. History: {self.monitor.history_path}"
        )
        if not settings.early_stop:
            say("--early_stop is not given: the turning point is marked and saved, and training goes on to its end.")
        if self.monitor.snapshots.every > 1:
            say(f"the snapshots' disk limit lets only every {self.monitor.snapshots.every}th measurement be kept.")
        for notice in self.plan.notices:
            say(notice)

    def epoch_of(self, step: int) -> int:
        """The epoch, counted from 1, that a step belongs to."""
        return math.ceil(step / self.steps_per_epoch)

    def after_step(self, loss: Optional[torch.Tensor], learning_rate: Optional[float], device: Any) -> bool:
        """Count a completed optimizer step and, where it is due, measure; whether it was measured."""
        self.step += 1
        if loss is not None:
            self._losses.append(loss.detach())
        if self.step % self.plan.cs_interval:
            return False
        answer, failure = GO_ON, None
        if self.monitor is not None:
            try:
                answer = self._measure(learning_rate)
            except Exception as error:  # the other processes must hear of it before it is raised
                answer, failure = FAILED, error
        answer = heard_by_all(answer, device)
        if failure is not None:
            raise failure
        if answer == FAILED:
            raise RuntimeError("measuring CS failed on the main process; its message says why")
        self.stopped = self.stopped or answer == STOP
        return True

    def _measure(self, learning_rate: Optional[float]) -> int:
        loss = torch.stack(self._losses).float().mean().item() if self._losses else None
        self._losses = []
        try:
            decision = self.monitor.measure(self.step, self.step / self.steps_per_epoch, loss=loss, lr=learning_rate)
        except NonFiniteWeightsError as error:
            if self.diverged is None:
                print()
                say(str(error))
            self.diverged = str(error)
            return STOP if self.settings.early_stop else GO_ON
        if decision is None:
            return GO_ON
        print()  # the progress bar stands on this line
        say(decision.reason)
        return STOP if self.settings.early_stop else GO_ON

    def save_state(self, folder: Path) -> None:
        """Put the monitor, and the number of steps done, into a saved training state."""
        self.monitor.save_state(folder)
        write_text_whole(Path(folder) / STEP_NAME, json.dumps({"step": self.step}))
        self.monitor.state_saved(folder)

    def kept_step(self) -> Optional[int]:
        """The step whose weights are the result: the turning point; after divergence the last finite snapshot."""
        if self.diverged is not None and self.settings.early_stop:
            return self.monitor.latest_snapshot_step()
        return self.monitor.decision.keep_step if self.monitor.decision is not None else None

    def verdict(self) -> Dict[str, Any]:
        decision = self.monitor.decision
        outcome = "budget_reached" if decision is not None else "no_turning_point"
        reason = f"No turning point in {self.monitor.measurements} measurements."
        if decision is not None:
            outcome, reason = ("stopped_early" if self.stopped else outcome), decision.reason
        if self.diverged is not None:
            outcome, reason = "diverged", self.diverged
        return {
            "outcome": outcome,
            "kept_step": self.kept_step(),
            "detected_step": decision.detected_step if decision is not None else None,
            "usable_steps": list(decision.usable) if decision is not None else None,
            "last_step": self.step,
            "reason": reason,
            "rule": self.settings.rule,
            "window": self.plan.window,
            "cs_interval": self.plan.cs_interval,
        }

    def finish(self, files: Dict[str, str]) -> None:
        """Write result.json and report.html, delete the snapshots, and say what there is."""
        verdict = self.verdict()
        self.monitor.close()
        write_text_whole(self.folder / "result.json", json.dumps({**verdict, "files": files}, indent=1) + "\n")
        if self.monitor.measurements:
            facts = {key: value for key, value in verdict.items() if key not in ("reason", "usable_steps")}
            history, decision = self.monitor.history_path, self.monitor.decision
            write_report(
                self.folder / "report.html", history, verdict=verdict["reason"], decision=decision, settings=facts
            )
        words = {"stopped_early": "stopped early", "budget_reached": "trained to the end", "diverged": "diverged"}
        outcome = words.get(verdict["outcome"], verdict["reason"])
        say(f"{outcome} (step {self.step}). Report: {self.folder / 'report.html'}")
        for what, name in files.items():
            say(f"{what}: {name}")


def _resumed_step(folder: Optional[Path]) -> int:
    if folder is None or not (Path(folder) / STEP_NAME).is_file():
        return 0  # where the state holds no CS at all, the monitor says so
    return json.loads((Path(folder) / STEP_NAME).read_text(encoding="utf-8"))["step"]


def _put_aside(path: Path) -> None:
    """A training that starts anew under an old name replaces the old result; its history is kept beside the new one."""
    number = 1
    while path.exists():
        aside = path.with_name(f"{path.stem}.{number}{path.suffix}")
        if not aside.exists():
            os.replace(path, aside)
        number += 1
