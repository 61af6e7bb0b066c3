"""Early stopping for any Hugging Face Trainer with a PEFT LoRA: one import, one line.

    trainer = Trainer(..., callbacks=[EarlyStopCallback()])

Works in transformers' Trainer, TRL's SFTTrainer and what is built on them, on one process or with DDP. Needs only the
files beside it that it imports (cs_fluctuation.py, gradient_evidence.py, stop_rules.py, cs_replay.py, quantised_weights.py).
It measures CS after every cs_interval optimizer steps, stops the Trainer cleanly, saves the last weights as `adapter-last` in
the output folder and puts the weights of the turning point back into the model before anything after training sees it. Where
another callback ended the training, the weights are left as they are. Who stopped, and why, is said, logged and written to
result.json and report.html.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Optional, Union

import peft
import torch
import transformers
from transformers import TrainerCallback

from cs_fluctuation import NonFiniteWeightsError
from es_lora.files import write_text_whole
from es_lora.gradient_evidence import GradientEvidence
from es_lora.history import HISTORY_NAME
from es_lora.monitor import EarlyStopMonitor
from es_lora.peft_models import (
    load_tensors,
    peft_lora_layers,
    restore_finite,
    save_adapter,
    trainable_tensors,
    weights_swapped_in,
)
from es_lora.processes import DIVERGED, FAILED, GO_ON, STOP, heard_by_all, same_on_all
from es_lora.report import write_report
from es_lora.rules import DEFAULT_RULE, Decision
from es_lora.settings import MeasurementPlan, StopSettings, read_stop_settings
from es_lora.weights import keep_as_loaded


class EarlyStopCallback(TrainerCallback):
    """Measures CS inside a Trainer, stops it at the turning point and restores the weights of that step.

    early_stop: stop the training; otherwise only measure and report. stop_rule, valley, rule_value: as in es_lora.rules.
    cs_interval: optimizer steps between measurements; window_size: M in measurements; None: chosen from the epoch's length.
    cs_reduction: "row" or "matrix". snapshot_disk_gb: disk that the snapshots may use. header: more facts for the history.
    say: takes the plain sentences for the person (default: print). before_restore: called before the kept weights are put
    back. columns: {name: function}, further columns of the history, measured each time; a rule may need some, such as
    heldout_loss. log_scalar: takes (name, value, step) of CS and CS-Fluctuation under their published names. report: at the end
    write result.json and report.html into the output folder and delete the snapshots; False: the caller does all that.
    Raises ValueError at the start of training where the model has no LoRA layers.
    """

    def __init__(
        self,
        *,
        early_stop: bool = True,
        stop_rule: str = DEFAULT_RULE,
        cs_interval: Optional[int] = None,
        window_size: Optional[int] = None,
        valley: int = 2,
        rule_value: Optional[float] = None,
        cs_reduction: str = "row",
        cs_component: str = "lm",
        snapshot_disk_gb: float = 20.0,
        header: Optional[dict[str, Any]] = None,
        say: Callable[[str], None] = print,
        before_restore: Optional[Callable[[], None]] = None,
        log_scalar: Optional[Callable[[str, float, int], None]] = None,
        columns: Optional[dict[str, Callable[[], Optional[float]]]] = None,
        report: bool = True,
    ):
        self.columns = columns if columns is not None else {}
        self.early_stop, self.stop_rule, self.valley, self.rule_value = early_stop, stop_rule, valley, rule_value
        self.cs_interval, self.window_size = cs_interval, window_size
        self.cs_reduction, self.cs_component = cs_reduction, cs_component
        self.snapshot_disk_gb, self.header, self.say = snapshot_disk_gb, header or {}, say
        self.before_restore, self.log_scalar, self.report = before_restore, log_scalar, report
        self.monitor: Optional[EarlyStopMonitor] = None  # on rank 0 only
        self.plan: Optional[MeasurementPlan] = None
        self.diverged: Optional[str] = None
        self._loss_sum: Union[torch.Tensor, float] = 0.0
        self._loss_from_step: Optional[int] = None
        self._learning_rate: Optional[float] = None
        self._logged_loss: Optional[float] = None
        self._ended = False

    @property
    def decision(self) -> Optional[Decision]:
        return self.monitor.decision if self.monitor is not None else None

    # -------------------------------------------------------------------------------------- set up

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs) -> None:
        keep_as_loaded(model)
        try:
            self._batches_per_epoch = len(train_dataloader)
            steps_per_epoch = max(1, math.ceil(self._batches_per_epoch / args.gradient_accumulation_steps))
        except TypeError:
            if self.cs_interval is None or self.window_size is None:
                raise ValueError("the training data has no length, so give cs_interval and window_size") from None
            steps_per_epoch = self.cs_interval * self.window_size
            self._batches_per_epoch = steps_per_epoch * args.gradient_accumulation_steps
        flags = ("early_stop", "stop_rule", "rule_value", "valley", "cs_reduction", "cs_component", "snapshot_disk_gb")
        given = {name: getattr(self, name) for name in flags}
        counts = {"cs_interval": self.cs_interval, "window_size": self.window_size}
        stop = read_stop_settings({**given, **counts}, StopSettings())
        self.plan = stop.plan([self.cs_component], steps_per_epoch, state.max_steps)
        self._loss_from_step, self._ended = state.global_step, False
        measured = state.global_step - state.global_step % self.plan.cs_interval  # the last measurement of a resumed run
        logged = [entry["loss"] for entry in state.log_history if "loss" in entry and entry["step"] >= measured]
        self._logged_loss = logged[-1] if logged else None
        error = None
        if state.is_world_process_zero:
            try:
                self._open_monitor(args, state, model)
            except (ValueError, OSError) as failure:  # the other ranks must hear of it before it is raised
                error = failure
        self._raise_on_all(FAILED if error else GO_ON, error, args)

    def _open_monitor(self, args, state, model) -> None:
        layers = peft_lora_layers(model)
        matrices = [matrix for layer in layers for matrix in (layer.down, layer.up)]
        self.monitor = EarlyStopMonitor(
            args.output_dir,
            self.plan,
            layers,
            lambda: trainable_tensors(model),
            header=self.header,
            resume_from=self._resumed_checkpoint(args, state),
            evidence=GradientEvidence(matrices, self._batches_per_epoch),
            columns=self.columns,
        )
        self.say(
            f"CS is measured every {self.plan.cs_interval} steps, window M = {self.plan.window} measurements (an epoch has "
            f"{self.plan.steps_per_epoch} optimizer steps; rule {self.stop_rule})."
        )
        every = self.monitor.snapshots.every
        if every > 1:
            self.say(f"The snapshots' disk limit lets only every {every}th measurement be kept.")
        for notice in self.plan.notices:
            self.say(notice)

    def _resumed_checkpoint(self, args, state) -> Optional[Path]:
        if state.global_step == 0:
            return None
        given = args.resume_from_checkpoint
        if isinstance(given, str) and Path(given).is_dir() and (Path(given) / "trainer_state.json").is_file():
            return Path(given)
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    # -------------------------------------------------------------------------------------- while training

    def observe_loss(self, loss: torch.Tensor) -> None:
        """Add one micro-step's share of the training loss, for the history's `loss`; without it the logged one is taken."""
        self._loss_sum = self._loss_sum + loss.detach()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self._logged_loss = (logs or {}).get("loss", self._logged_loss)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        self._learning_rate = optimizer.param_groups[0]["lr"]

    def _mean_loss(self, step: int) -> Optional[float]:
        """Mean training loss of the optimizer steps since the last measurement."""
        if not isinstance(self._loss_sum, torch.Tensor):
            loss, self._logged_loss = self._logged_loss, None  # a logged loss is written down once
            return loss
        loss = self._loss_sum.item() / max(1, step - self._loss_from_step)
        self._loss_sum, self._loss_from_step = 0.0, step
        return loss

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % self.plan.cs_interval:
            return
        answer, error = GO_ON, None
        if self.monitor is not None:
            try:
                answer = self._measure(state)
                if answer == STOP:  # now: load_best_model_at_end may replace the last weights before on_train_end
                    save_adapter(model, Path(args.output_dir) / "adapter-last", self.facts(state.global_step))
            except Exception as failure:  # the other ranks must hear of it before it is raised
                answer, error = FAILED, failure
        answer = self._raise_on_all(answer, error, args)
        if answer == DIVERGED:
            self.diverged = self.diverged or "training has diverged"
        if answer != GO_ON:
            control.should_training_stop = True

    def _raise_on_all(self, answer: int, error: Optional[Exception], args) -> int:
        """Rank 0's answer on every rank; where it failed, its error there and one that points to it elsewhere."""
        answer = heard_by_all(answer, args)
        if error is not None:
            raise error
        if answer == FAILED:
            raise RuntimeError("measuring CS failed on the main process; its message says why")
        return answer

    def _measure(self, state) -> int:
        epoch, loss = float(state.epoch or 0.0), self._mean_loss(state.global_step)
        try:
            decision = self.monitor.measure(state.global_step, epoch, loss=loss, lr=self._learning_rate)
        except NonFiniteWeightsError as error:
            self.diverged = str(error)
            return DIVERGED
        if self.log_scalar is not None:
            record = self.monitor.last_record
            self.log_scalar("cs/steps", record["cs"][self.cs_component], state.global_step)
            if record["fluctuation"] is not None:
                self.log_scalar("cs_fluctuation/steps", record["fluctuation"], state.global_step)
        if decision is not None:
            self._tell(state, decision.reason)
        # Not `decision`: a run resumed after its stop has decided already and stops again.
        return STOP if self.early_stop and self.decision is not None else GO_ON

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        loss = (metrics or {}).get("eval_loss")
        if self.monitor is not None and not self._ended and loss is not None and math.isfinite(loss):
            self.monitor.note("evaluation", state.global_step, heldout_loss=loss)

    def on_save(self, args, state, control, **kwargs) -> None:
        """The last thing written into a checkpoint: where the monitor's state is, the checkpoint is whole."""
        if self.monitor is not None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.monitor.save_state(checkpoint)
            self.monitor.state_saved(checkpoint)

    # -------------------------------------------------------------------------------------- the end

    def _tell(self, state, sentence: str) -> None:
        """Say it, and put it into the Trainer's log."""
        self.say(f"\n{sentence}")
        state.log_history.append({"early_stop": sentence, "step": state.global_step})

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        self._ended = True
        kept_step = best_step_loaded(args, state) or state.global_step
        if self.diverged is None and self.stopped(args):
            if self.before_restore is not None:
                self.before_restore()
            if self.monitor is not None:
                kept_step = self.decision.keep_step
                load_tensors(model, self.monitor.load_snapshot(kept_step))
                self.say(f"The model holds the weights of step {kept_step} again.")
            same_on_all(model, args)
        elif self.diverged is not None and self.report:
            kept_step = restore_finite(model, kept_step, self.monitor)
            same_on_all(model, args)
        if self.report and self.monitor is not None:
            self._leave_results(args, state, model, kept_step)

    @contextmanager
    def turning_point_in(self, model: torch.nn.Module) -> Iterator[None]:
        """The model with the weights of the turning point, and with its own again afterwards; on rank 0 only."""
        if self.monitor is None:
            yield
            return
        with weights_swapped_in(model, self.monitor.load_snapshot(self.decision.keep_step)):
            yield

    def _leave_results(self, args, state, model, kept_step: Optional[int]) -> None:
        """Say who ended the training and what the model holds; result.json and report.html; no snapshots any more."""
        folder, decision = Path(args.output_dir), self.decision
        if decision is not None and not self.early_stop:
            with self.turning_point_in(model):
                save_adapter(model, folder / "adapter-turning-point", self.facts(state.global_step))
        outcome, ended = self._outcome(args, state)
        verdict = f"{ended} {self._held(args, state, kept_step)}"
        self._tell(state, verdict)
        settings = {name: getattr(args, name) for name in ("learning_rate", "num_train_epochs", "seed")}
        result = {
            **self.facts(state.global_step),
            "outcome": outcome,
            "verdict": verdict,
            "kept_step": kept_step,
            "turning_step": decision.keep_step if decision else None,
            "detection_step": decision.detected_step if decision else None,
            "budget_steps": state.max_steps,
            "settings": {**settings, "cs_interval": self.plan.cs_interval, "window_size": self.plan.window},
            "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        }
        write_text_whole(folder / "result.json", json.dumps(result, indent=2) + "\n")
        self.monitor.close()
        if (folder / HISTORY_NAME).is_file():
            page = folder / "report.html"
            write_report(page, folder / HISTORY_NAME, verdict=verdict, decision=decision, settings=settings)
            self.say(f"Report: {page.resolve()}")

    def _outcome(self, args, state) -> tuple[str, str]:
        """(outcome, who ended the training and why)."""
        last, budget, decision = state.global_step, state.max_steps, self.decision
        if self.diverged is not None:
            return "diverged", f"Training diverged at step {last} of {budget}: {self.diverged}."
        if decision is not None and self.early_stop:
            return "stopped_early", f"EarlyStopCallback (rule {self.stop_rule}) stopped the training at step {last} of {budget}."
        found = "had seen no evidence of overfitting yet"
        if decision is not None:
            found = f"found the turning point, step {decision.keep_step}: it is in adapter-turning-point"
        if last < budget:
            others = [name for name in state.stateful_callbacks if name != "TrainerControl"]
            who = " or ".join(others) or "another callback or the end of the data"
            return "stopped_by_other", f"Stopped at step {last} of {budget} by {who}; the rule {self.stop_rule} {found}."
        outcome = "no_turning_point" if decision is None else "budget_reached"
        return outcome, f"Trained to its budget of {budget} steps; the rule {self.stop_rule} {found}."

    def _held(self, args, state, kept_step: Optional[int]) -> str:
        """Which weights the model holds now, and what has become of the others."""
        best = best_step_loaded(args, state)
        if kept_step is None:
            return "No finite weights had been measured, so the model holds none."
        if self.diverged is not None:
            return f"The model holds the weights of step {kept_step}, the last finite ones known."
        if self.decision is not None and self.early_stop:
            held = f"The model holds the turning point, step {kept_step}; the last weights are in adapter-last."
            lost = f" It replaces step {best}, which load_best_model_at_end had loaded from {state.best_model_checkpoint}."
            return held + (lost if best else "")
        if best:
            return f"The model holds the weights of step {best}, loaded by load_best_model_at_end; they are left as they are."
        return f"The model holds the weights of the last step, {kept_step}; they are left as they are."

    def stopped(self, args) -> bool:
        """Whether the rule has stopped this run; the same on every rank."""
        decided = self.early_stop and self.decision is not None
        return heard_by_all(STOP if decided else GO_ON, args) == STOP

    def facts(self, last_step: int) -> dict[str, Any]:
        """The verdict in plain values, for metadata and reports."""
        facts: dict[str, Any] = {"stop_rule": self.stop_rule, "last_step": last_step}
        if self.decision is not None:
            facts["kept_step"], facts["detected_step"] = self.decision.keep_step, self.decision.detected_step
            facts["usable_steps"], facts["reason"] = list(self.decision.usable), self.decision.reason
        return facts


def best_step_loaded(args, state) -> Optional[int]:
    """The step whose weights load_best_model_at_end has put into the model at the end of training; None without it."""
    return state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None
