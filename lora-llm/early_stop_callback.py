"""Early stopping for any Hugging Face Trainer with a PEFT LoRA: one import, one line.

    trainer = Trainer(..., callbacks=[EarlyStopCallback()])

Works in transformers' Trainer, TRL's SFTTrainer and what is built on them, on one process or with
DDP. It needs two things beside it, cs_fluctuation.py and es_lora/, and imports nothing else of this
project. It measures CS after every cs_interval optimizer steps and stops the Trainer cleanly. It
saves the last weights as `adapter-last` in the output folder. It puts the weights of the turning
point back into the model before anything after training sees it; with `average`, averaged ones, at
the end of the budget too. Where another callback ended the training, the weights are left as they
are. Who stopped, and why, is said, logged and written to
result.json and report.html.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Optional, Union

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cs_fluctuation import NonFiniteWeightsError
from es_lora.command_line import nearest
from es_lora.gradient_evidence import GradientEvidence
from es_lora.history import HISTORY_NAME
from es_lora.hugging_face.peft_models import (
    load_tensors,
    peft_lora_layers,
    restore_finite,
    save_adapter,
    trainable_tensors,
    weights_swapped_in,
)
from es_lora.hugging_face.processes import DIVERGED, FAILED, GO_ON, STOP, decision_on_all, heard_by_all, same_on_all
from es_lora.monitor import EarlyStopMonitor, scalars
from es_lora.outcome import REPORT_NAME, Outcome
from es_lora.report import write_report
from es_lora.rules import Decision
from es_lora.settings import MeasurementPlan, StopSettings, read_stop_settings
from es_lora.weights import keep_as_loaded

USUAL = StopSettings(early_stop=True)
NOT_HERE = ("calculate_cs", "shadows", "shadow_rank", "shadow_interval")  # shadows need passes through the model
LAST, TURNING_POINT = "adapter-last", "adapter-turning-point"
PACKAGES = ("torch", "transformers", "peft")


class TrainingLoss:
    """The mean training loss of the optimizer steps since it was last asked for."""

    def __init__(self) -> None:
        self._sum: Union[torch.Tensor, float, None] = None  # float32
        self._from_step = 0

    def add(self, loss: torch.Tensor) -> None:
        """Add one micro-step's share of a step's loss, a scalar."""
        self._sum = loss.detach().float() if self._sum is None else self._sum + loss.detach().float()

    def start(self, step: int) -> None:
        """Count from this completed optimizer step on."""
        self._sum, self._from_step = None, step

    def mean(self, step: int) -> Optional[float]:
        """The mean up to this completed step, and start anew; None where nothing was added."""
        mean = None if self._sum is None else float(self._sum) / max(1, step - self._from_step)
        self.start(step)
        return mean

    def state(self) -> dict[str, Any]:
        """What a resumed run counts on from, as plain values."""
        return {"sum": None if self._sum is None else float(self._sum), "from_step": self._from_step}

    def load_state(self, state: dict[str, Any]) -> None:
        self._sum, self._from_step = state["sum"], state["from_step"]


class EarlyStopCallback(TrainerCallback):
    """Measures CS inside a Trainer, stops it at the turning point and restores that step's weights.

    settings: the stop settings; with early_stop off it only measures and reports. flags: single
    ones by name, such as stop_rule="fixed-epochs", rule_value=2, over `settings`.
    header: more facts for the first line of the history. say: takes the sentences for the person.
    before_restore: called before the kept weights are put back, on every process; a held-out loss
    of the last weights that it gives is noted in the history.
    log_scalar: takes (name, value, step) of CS and CS-Fluctuation under their published names.
    columns: {name: function} of further columns of the history, such as heldout_loss.
    training_loss: whose mean is the history's loss; None: the loss that the Trainer logs is taken.
    report: at the end write result.json and report.html and delete the snapshots; False: the caller
    does.
    Raises TypeError for an unknown flag, ValueError for a bad value, and ValueError at the start of
    training where the model has no LoRA layers."""

    def __init__(
        self,
        settings: Optional[StopSettings] = None,
        *,
        header: Optional[dict[str, Any]] = None,
        say: Callable[[str], None] = print,
        before_restore: Optional[Callable[[], Optional[float]]] = None,
        log_scalar: Optional[Callable[[str, float, int], None]] = None,
        columns: Optional[dict[str, Callable[[], Optional[float]]]] = None,
        training_loss: Optional[TrainingLoss] = None,
        report: bool = True,
        **flags: Any,
    ):
        self.settings = _settings_of(settings or USUAL, flags)
        self.header, self.say, self.report = header or {}, say, report
        self.before_restore, self.log_scalar = before_restore, log_scalar
        self.columns = columns if columns is not None else {}
        self.monitor: Optional[EarlyStopMonitor] = None  # on rank 0 only
        self.plan: Optional[MeasurementPlan] = None
        self.diverged: Optional[str] = None
        self._training_loss = training_loss
        self._heard: Optional[Decision] = None  # on every rank once training has ended
        self._learning_rate: Optional[float] = None
        self._logged_loss: Optional[float] = None
        self._saved_in: Optional[str] = None  # the newest checkpoint that holds the state
        self._ended = False

    @property
    def decision(self) -> Optional[Decision]:
        """The rule's decision: on rank 0 once it is made, on every rank once training has ended."""
        return self.monitor.decision if self.monitor is not None else self._heard

    @property
    def stopped(self) -> bool:
        """Whether the rule has stopped this run; the same on every rank once training has ended."""
        return self.settings.early_stop and self.decision is not None

    # -------------------------------------------------------------------------------------- set up

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        model = kw["model"]
        keep_as_loaded(model)
        if "schedule_free" in str(args.optim):
            self.settings = self.settings.without_average(f"--optim {getattr(args.optim, 'value', args.optim)}")
        batches_per_epoch, steps_per_epoch = self._epoch(args, kw["train_dataloader"])
        self.plan = self.settings.plan(["lm"], steps_per_epoch, state.max_steps)
        self._ended = False
        if self._training_loss is not None:
            self._training_loss.start(state.global_step)
        error = None
        if state.is_world_process_zero:
            try:
                self._open_monitor(args, state, model, batches_per_epoch)
            except (ValueError, OSError) as failure:  # the other ranks must hear of it before it is raised
                error = failure
        self._raise_on_all(FAILED if error else GO_ON, error, args)
        decided = self.settings.early_stop and decision_on_all(self.decision, args) is not None
        if decided:  # resumed at its stop: nothing is left to train
            control.should_training_stop = True
            if self.monitor is not None:
                save_adapter(model, Path(args.output_dir) / LAST, self.outcome(args, state).facts("last"))

    def _epoch(self, args: TrainingArguments, train_dataloader: Any) -> tuple[int, int]:
        """(batches, optimizer steps) of an epoch; without a length, what the window spans."""
        try:
            batches = len(train_dataloader)
            return batches, max(1, math.ceil(batches / args.gradient_accumulation_steps))
        except TypeError:
            interval, window = self.settings.cs_interval, self.settings.window_size
            if interval is None or window is None:
                raise ValueError("the training data has no length, so give cs_interval and window_size") from None
            return interval * window * args.gradient_accumulation_steps, interval * window

    def _open_monitor(
        self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, batches_per_epoch: int
    ) -> None:
        layers = peft_lora_layers(model)
        matrices = [matrix for layer in layers for matrix in (layer.down, layer.up)]
        self.monitor = EarlyStopMonitor(
            args.output_dir,
            self.plan,
            layers,
            lambda: trainable_tensors(model),
            header=self.header,
            resume_from=_resumed_checkpoint(args, state),
            evidence=GradientEvidence(matrices, batches_per_epoch),
            columns=self.columns,
        )
        self._load_notes(self.monitor.notes)
        self.say(
            f"CS is measured every {self.plan.cs_interval} steps, window M = {self.plan.window} measurements (an epoch "
            f"has {self.plan.steps_per_epoch} optimizer steps; rule {self.settings.stop_rule})."
        )
        every = self.monitor.snapshots.every
        if every > 1:
            self.say(f"The snapshots' disk limit lets only every {every}th measurement be kept.")
        if self.plan.average:
            self.say(f"An average of the weights is kept, of width {self.plan.average:g} (--average 0: single steps).")
        for notice in self.plan.notices:
            self.say(notice)

    def _load_notes(self, notes: dict[str, Any]) -> None:
        self._logged_loss = notes.get("logged_loss")
        if self._training_loss is not None and "training_loss" in notes:
            self._training_loss.load_state(notes["training_loss"])

    # ------------------------------------------------------------------------------- while training

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._logged_loss = (kwargs["logs"] or {}).get("loss", self._logged_loss)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._learning_rate = kwargs["optimizer"].param_groups[0]["lr"]

    def _mean_loss(self, step: int) -> Optional[float]:
        """Mean training loss of the optimizer steps since the last measurement."""
        if self._training_loss is not None:
            return self._training_loss.mean(step)
        loss, self._logged_loss = self._logged_loss, None  # a logged loss is written down once
        return loss

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.monitor is not None:
            self.monitor.after_step()
        if not self.plan.due(state.global_step):
            return
        answer, error = GO_ON, None
        if self.monitor is not None:
            try:
                answer = self._measure(state)
                if answer == STOP:  # now: load_best_model_at_end may replace the last weights before on_train_end
                    save_adapter(kwargs["model"], Path(args.output_dir) / LAST, self.outcome(args, state).facts("last"))
            except Exception as failure:  # the other ranks must hear of it before it is raised
                answer, error = FAILED, failure
        answer = self._raise_on_all(answer, error, args)
        if answer == DIVERGED:
            self.diverged = self.diverged or "training has diverged"
        if answer != GO_ON:
            control.should_training_stop = True

    def _raise_on_all(self, answer: int, error: Optional[Exception], args: TrainingArguments) -> int:
        """Rank 0's answer on every rank; where it failed, its error there, a pointer elsewhere."""
        answer = heard_by_all(answer, args)
        if error is not None:
            raise error
        if answer == FAILED:
            raise RuntimeError("measuring CS failed on the main process; its message says why")
        return answer

    def _measure(self, state: TrainerState) -> int:
        epoch, loss = float(state.epoch or 0.0), self._mean_loss(state.global_step)
        try:
            decision = self.monitor.measure(state.global_step, epoch, loss=loss, lr=self._learning_rate)
        except NonFiniteWeightsError as error:
            self.diverged = str(error)
            return DIVERGED
        if self.log_scalar is not None:
            for name, value in scalars(self.monitor.last_record).items():
                self.log_scalar(name, value, state.global_step)
        if decision is not None:
            self._tell(state, decision.reason)
        # Not `decision`: a run resumed after its stop has decided already and stops again.
        return STOP if self.stopped else GO_ON

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._ended:
            self.note_heldout(state.global_step, (kwargs["metrics"] or {}).get("eval_loss"))

    def note_heldout(self, step: int, loss: Optional[float], averaged: bool = False) -> None:
        """Write the held-out loss of a step's weights, or their average, into the history."""
        if self.monitor is not None:
            self.monitor.note_heldout(step, loss, averaged)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The last thing written into a checkpoint: one that holds the monitor's state is whole."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._saved_in != checkpoint.name:  # a trainer may have asked for it, before the checkpoint had its name
            self.save_state(checkpoint)
            self.state_saved(checkpoint)

    def save_state(self, checkpoint: Path) -> None:
        """Write what a resumed run needs into a checkpoint's folder, on rank 0."""
        self._saved_in = checkpoint.name
        if self.monitor is not None:
            loss = {"training_loss": self._training_loss.state()} if self._training_loss is not None else {}
            self.monitor.save_state(checkpoint, logged_loss=self._logged_loss, **loss)

    def state_saved(self, checkpoint: Path) -> None:
        """Hear that the checkpoint has its name and is whole."""
        if self.monitor is not None:
            self.monitor.state_saved(checkpoint)

    # -------------------------------------------------------------------------------------- the end

    def _tell(self, state: TrainerState, sentence: str) -> None:
        """Say it, and put it into the Trainer's log."""
        self.say(f"\n{sentence}")
        state.log_history.append({"early_stop": sentence, "step": state.global_step})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        model = kw["model"]
        self._ended, self._heard = True, decision_on_all(self.decision, args)
        held = best_step_loaded(args, state) or state.global_step
        if self.diverged is None and self.stopped:
            if self.before_restore is not None:
                self.note_heldout(state.global_step, self.before_restore())
            held = self.decision.keep_step
            if self.monitor is not None:
                load_tensors(model, self.monitor.load_snapshot(held))
                self.say(f"The model holds the weights of step {held} again.")
            same_on_all(model, args)
        elif self.diverged is not None and self.report:
            held = restore_finite(model, held, self.monitor)
            same_on_all(model, args)
        elif self.report and "last" in self.outcome(args, state).files:
            if self.monitor is not None:
                save_adapter(model, Path(args.output_dir) / LAST, self.outcome(args, state).facts("last"))
            self.hold_average(args, model)
        if self.report and self.monitor is not None:
            self._leave_results(args, state, model, held)

    def hold_average(self, args: TrainingArguments, model: torch.nn.Module) -> None:
        """Put the average of the weights into the model, on every process."""
        if self.monitor is not None:
            load_tensors(model, self.monitor.kept_tensors())
        same_on_all(model, args)

    @contextmanager
    def turning_point_in(self, model: torch.nn.Module) -> Iterator[None]:
        """The model with the turning point's weights, its own again afterwards; on rank 0 only."""
        if self.monitor is None:
            yield
            return
        with weights_swapped_in(model, self.monitor.load_snapshot(self.decision.keep_step)):
            yield

    def outcome(self, args: TrainingArguments, state: TrainerState) -> Outcome:
        """How the run has ended, with the adapters that this callback saves."""
        last, decision = state.global_step, self.decision
        by = self._stopped_by(state)
        name = "no_turning_point" if decision is None else "budget_reached"
        name = "stopped_early" if self.stopped else "stopped_by_other" if by else name
        outcome = Outcome(
            "diverged" if self.diverged else name,
            last,
            state.max_steps,
            plan=self.plan,
            decision=decision,
            diverged=self.diverged,
            stopped_by=by,
            seed=args.seed,
        )
        stopped, best = outcome.name == "stopped_early", best_step_loaded(args, state)
        if stopped or (outcome.keeps_average_of_all and not best):
            outcome.saved("last", LAST, last)
        if decision is not None and outcome.name != "diverged" and not stopped:
            outcome.saved("turning_point", TURNING_POINT, decision.keep_step)
        return outcome

    def _stopped_by(self, state: TrainerState) -> Optional[str]:
        """Who else ended the training before its budget; None where nobody did."""
        if self.stopped or state.global_step >= state.max_steps:
            return None
        others = [name for name in state.stateful_callbacks if name != "TrainerControl"]
        return " or ".join(others) or "another callback or the end of the data"

    def _leave_results(
        self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module, held: Optional[int]
    ) -> None:
        """Say who ended training and what the model holds; result, report; snapshots go."""
        folder, outcome = Path(args.output_dir), self.outcome(args, state)
        outcome.held_step = held
        if "turning_point" in outcome.files:
            with self.turning_point_in(model):
                save_adapter(model, folder / TURNING_POINT, outcome.facts("turning_point"))
        verdict = f"{outcome.sentence()} {self._held(outcome, best_step_loaded(args, state))}".rstrip()
        best = state.best_model_checkpoint
        if outcome.name == "stopped_early" and best_step_loaded(args, state):
            verdict += (
                f" It replaces step {state.best_global_step}, which load_best_model_at_end had loaded from {best}."
            )
        self._tell(state, verdict)
        settings = {name: getattr(args, name) for name in ("learning_rate", "num_train_epochs")}
        outcome.write(folder, {**settings, **self.settings.as_flags()}, PACKAGES)
        self.monitor.close()
        if (folder / HISTORY_NAME).is_file():
            page, decision = folder / REPORT_NAME, outcome.decision
            tables = outcome.tables()
            write_report(
                page, folder / HISTORY_NAME, verdict=verdict, decision=decision, settings=settings, tables=tables
            )
            self.say(f"Report: {page.resolve()}")

    def _held(self, outcome: Outcome, best: Optional[int]) -> str:
        """Which weights the model holds now, and where the others are; tells a divergence too."""
        if outcome.name == "diverged":
            return ""
        if outcome.name == "stopped_early":
            who = f"EarlyStopCallback (rule {self.settings.stop_rule}) stopped the training"
            return f"{who} and put them back into the model; the last weights are in {LAST}."
        if best:
            return (
                f"The model holds the weights of step {best}, loaded by "
                "load_best_model_at_end; they are left as they are."
            )
        if "last" in outcome.files:
            return f"The model holds their average; the weights of the last step, {outcome.held_step}, are in {LAST}."
        return f"The model holds the weights of the last step, {outcome.held_step}; they are left as they are."


def _settings_of(usual: StopSettings, flags: dict[str, Any]) -> StopSettings:
    known = [entry.name for entry in fields(StopSettings) if entry.name not in NOT_HERE] + ["valley"]
    for name in flags:
        if name not in known:
            raise TypeError(f"EarlyStopCallback takes no {name}{nearest(name, known)}")
    return read_stop_settings(flags, usual)


def _resumed_checkpoint(args: TrainingArguments, state: TrainerState) -> Optional[Path]:
    if state.global_step == 0:
        return None
    given = args.resume_from_checkpoint
    if isinstance(given, str) and Path(given).is_dir() and (Path(given) / "trainer_state.json").is_file():
        return Path(given)
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def best_step_loaded(args: TrainingArguments, state: TrainerState) -> Optional[int]:
    """The step that load_best_model_at_end has put into the model after training, or None."""
    return state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None
