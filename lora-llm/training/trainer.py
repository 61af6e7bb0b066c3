"""The Hugging Face Trainer of a LoRA, and the callbacks that end its training."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from transformers import Seq2SeqTrainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from es_lora.command_line import NotedSignals
from es_lora.files import flush_all, replace_folder
from training.checkpoints import check_optimizer, first_line, forget_checkpoints
from training.epoch_order import EpochSeededLengthSampler
from training.losses import predicted
from training.shadows import EXAMPLE, ShadowAdapters

ASIDE = ".checkpoint.part"  # a checkpoint until it is whole; a later run clears it away


class TrainingDiverged(RuntimeError):
    """The loss is NaN or infinite."""


@contextmanager
def settings_named(flags: str) -> Iterator[None]:
    """What a library makes of settings that it alone knows: its failure is theirs, a ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{flags} cannot be used: {first_line(error)}") from error


class LoraTrainer(Seq2SeqTrainer):
    """The Hugging Face Trainer that watches its loss: for the history, and for divergence.

    observe_loss: is given every micro-step's loss. shadows: trained on its micro-batches.
    A checkpoint gets its name when it is whole, and older ones are deleted after that."""

    def __init__(
        self,
        *args: Any,
        observe_loss: Optional[Callable[[torch.Tensor], None]] = None,
        shadows: Optional[ShadowAdapters] = None,
        **options: Any,
    ):
        super().__init__(*args, **options)
        self._observe_loss, self._shadows = observe_loss, shadows
        self._written_in: Optional[str] = None  # while a checkpoint has no name yet
        self._checkpoint_parts: list[Any] = [shadows] if shadows is not None else []
        self._epoch, self._save_waits = EpochCallback(), False
        self.add_callback(self._epoch)

    def add_to_checkpoints(self, part: Any) -> None:
        """Have `part` save_state(folder) into every checkpoint, and hear when it is state_saved."""
        self._checkpoint_parts.append(part)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if type(sampler) is not LengthGroupedSampler:
            return sampler  # accelerate seeds the others by epoch
        seeded = EpochSeededLengthSampler(sampler.batch_size, lengths=sampler.lengths)
        seeded.seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        seeded.set_epoch(0)
        return seeded

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The same, without a trace in the random state: evaluations do not change training."""
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Speeds of evaluations are noise between the losses; those of training are kept."""
        speeds = ("_runtime", "_per_second", "_model_preparation_time")
        super().log({k: v for k, v in logs.items() if k.startswith("train") or not k.endswith(speeds)}, *args, **kwargs)

    def log_scalar(self, name: str, value: float, step: int) -> None:
        """A scalar of just this name, in the logs of --report_to: TensorBoard, wandb, trackio."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_scalar(name, value, step)
            board = getattr(callback, "_wandb", None) or getattr(callback, "_trackio", None)
            if board is not None and callback._initialized:
                board.log({name: value, "train/global_step": step})  # the step axis of transformers' own scalars

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        examples = inputs.pop(EXAMPLE, None)
        loss = super().training_step(model, inputs, *args, **kwargs)
        finite = torch.isfinite(loss).all()
        if self.args.world_size > 1:
            finite = self.accelerator.reduce(finite.float(), "sum") == self.args.world_size
        if not finite:
            raise TrainingDiverged("the training loss is NaN or infinite")
        if self._observe_loss is not None:
            self._observe_loss(loss)
        if self._shadows is not None:
            self._shadows.backward(self._prepare_inputs(inputs), examples)
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The same, where anything is left to train: a run may be resumed at its end."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """The same; a checkpoint of an epoch's last step waits for what is evaluated there.

        transformers saves it before, and a run that goes on from it would miss the evaluation."""
        ends = self.control.should_training_stop or is_whole_epoch(self.state)
        if self._epoch.under_way and ends and self.control.should_save:
            self.control.should_save, self._save_waits = False, True
        elif not self._epoch.under_way and self._save_waits:
            self.control.should_save, self._save_waits = True, False
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        with settings_named("--optim and --optim_args"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with settings_named("--lr_scheduler_type and --lr_scheduler_kwargs"):
            return super().create_scheduler(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: Optional[str]) -> None:
        if checkpoint is not None:
            check_optimizer(checkpoint, self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return self._written_in or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, name it, then delete those beyond --save_total_limit."""
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        aside = folder / ASIDE
        self._written_in = str(aside)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self._name_checkpoint(aside / name, folder / name)
        finally:
            self._written_in = None
            if self.is_world_process_zero():
                shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _name_checkpoint(self, aside: Path, checkpoint: Path) -> None:
        for part in self._checkpoint_parts:
            part.save_state(aside)
        flush_all(aside)
        replace_folder(aside, checkpoint)
        for part in self._checkpoint_parts:
            part.state_saved(checkpoint)
        forget_checkpoints(checkpoint.parent, self.args.save_total_limit)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """The same; the pickled training arguments beside the weights hold no token."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args.hub_token = token

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The same; zero for a batch without a learnt token, whose mean would be that of none."""
        if "labels" not in inputs or bool(predicted(inputs["labels"]).any()):
            return super().compute_loss(model, inputs, *args, **kwargs)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = 0 * outputs.logits.float().sum()  # every process still takes part in the gradient
        return (loss, outputs) if kwargs.get("return_outputs") else loss

    def leave_process_group(self) -> None:
        """End the collectives of all processes before the interpreter ends.

        The DDP wrapper goes first. Were it the last to hold the group, gloo's threads would be
        joined with the interpreter locked, while one waits to free the collective's tensors."""
        if not torch.distributed.is_initialized():
            return
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        torch.distributed.destroy_process_group()


def is_whole_epoch(state: TrainerState) -> bool:
    """Whether the last step was an epoch's last one."""
    return float(state.epoch or 0.0).is_integer()


class EpochCallback(TrainerCallback):
    """Knows whether an epoch is under way."""

    under_way = False

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.under_way = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.under_way = False


class InterruptCallback(TrainerCallback):
    """Ctrl-C or SIGTERM ends training after the present step, with a checkpoint; twice: now."""

    def __init__(self) -> None:
        self.signals = NotedSignals()
        self.interrupted = False  # on any process

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.signals.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.interrupted = self.signals.interrupted
        if args.world_size > 1:  # whoever hears the signal, all stop at the same step
            flag = torch.tensor([float(self.interrupted)], device=args.device)
            torch.distributed.all_reduce(flag)
            self.interrupted = bool(flag.item())
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self.interrupted and not is_whole_epoch(state):  # nothing is due: the epoch goes on after a resume
            control.should_evaluate = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.signals.__exit__()


class EndOfStreamCallback(TrainerCallback):
    """The end of a stream ends the training; the Trainer would start it again."""

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        control.should_training_stop = True
