"""Early stopping inside diffusers' DreamBooth LoRA scripts: all that is more than the calls put
there.

Copied into the patched checkout beside es_lora_run.py, es_lora_layers.py and the vendored files.
The calls are `add_arguments`, `start`, `after_step`, `stopped`, `put_in_kept` and `save_others`.
Without --calculate_cs or --early_stop nothing is measured and nothing is different. Python 3.8.
"""

import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import torch
from transformers import PreTrainedModel

from es_lora.hugging_face.peft_models import trainable_tensors
from es_lora.settings import StopSettings
from es_lora.weights import copies, put_in
from es_lora_layers import peft_layers
from es_lora_run import (
    STEP_NAME,
    EarlyStopRun,
    NoEarlyStop,
    add_arguments,
    carry_in_states,
    ended_where_wrong,
    read_settings,
    say,
)

__all__ = ["add_arguments", "start"]

FILE_NAME = "pytorch_lora_weights.safetensors"


class NoScriptEarlyStop(NoEarlyStop):
    def put_in_kept(self) -> None:
        pass

    def save_others(self, save: Callable, **arguments: Any) -> None:
        pass


def start(args: Any, accelerator: Any, optimizer: Any, train_dataloader: Any, global_step: int) -> Any:
    """The early stop of a run. global_step: optimizer steps done before it. Ends the program with
    code 2 and one line where a flag is wrong."""
    with ended_where_wrong():
        settings = read_settings(args, "matrix")
        if settings is None:
            return NoScriptEarlyStop()
        return ScriptEarlyStop(args, settings, accelerator, optimizer, train_dataloader, global_step)


class ScriptEarlyStop:
    """The early stop of one run of train_dreambooth_lora*.py.

    Everything trained was prepared by the accelerator: the denoiser (component "unet", a
    transformer too) and text encoders with a LoRA ("te", or "te1", "te2")."""

    def __init__(
        self, args: Any, settings: StopSettings, accelerator: Any, optimizer: Any, train_dataloader: Any, step: int
    ):
        if str(accelerator.distributed_type).split(".")[-1] in ("FSDP", "DEEPSPEED"):
            raise ValueError("early stopping needs whole weights on each process; train without FSDP and DeepSpeed")
        self.output_dir, self.optimizer = Path(args.output_dir), optimizer
        models = _trained_models(accelerator)
        self._parameters = _parameters(models)
        self._last: Dict[str, torch.Tensor] = {}
        self.run = EarlyStopRun(
            settings,
            self.output_dir / "es-lora",
            [layer for component, model in models.items() for layer in peft_layers(model, component)],
            lambda: self._parameters,
            math.ceil(len(train_dataloader) / args.gradient_accumulation_steps),
            args.max_train_steps - step,
            len(train_dataloader),
            accelerator.is_main_process,
            _state_with_history(self.output_dir / f"checkpoint-{step}") if step else None,
            {"trainer": "diffusers", "seed": args.seed},
        )
        self._learning_rate = optimizer.param_groups[0]["lr"]
        if self.run.monitor is not None:
            carry_in_states(accelerator, self.run)

    @property
    def stopped(self) -> bool:
        return self.run.stopped

    def after_step(self, accelerator: Any, global_step: int, loss: torch.Tensor) -> None:
        """After every completed optimizer step. global_step: the script's own count."""
        if self.run.after_step(loss, self._learning_rate, accelerator.device):
            self.run.log_measured(accelerator, global_step)
        self._learning_rate = self.optimizer.param_groups[0]["lr"]  # of the next step

    def put_in_kept(self) -> None:
        """Put the weights to keep into the models, on the main process, before the script collects
        them for its file; the last ones are set aside."""
        if self.run.monitor is None:
            return
        self._last = copies(self._parameters)
        if self.run.keeps_turning_point:
            put_in(self._parameters, self.run.monitor.load_snapshot(self.run.kept_step()))
        elif self.run.outcome().keeps_average_of_all:
            put_in(self._parameters, self.run.monitor.kept_tensors())

    def save_others(self, save: Callable, **arguments: Any) -> None:
        """Before the script saves its file: save the last weights, or the turning point, beside it.

        save, arguments: the pipeline's save_lora_weights, and what the script gives it but for the
        folder. Its tensors are the models' own, renamed, so that other weights are saved by putting
        them into the models."""
        run, kept, stops = self.run, self.run.kept_step(), self.run.keeps_turning_point
        outcome, others = run.outcome_kept_in(f"../{FILE_NAME}"), {}
        if stops or outcome.keeps_average_of_all:
            others["last"] = (run.step, self._last)
        if kept is not None and not stops:
            others["turning_point"] = (kept, run.monitor.load_snapshot(kept))
        if others and not self._hold_all(arguments):
            say(f"this script saves copies of the weights, so that only {FILE_NAME} is saved.")
            others = {}
        own = copies(self._parameters)
        for what, (step, tensors) in others.items():
            folder = what.replace("_", "-")
            put_in(self._parameters, tensors)
            save(save_directory=str(self.output_dir / folder), **arguments)
            outcome.saved(what, f"../{folder}/{FILE_NAME}", step)
        put_in(self._parameters, own)
        run.finish(outcome)

    def _hold_all(self, arguments: Dict[str, Any]) -> bool:
        """Whether each tensor to be saved lies in the memory of a trained parameter."""
        places = {parameter.data_ptr() for parameter in self._parameters.values()}
        dicts = [value for value in arguments.values() if isinstance(value, dict)]
        tensors = [value for found in dicts for value in found.values() if isinstance(value, torch.Tensor)]
        return all(tensor.data_ptr() in places for tensor in tensors)


def _trained_models(accelerator: Any) -> Dict[str, torch.nn.Module]:
    """{component: model} of what the accelerator prepared and is trained. Raises ValueError where
    nothing is."""
    models = [accelerator.unwrap_model(model) for model in accelerator._models]
    trained = [model for model in models if trainable_tensors(model)]
    if not trained:
        raise ValueError("no prepared model is trained; train without --calculate_cs and --early_stop")
    encoders: List[torch.nn.Module] = [model for model in trained if isinstance(model, PreTrainedModel)]
    named = {f"te{number}" if len(encoders) > 1 else "te": model for number, model in enumerate(encoders, 1)}
    denoisers = [model for model in trained if model not in encoders]
    return {**dict(zip(("unet",), denoisers)), **named}


def _parameters(models: Dict[str, torch.nn.Module]) -> Dict[str, torch.Tensor]:
    """{component.name: live parameter} of all that is trained."""
    return {
        f"{part}.{name}": value for part, model in models.items() for name, value in trainable_tensors(model).items()
    }


def _state_with_history(folder: Path) -> Optional[Path]:
    """The folder of a saved state; None, and said, where it holds no CS history."""
    if (folder / STEP_NAME).is_file():
        return folder
    say(f"{folder} holds no CS history; measuring begins anew.")
    return None
