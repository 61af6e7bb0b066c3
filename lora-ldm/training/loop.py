"""The training loop: epochs, optimizer steps, and what is due after each of them."""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Optional

import torch
from tqdm import tqdm

from cs_fluctuation import NonFiniteWeightsError
from es_lora.command_line import NotedSignals
from network.lora_file import DTYPES
from training.logs import log_measurement, log_step
from training.setup import Run
from training.state import save_state

GO_ON, DECIDED, DIVERGED = range(3)  # what the first process tells the others after a measurement


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
    """A run on its way. ended: the name of the ending, None while it goes on."""

    def __init__(self, run: Run):
        self.run, self.signals = run, NotedSignals()
        self.ended: Optional[str] = None
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
        if run.args.sample_at_first and first == 0:
            run.previews.save("-000000")
        hidden = not run.processes.is_main
        with self.signals, tqdm(total=length.total_steps, initial=first, disable=hidden, desc="steps") as bar:
            while self.ended is None:
                self.epoch(bar)
        return Ending(self.ended, time.time() - started_at, self.finite)

    def epoch(self, bar: tqdm) -> None:
        """Train to the end of an epoch, or to that of the run."""
        run, progress = self.run, self.run.progress
        epoch, done = progress.epoch
        if done == 0:
            progress.begin_epoch()
        for batches in run.loader.steps(epoch, done):
            self.step(batches, bar)
            if self.ended is not None:
                return
            if progress.step >= run.length.total_steps:
                self.ended = "budget_reached"
                break
        if progress.epoch[1] == 0:
            self.after_epoch(epoch + 1)

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
        """Measure CS where due; stop everywhere if the rule says so and --early_stop is on."""
        run = self.run
        if run.plan is None or not run.plan.due(run.progress.step):
            return
        told = run.processes.told_by_main(GO_ON if run.monitor is None else self.measured())
        if told == DIVERGED:
            self.ended = "diverged"
        elif told == DECIDED and run.plan.stop.early_stop:
            self.ended = "stopped_early"

    def measured(self) -> int:
        """A measurement of the first process, and what it says to all."""
        run, progress = self.run, self.run.progress
        epoch, rate = progress.step / progress.steps_per_epoch, float(run.optimization.scheduler.get_last_lr()[0])
        try:
            decision = run.monitor.measure(progress.step, epoch, loss=progress.take_mean_loss(), lr=rate)
        except NonFiniteWeightsError:
            return DIVERGED
        log_measurement(run.processes.accelerator, run.monitor.last_record)
        return GO_ON if decision is None else DECIDED

    def keep_finite(self) -> None:
        """Weights to fall back on should training diverge; only finite ones are kept."""
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.run.network.tensors().items()}
        if all(torch.isfinite(tensor).all() for tensor in copies.values()):
            self.finite = (self.run.progress.step, copies)

    # ------------------------------------------------------------------------------- what is due

    def after_step(self) -> None:
        """Previews, validation and checkpoints that are counted in steps."""
        run, args, step = self.run, self.run.args, self.run.progress.step
        names = run.files.names
        if args.sample_every_n_steps and not args.sample_every_n_epochs and step % args.sample_every_n_steps == 0:
            run.previews.save(names.step_part(step))
        if args.validate_every_n_steps and step % args.validate_every_n_steps == 0:
            self.validate()
        if names.step_due(step):
            self.save_checkpoint(names.step_part(step))
            names.forget_steps(step)

    def after_epoch(self, epochs_done: int) -> None:
        """Previews, validation and checkpoints that are counted in epochs."""
        run, args, names = self.run, self.run.args, self.run.files.names
        run.processes.accelerator.log({"loss/epoch_average": run.progress.epoch_mean_loss}, step=run.progress.step)
        every = args.validate_every_n_epochs or (None if args.validate_every_n_steps else 1)
        if every and epochs_done % every == 0:
            self.validate()
        if args.sample_every_n_epochs and epochs_done % args.sample_every_n_epochs == 0:
            run.previews.save(names.epoch_part(epochs_done))
        if names.epoch_due(epochs_done):
            self.save_checkpoint(names.epoch_part(epochs_done))
            names.forget_epochs(epochs_done)

    def validate(self) -> None:
        """The held-out loss goes to logs and history; it decides only as a column of the rule."""
        run = self.run
        if run.validation is None or not run.processes.is_main:
            return
        loss = run.validation.loss()
        run.processes.accelerator.log({"loss/validation": loss}, step=run.progress.step)
        if run.monitor is not None:
            run.monitor.note_heldout(run.progress.step, loss)

    def save_checkpoint(self, part: str) -> None:
        """The present weights under the name with this part, and the state with --save_state."""
        run = self.run
        if run.processes.is_main:
            with run.optimization.weights_to_use():
                tensors = run.network.state_for_file(DTYPES[run.args.save_precision])
            run.files.save(part, tensors, run.progress.step)
        if run.args.save_state:
            save_run(run, part)


def save_run(run: Run, part: str = "") -> str:
    """Write a run's state under its name with this part; all processes call it. -> name."""
    folder = run.files.names.state_path(part)
    parts = run.network, run.optimization, run.monitor, run.shadows
    save_state(folder, run.processes, run.progress, *parts)
    return folder.name
