"""The Hugging Face Trainer of a LoRA, and the callbacks that end its training."""

from collections.abc import Callable
from typing import Any, Optional

import torch
from transformers import Seq2SeqTrainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from es_lora.command_line import NotedSignals
from training.epoch_order import EpochSeededLengthSampler
from training.losses import predicted
from training.shadows import EXAMPLE, ShadowAdapters


class TrainingDiverged(RuntimeError):
    """The loss is NaN or infinite."""


class LoraTrainer(Seq2SeqTrainer):
    """The Hugging Face Trainer that watches its loss: for the history, and for divergence.

    observe_loss: is given every micro-step's loss. shadows: trained on its micro-batches."""

    def __init__(
        self,
        *args: Any,
        observe_loss: Optional[Callable[[torch.Tensor], None]] = None,
        shadows: Optional[ShadowAdapters] = None,
        **options: Any,
    ):
        super().__init__(*args, **options)
        self._observe_loss, self._shadows = observe_loss, shadows

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

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.signals.__exit__()


class EndOfStreamCallback(TrainerCallback):
    """The end of a stream ends the training; the Trainer would start it again."""

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        control.should_training_stop = True
