"""One training run with early stopping, whatever the trainer: the flags, the plan, the monitor, the
verdict.

Copied into a patched trainer beside the hooks, which know the trainers. Python 3.8, torch
1.13.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch

from cs_fluctuation import NonFiniteWeightsError
from es_lora.files import write_text_whole
from es_lora.gradient_evidence import GradientEvidence
from es_lora.history import HISTORY_NAME
from es_lora.monitor import MEASURED, EarlyStopMonitor, scalars
from es_lora.outcome import REPORT_NAME, Outcome
from es_lora.report import write_report
from es_lora.rules import RULES
from es_lora.settings import VALLEY_HELP, StopSettings, add_stop_arguments

PACKAGES = ("torch", "transformers", "diffusers", "peft", "accelerate", "bitsandbytes", "safetensors")
# The columns of the history that a rule can have here.
RECORDED = {*MEASURED, "grad_evidence"}
STEP_NAME = "es_lora_step.json"  # in a saved state: the optimizer steps done, which upstream does not carry everywhere

# -------------------------------------------------------------------------------------------- flags

USUAL = StopSettings(calculate_cs=False)
LEFT_OUT = ("shadows", "shadow_rank", "shadow_interval")  # they need passes of their own through the model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags, in a parser of sd-scripts (and so in its --config_file)."""
    group = parser.add_argument_group("early stopping (ES-LoRA)")
    add_stop_arguments(group, dataclasses.replace(USUAL, cs_reduction="matrix"), LEFT_OUT)


def training_argument(name: str) -> Any:
    """The dataclass field of a flag, for qlora's TrainingArguments."""
    if name == "valley":
        return dataclasses.field(default=None, metadata={"help": VALLEY_HELP})
    flag = next(entry for entry in dataclasses.fields(StopSettings) if entry.name == name)
    more = {"aliases": list(flag.metadata["aliases"])} if "aliases" in flag.metadata else {}
    return dataclasses.field(default=USUAL.as_flags()[name], metadata={"help": flag.metadata["help"], **more})


def read_settings(args: Any, reduction: str) -> Optional[StopSettings]:
    """The early-stop flags out of the trainer's arguments, None where it is off.

    reduction: the trainer's usual one. Raises ValueError with every problem at once; values may
    come from a TOML file.
    """
    settings, problems = dataclasses.replace(USUAL, cs_reduction=reduction).given(vars(args))
    needs = RULES[settings.stop_rule].needs if settings.stop_rule in RULES else ()
    missing = ", ".join(column for column in needs if column not in RECORDED)
    if missing:
        problems.append(f"--stop_rule {settings.stop_rule} needs {missing}, which is not recorded here; choose another")
    if problems:
        raise ValueError("; ".join(problems))
    return settings if settings.calculate_cs else None


def say(text: str) -> None:
    print(f"ES-LoRA: {text}", flush=True)


# ------------------------------------------------------------------------------------------ one run

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
    """Plan, monitor and verdict of one training run. The monitor lives on the main process, its
    answers on all.

    folder: where history, snapshots and report go. layers: live LoRA layers. tensors: what a
    snapshot holds.
    steps_per_epoch, more_steps: optimizer steps of an epoch, and still to come. batches_per_epoch:
    backward passes of an epoch on one process. resume_from: a saved state's folder.
    """

    def __init__(self, settings: StopSettings, folder: Path, layers: List[Any], tensors: Callable, steps_per_epoch: int,
                 more_steps: int, batches_per_epoch: int, is_main: bool, resume_from: Optional[Path],
                 header: Dict[str, Any]):  # fmt: skip
        self.settings, self.folder, self.steps_per_epoch = settings, folder, steps_per_epoch
        self.step = _resumed_step(resume_from)  # completed optimizer steps
        self.total_steps, self.seed = self.step + more_steps, header.get("seed")
        self.stopped = False
        self.diverged: Optional[str] = None
        self._losses: List[torch.Tensor] = []
        components = list(dict.fromkeys(layer.component for layer in layers))
        self.plan = settings.plan(components, steps_per_epoch, self.total_steps)
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
            f"on. CS of {len(layers)} layers ({', '.join(components)}; {self.plan.component} decides) is measured "
            f"every {self.plan.cs_interval} steps, window M = {self.plan.window}, rule {settings.stop_rule}; an epoch "
            f"has {steps_per_epoch} steps. History: {self.monitor.history_path}"
        )
        if not settings.early_stop:
            say("--early_stop is not given: the turning point is marked and saved, and training goes on to its end.")
        if self.plan.average:
            say(f"an average of the weights is kept, of width {self.plan.average:g} (--average 0: single steps).")
        if self.monitor.snapshots.every > 1:
            say(f"the snapshots' disk limit lets only every {self.monitor.snapshots.every}th measurement be kept.")
        for notice in self.plan.notices:
            say(notice)

    def epoch_of(self, step: int) -> int:
        """The epoch, counted from 1, that a step belongs to."""
        return math.ceil(step / self.steps_per_epoch)

    def after_step(self, loss: Optional[torch.Tensor], learning_rate: Optional[float], device: Any) -> bool:
        """Count a completed optimizer step and, where it is due, measure; whether it was
        measured."""
        self.step += 1
        if self.monitor is not None:
            self.monitor.after_step()
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

    def log_measured(self, accelerator: Any, step: int) -> None:
        """Give the last measurement to the trainer's trackers. step: the trainer's own count."""
        record = self.monitor.last_record if self.monitor is not None else None
        if record and accelerator.trackers:
            accelerator.log(scalars(record), step=step)

    def save_state(self, folder: Path) -> None:
        """Put the monitor, and the number of steps done, into a saved training state."""
        self.monitor.save_state(folder)
        write_text_whole(Path(folder) / STEP_NAME, json.dumps({"step": self.step}))
        self.monitor.state_saved(folder)

    def kept_step(self) -> Optional[int]:
        """The step whose weights are the result: the turning point; after divergence the last
        finite snapshot."""
        if self.diverged is not None and self.settings.early_stop:
            return self.monitor.latest_snapshot_step()
        return self.monitor.decision.keep_step if self.monitor.decision is not None else None

    @property
    def keeps_turning_point(self) -> bool:
        """Whether the turning point is the result, and not the end of the training."""
        return self.settings.early_stop and self.kept_step() is not None

    def outcome_kept_in(self, path: str) -> Outcome:
        """The outcome with the file of the result. path: from the folder of the history."""
        outcome = self.outcome()
        averaged = outcome.averages and (self.keeps_turning_point or outcome.keeps_average_of_all)
        outcome.saved("kept", path, self.kept_step() if self.keeps_turning_point else self.step, averaged)
        return outcome

    def outcome(self) -> Outcome:
        """How the run ended, as far as it is known now."""
        decision, name = self.monitor.decision, "no_turning_point"
        if decision is not None:
            name = "stopped_early" if self.stopped else "budget_reached"
        if self.diverged is not None:
            name = "diverged"
        return Outcome(
            name, self.step, self.total_steps, plan=self.plan, decision=decision, diverged=self.diverged, seed=self.seed
        )

    def finish(self, outcome: Outcome) -> None:
        """Write result.json and report.html, delete the snapshots, and say what there is. outcome:
        with its files."""
        self.monitor.close()
        outcome.write(self.folder, self.settings.as_flags(), PACKAGES)
        if self.monitor.measurements:
            write_report(
                self.folder / REPORT_NAME,
                self.monitor.history_path,
                verdict=outcome.sentence(),
                decision=outcome.decision,
                tables=outcome.tables(),
            )
        print()  # the progress bar stands on this line
        for line in outcome.last_lines(self.folder, (), {}):
            if line:
                say(line)


class NoEarlyStop:
    """Stands in where early stopping is off."""

    stopped = False

    def after_step(self, accelerator: Any, global_step: int, loss: torch.Tensor) -> None:
        pass


@contextmanager
def ended_where_wrong() -> Iterator[None]:
    """End the program with code 2 and one line where a flag or a file is wrong."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        print(f"ES-LoRA: {error}", file=sys.stderr)
        sys.exit(2)


def carry_in_states(accelerator: Any, run: EarlyStopRun) -> None:
    """Whatever saves a training state with this accelerator saves the monitor with it."""
    save_state = accelerator.save_state

    def save_state_and_monitor(output_dir: Any = None, *rest: Any, **options: Any) -> Any:
        answer = save_state(output_dir, *rest, **options)
        run.save_state(Path(output_dir or answer))
        return answer

    accelerator.save_state = save_state_and_monitor


def _resumed_step(folder: Optional[Path]) -> int:
    if folder is None or not (Path(folder) / STEP_NAME).is_file():
        return 0  # where the state holds no CS at all, the monitor says so
    return json.loads((Path(folder) / STEP_NAME).read_text(encoding="utf-8"))["step"]


def _put_aside(path: Path) -> None:
    """A training that starts anew under an old name replaces the old result; its history is kept
    beside the new one."""
    number = 1
    while path.exists():
        aside = path.with_name(f"{path.stem}.{number}{path.suffix}")
        if not aside.exists():
            os.replace(path, aside)
        number += 1
