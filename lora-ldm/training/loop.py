"""The training loop: epochs, optimizer steps, and what is due after each of them."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from tqdm import tqdm

from cs_fluctuation import NonFiniteWeightsError
from es_lora.command_line import NotedSignals
from network.lora_file import DTYPES
from training.logs import log_measurement, log_step
from training.setup import Run
from training.state import save_state

GO_ON, DECIDED, DIVERGED = range(3)  # what the first process tells the others


@dataclass(frozen=True)
class Ending:
    """How training ended, before anything is saved. name: a key of outcome.EXIT_CODES.
    finite: the newest (step, {name: tensor}) known to be finite, to fall back on."""

    name: str
    seconds: float
    finite: Optional[tuple[int, dict[str, torch.Tensor]]]


def train(run: Run) -> Ending:
    """Run to the budget, the turning point, an interruption or a divergence."""
    return Loop(run).until_it_ends()


class Loop:
    """A run on its way. ended: the name of the ending, None while it goes on. decided: whether the
    rule has, now or before the run was resumed."""

    def __init__(self, run: Run):
        self.run, self.signals = run, NotedSignals()
        self.ended: Optional[str] = None
        self.decided = False
        self.finite: Optional[tuple[int, dict[str, torch.Tensor]]] = None
        copies_per_epoch = 1 if run.args.train_full_unet else 10
        self.finite_interval = max(1, run.length.steps_per_epoch // copies_per_epoch)

    def until_it_ends(self) -> Ending:
        run, started_at = self.run, time.time()
        length, first = run.length, run.progress.step
        run.processes.say(
            f"{len(run.loader.batches)} batches and {length.steps_per_epoch} steps an epoch, "
            f"{length.total_epochs} epochs, {length.total_steps} steps, seed {run.args.seed}, on {run.processes.device}"
        )
        self.keep_finite()
        if run.plan is not None:
            self.hear_decision()
        self.ended = self.what_is_left()
        if run.args.sample_at_first and first == 0:
            run.previews.save("-000000")
        hidden = not run.processes.is_main
        with self.signals, tqdm(total=length.total_steps, initial=first, disable=hidden, desc="steps") as bar:
            while self.ended is None:
                self.epoch(bar)
        return Ending(self.ended, time.time() - started_at, self.finite)

    def what_is_left(self) -> Optional[str]:
        """None where there are steps to train, else the name of the ending: only to finish is left.

        The one place that says so, after every step and for a resumed state; the same on all
        processes."""
        if self.decided and self.run.plan.stop.early_stop:
            return "stopped_early"
        return "budget_reached" if self.run.progress.step >= self.run.length.total_steps else None

    def hear_decision(self, finite: bool = True) -> None:
        """The first process tells whether the rule has decided, or the weights have diverged."""
        monitor = self.run.monitor
        answer = DECIDED if monitor is not None and monitor.decision is not None else GO_ON
        told = self.run.processes.told_by_main(answer if finite else DIVERGED)
        self.decided = told == DECIDED
        if told == DIVERGED:
            self.ended = "diverged"

    def epoch(self, bar: tqdm) -> None:
        """Train to the end of an epoch, or to that of the run."""
        epoch, done = self.run.progress.epoch
        if done == 0:
            self.run.progress.begin_epoch()
        for batches in self.run.loader.steps(epoch, done):
            self.step(batches, bar)
            if self.ended is not None:
                return

    def step(self, batches: list[dict], bar: tqdm) -> None:
        """One optimizer step over its micro-batches, and what is due after it."""
        run, progress = self.run, self.run.progress
        loss, interrupted = self.backward(batches)
        if not self.is_finite(loss):
            self.ended = "diverged"
            return
        if run.shadows is not None:
            run.shadows.step(run.optimization.raw)
        run.optimization.step(run.processes.accelerator)
        norms = run.network.scale_weight_norms(run.args.scale_weight_norms) if run.args.scale_weight_norms else None
        progress.step += 1
        loss_now = loss.item()
        progress.add_loss(loss_now)
        bar.update()
        bar.set_postfix(loss=f"{progress.epoch_mean_loss:.4f}", refresh=False)
        with run.optimization.weights_to_use():
            if run.monitor is not None:
                run.monitor.after_step()
            self.measure()
            if progress.step % self.finite_interval == 0 and self.ended is None:
                self.keep_finite()
        losses = loss_now, progress.epoch_mean_loss
        log_step(run.processes.accelerator, progress.step, losses, run.optimization, norms)
        if self.ended is None:
            self.ended = self.what_is_left()
        self.after_step()
        if interrupted and self.ended is None:
            self.ended = "interrupted"

    def backward(self, batches: list[dict]) -> tuple[torch.Tensor, bool]:
        """A step's gradients. -> (mean loss, interrupted anywhere), the same on all processes."""
        run, processes = self.run, self.run.processes
        seen, total = Counter(), torch.zeros((), device=processes.device)
        for batch in batches:
            noised = run.objective.noised(batch, run.progress.step, seen)
            loss = run.objective.picture_losses(batch, noised).mean() / len(batches)
            processes.accelerator.backward(loss)
            total += loss.detach()
            if run.shadows is not None:
                run.shadows.backward(batch, noised)
        processes.share_gradients(run.optimization.parameters)
        interrupted = torch.tensor(float(self.signals.interrupted), device=processes.device)
        loss, interrupted = processes.mean(torch.stack([total.float(), interrupted]))
        return loss, bool(interrupted)

    def is_finite(self, loss: torch.Tensor) -> bool:
        """Clip the gradients; whether they and the loss are finite. A scaler seeks overflows."""
        run, accelerator = self.run, self.run.processes.accelerator
        norm = accelerator.clip_grad_norm_(run.optimization.parameters, run.args.max_grad_norm or float("inf"))
        return bool(torch.isfinite(loss) and (accelerator.scaler is not None or torch.isfinite(norm)))

    def measure(self) -> None:
        """Measure CS where due, and hear what came of it."""
        run = self.run
        if run.plan is not None and run.plan.due(run.progress.step):
            self.hear_decision(finite=run.monitor is None or self.measured())

    def measured(self) -> bool:
        """A measurement of the first process. -> whether the weights are finite."""
        run, progress = self.run, self.run.progress
        epoch, rate = progress.step / progress.steps_per_epoch, float(run.optimization.scheduler.get_last_lr()[0])
        try:
            run.monitor.measure(progress.step, epoch, loss=progress.take_mean_loss(), lr=rate)
        except NonFiniteWeightsError:
            return False
        log_measurement(run.processes.accelerator, run.monitor.last_record)
        return True

    def keep_finite(self) -> None:
        """Weights to fall back on should training diverge; only finite ones are kept."""
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.run.network.tensors().items()}
        if all(torch.isfinite(tensor).all() for tensor in copies.values()):
            self.finite = (self.run.progress.step, copies)

    # ------------------------------------------------------------------------------- what is due

    def after_step(self) -> None:
        """What is due after a step, and after an epoch where it was the last of one.

        Checkpoints come last: a run that is resumed from one has missed nothing. A run that stops
        early has no more epochs."""
        args, step, names = self.run.args, self.run.progress.step, self.run.files.names
        epochs_done, steps_of_next = self.run.progress.epoch
        epoch_ends = steps_of_next == 0 and self.ended in (None, "budget_reached")
        if args.sample_every_n_steps and not args.sample_every_n_epochs and step % args.sample_every_n_steps == 0:
            self.run.previews.save(names.step_part(step))
        if args.validate_every_n_steps and step % args.validate_every_n_steps == 0:
            self.validate()
        if epoch_ends:
            self.after_epoch(epochs_done)
        of_step, of_epoch = names.step_due(step), epoch_ends and names.epoch_due(epochs_done)
        parts = [names.step_part(step)] * of_step + [names.epoch_part(epochs_done)] * of_epoch
        self.save_checkpoints(parts)
        if of_step:
            names.forget_steps(step)
        if of_epoch:
            names.forget_epochs(epochs_done)

    def after_epoch(self, epochs_done: int) -> None:
        """Previews and validation that are counted in epochs."""
        run, args, names = self.run, self.run.args, self.run.files.names
        run.processes.accelerator.log({"loss/epoch_average": run.progress.epoch_mean_loss}, step=run.progress.step)
        every = args.validate_every_n_epochs or (None if args.validate_every_n_steps else 1)
        if every and epochs_done % every == 0:
            self.validate()
        if args.sample_every_n_epochs and epochs_done % args.sample_every_n_epochs == 0:
            run.previews.save(names.epoch_part(epochs_done))

    def validate(self) -> None:
        """The held-out loss goes to logs and history; it decides only as a column of the rule."""
        run = self.run
        if run.validation is None or not run.processes.is_main:
            return
        loss = run.validation.loss()
        run.processes.accelerator.log({"loss/validation": loss}, step=run.progress.step)
        if run.monitor is not None:
            run.monitor.note_heldout(run.progress.step, loss)

    def save_checkpoints(self, parts: list[str]) -> None:
        """The present weights under the name with each part; then with --save_state the states.

        A state is there only when all weights of its step are."""
        run = self.run
        for part in parts if run.processes.is_main else []:
            with run.optimization.weights_to_use():
                tensors = run.network.state_for_file(DTYPES[run.args.save_precision])
            run.files.save(part, tensors, run.progress.step)
        for part in parts if run.args.save_state else []:
            save_run(run, part)


def save_run(run: Run, part: str = "") -> str:
    """Write a run's state under its name with this part; all processes call it. -> name.

    A state that was resumed and only finished is not written again."""
    folder = run.files.names.state_path(part)
    parts = run.network, run.optimization, run.monitor, run.shadows
    if not (run.progress.step == run.first_step and is_same_place(run.args.resume, folder)):
        save_state(folder, run.processes, run.progress, *parts)
    return folder.name


def is_same_place(path: Optional[str], other: Path) -> bool:
    """Whether a path that was given, or None, leads to another one."""
    return bool(path) and Path(path).resolve() == other.resolve()
