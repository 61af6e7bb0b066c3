"""One job in training: adapter, place in its data, optimizer, schedule, early stop, and results.

It takes losses and gradients from the fused pass (loop.py) and does with them what a single run
does: the loss of a step is the mean over the target tokens of all its micro-batches, gradients are
clipped, the schedule moves a step, CS is measured, and a decision stops this job alone."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from adapters.folders import CHAT
from adapters.fused_lora import FusedLora
from cs_fluctuation import NonFiniteWeightsError
from es_lora.files import write_text_whole, write_whole
from es_lora.gradient_evidence import GradientEvidence
from es_lora.hugging_face.processes import DIVERGED, GO_ON, STOP
from es_lora.monitor import EarlyStopMonitor
from es_lora.outcome import RESULT_NAME, Outcome, in_order
from es_lora.weights import refuse_nonfinite, stored_tensors
from jobs.data import COMPONENT, Example, JobData
from jobs.processes import Processes
from jobs.states import STATE_NAME, forget_states, state_folder, state_folders, state_number
from training.results import PACKAGES, write_run_report

TENSORS_NAME = "job_state.safetensors"
Score = Callable[[str, Sequence[Example]], float]  # (adapter, held-out examples) -> mean loss a token


class JobRun:
    """A job whose turn it is.

    folder: where it leaves everything. facts: of the whole run (base, bits), for its files.
    score: gives the held-out loss of the adapter as it is. state: the folder of a state that save()
    left, to go on from. Raises ValueError for target modules that the base does not have,
    FileExistsError where the folder holds another run."""

    def __init__(
        self,
        data: JobData,
        fused: FusedLora,
        folder: Path,
        processes: Processes,
        facts: dict[str, Any],
        score: Score,
        state: Optional[Path] = None,
    ):
        job = data.job
        self.data, self.job, self.folder, self.fused, self.score = data, job, folder, fused, score
        self.processes, self.facts = processes, facts
        self.adapter = fused.add(
            job.name,
            rank=job.rank,
            alpha=job.alpha,
            target_modules=job.target_modules,
            dropout=job.dropout,
            seed=job.seed,
        )
        self.parameters = self.adapter.parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=job.learning_rate, weight_decay=job.weight_decay, fused=True
        )
        warmup, total = math.ceil(job.warmup_ratio * data.total_steps), data.total_steps
        self.schedule = get_scheduler(
            job.lr_scheduler_type, self.optimizer, num_warmup_steps=warmup, num_training_steps=total
        )
        self.step, self.epoch, self.micro_step = 0, 0, 0  # completed; the place of the next micro-batch
        self.seconds, self.ended_as, self.diverged = 0.0, None, None
        self.heldout: dict[str, Optional[float]] = {}
        self._loss, self._measured_step = 0.0, 0
        if state is not None:
            if processes.writes:
                (folder / RESULT_NAME).unlink(missing_ok=True)  # it had ended after this state
            fix = f"delete the folder {folder} to train this job anew"
            refuse_nonfinite(stored_tensors(state / TENSORS_NAME), state / TENSORS_NAME, fix)
        self.monitor = self._open_monitor(state) if processes.writes else None
        if state is not None:
            self._load(state)
        self._micro_batches = data.micro_batches(self.epoch)

    def _open_monitor(self, state: Optional[Path]) -> EarlyStopMonitor:
        job, data = self.job, self.data
        columns = {}
        if data.heldout and data.plan.stop.needs_heldout:
            columns["heldout_loss"] = lambda: self.score(job.name, data.heldout)
        return EarlyStopMonitor(
            self.folder,
            data.plan,
            self.adapter.lora_layers(COMPONENT),
            self.adapter.state_dict,
            header={
                **self.facts,
                "dataset": job.dataset,
                "lora_r": job.rank,
                "learning_rate": job.learning_rate,
                "seed": job.seed,
            },
            resume_from=state,
            evidence=GradientEvidence(self.parameters, len(data.micro_batches(0))),
            columns=columns,
        )

    # -------------------------------------------------------------------------------------- a turn

    def micro_batch(self) -> list[Example]:
        """The examples of its next turn."""
        return self._micro_batches[self.micro_step]

    def loss_weight(self) -> float:
        """1 / target tokens of this step: so its micro-batches' summed losses give its mean."""
        first = self.micro_step - self.micro_step % self.job.accumulation
        batch = self._micro_batches[first : first + self.job.accumulation]
        return 1 / sum(example.targets for part in batch for example in part)

    def score_start(self) -> None:
        """The held-out loss before the first step."""
        if self.data.heldout and self.step == 0 and "before" not in self.heldout:
            self.heldout["before"] = self.score(self.job.name, self.data.heldout)

    def take(self, loss: float, seconds: float) -> None:
        """After the backward pass of its micro-batch: the weighted loss, its part of the time."""
        self.seconds += seconds
        if not math.isfinite(loss):
            self.ended_as, self.diverged = "diverged", "the training loss is NaN or infinite"
            return
        self._loss += loss
        self.micro_step += 1
        last = self.micro_step == len(self._micro_batches)
        if last or self.micro_step % self.job.accumulation == 0:
            self._optimizer_step()
        if last:
            self.epoch, self.micro_step = self.epoch + 1, 0
            self._micro_batches = self.data.micro_batches(self.epoch)
            if self.job.evaluate_epochs and self.data.heldout and self.ended_as is None:
                self._note_heldout(self.score(self.job.name, self.data.heldout))

    def _optimizer_step(self) -> None:
        self.processes.sum_gradients(self.parameters)
        if self.job.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.job.max_grad_norm)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.monitor is not None:
            self.monitor.after_step()
        if self.data.plan.due(self.step):
            answer = self.processes.heard(self._measure(learning_rate) if self.monitor is not None else None)
            if answer == DIVERGED:
                self.ended_as, self.diverged = "diverged", self.diverged or "its weights are NaN or infinite"
            elif answer == STOP:
                self.ended_as = "stopped_early"
        if self.ended_as is None and self.step == self.data.total_steps:
            decided = self.processes.heard(self.monitor is not None and self.monitor.decision is not None)
            self.ended_as = "budget_reached" if decided else "no_turning_point"

    def _measure(self, learning_rate: float) -> int:
        loss, self._loss = self._loss / (self.step - self._measured_step), 0.0
        self._measured_step = self.step
        try:
            self.monitor.measure(self.step, self.step / self.data.steps_per_epoch, loss=loss, lr=learning_rate)
        except NonFiniteWeightsError as error:
            self.diverged = str(error)
            return DIVERGED
        return STOP if self.data.plan.stop.early_stop and self.monitor.decision is not None else GO_ON

    def _note_heldout(self, loss: float) -> None:
        if self.monitor is not None:
            self.monitor.note_heldout(self.step, loss)

    # -------------------------------------------------------------------------------------- the end

    def finish(self, save_tokenizer: Callable[[str], Any]) -> dict[str, Any]:
        """Score and save what is kept, write result and report, free the adapter; -> the result."""
        decision = self.processes.heard(self.monitor.decision if self.monitor is not None else None)
        total, plan = self.data.total_steps, self.data.plan
        outcome = Outcome(self.ended_as, self.step, total, plan=plan, decision=decision, diverged=self.diverged)

        def save(what: str, name: str, step: int, averaged: Optional[bool] = None) -> None:
            outcome.saved(what, name, step, averaged)
            if self.processes.writes:
                facts = {**outcome.facts(what), "base": self.facts}
                facts["prompt_template"] = CHAT if self.data.chats else None
                self.adapter.save_peft(self.folder / name, facts)
                save_tokenizer(str(self.folder / name))

        if outcome.name == "diverged":
            step = self._restore_finite()
            if step is not None:
                save("kept", "adapter", step, averaged=False if step == self.step else None)
        else:
            self._score_heldout("last", self.step)
            self._keep(outcome, save)
        self.fused.remove(self.job.name)
        return self._report(outcome) if self.processes.writes else {}

    def _keep(self, outcome: Outcome, save: Callable[..., None]) -> None:
        """Save the last weights and those of the turning point, or the average at the end; the kept
        ones are `adapter`."""
        decision, stopped = outcome.decision, outcome.name == "stopped_early"
        if outcome.keeps_average_of_all:
            save("last", "adapter-last", self.step)
            self._put(self.monitor.kept_tensors() if self.monitor is not None else None)
            self._score_heldout("average", self.step)
        save(*(("last", "adapter-last") if stopped else ("kept", "adapter")), self.step)
        if decision is None:
            return
        if outcome.keeps_last:
            self.heldout.update({"kept": self.heldout["last"]} if self.data.heldout else {})
        else:
            self._back_to(decision.keep_step)
            self._score_heldout("kept", decision.keep_step)
        save(*(("kept", "adapter") if stopped else ("turning_point", "adapter-turning-point")), decision.keep_step)

    def _score_heldout(self, name: str, step: int) -> None:
        if self.data.heldout:
            self.heldout[name] = self.score(self.job.name, self.data.heldout)
            if self.monitor is not None:
                averaged = self.data.plan.average > 0 and name != "last"
                self.monitor.note_heldout(step, self.heldout[name], averaged)

    def _back_to(self, step: int) -> None:
        """Put the weights of a kept step back, on every process that trains this job."""
        self._put(self.monitor.load_snapshot(step) if self.monitor is not None else None)

    def _put(self, tensors: Optional[dict[str, torch.Tensor]]) -> None:
        """Put the first process's tensors into the adapter of every process of this job."""
        self.adapter.load_state_dict(self.processes.heard(tensors))

    def _restore_finite(self) -> Optional[int]:
        """After a divergence: the newest finite weights back; their step, or None without any."""
        if all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            return self.step
        step = self.processes.heard(self.monitor.latest_snapshot_step() if self.monitor is not None else None)
        if step is not None:
            self._back_to(step)
        return step

    def _report(self, outcome: Outcome) -> dict[str, Any]:
        outcome.heldout = in_order(self.heldout)
        outcome.seconds, outcome.seed = self.seconds, self.job.seed
        outcome.extra = {"name": self.job.name, "group": self.job.group}
        settings = {**asdict(self.job), **self.facts}
        write_run_report(self.folder, outcome, settings)
        result = outcome.write(self.folder, settings, PACKAGES)  # last: where it is, all is there
        self.monitor.close()
        return result

    # ---------------------------------------------------------------------- interrupted and resumed

    def save(self) -> Optional[int]:
        """All that a resumed run needs, in a folder of its own; -> its number, None where another
        process writes it. The states before it stay: `forget_older`."""
        if self.monitor is None:
            return None
        older = state_folders(self.folder)
        number = state_number(older[-1]) + 1 if older else 1
        folder = state_folder(self.folder, number)
        self.monitor.save_state(folder)
        tensors = {f"weight.{name}": tensor.contiguous() for name, tensor in self.adapter.state_dict().items()}
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                tensors[f"grad.{index}"] = parameter.grad
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{index}.{name}"] = value
        write_whole(folder / TENSORS_NAME, lambda temporary: save_file(tensors, str(temporary)))
        numbers = {name: getattr(self, name) for name in self._NUMBERS}
        state = {**numbers, "passes": self.adapter.passes, "schedule": self.schedule.state_dict()}
        state["schedule"].pop("lr_lambdas", None)
        write_text_whole(folder / STATE_NAME, json.dumps(state))
        return number

    def forget_older(self, number: int) -> None:
        """Delete the states before that one: the run as a whole now goes on from it."""
        folder = state_folder(self.folder, number)
        self.monitor.state_saved(folder)
        forget_states(self.folder, but=folder)

    _NUMBERS = ("step", "epoch", "micro_step", "seconds", "heldout", "_loss", "_measured_step")

    def _load(self, folder: Path) -> None:
        state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        tensors = load_file(str(folder / TENSORS_NAME))
        for name in self._NUMBERS:
            setattr(self, name, state[name])
        self.adapter.passes = state["passes"]
        weights = {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}
        self.adapter.load_state_dict(weights)
        for index, parameter in enumerate(self.parameters):
            if f"grad.{index}" in tensors:
                parameter.grad = tensors[f"grad.{index}"].to(parameter.device)
            prefix = f"optimizer.{index}."
            moments = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if moments:
                self.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
        self.schedule.load_state_dict({**self.schedule.state_dict(), **state["schedule"]})
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr()):
            group["lr"] = rate
