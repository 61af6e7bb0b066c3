"""Early stopping inside kohya's network trainers and qlora.py: all that is more than the calls put
there.

Copied into the patched checkout beside es_lora_run.py, es_lora_layers.py and the vendored files.
The calls are few: `add_arguments`, `start`, `after_step`, `stopped` and `before_last_save` in
sd-scripts and musubi-tuner; `training_argument` and `add_callback` in qlora. Without --calculate_cs
or --early_stop nothing is measured and nothing is different. Python 3.8, torch 1.13.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from transformers import TrainerCallback

from es_lora.files import write_folder_whole, write_text_whole
from es_lora.hugging_face.peft_models import trainable_tensors
from es_lora.settings import StopSettings
from es_lora.weights import copies, put_in
from es_lora_layers import all_tensors, network_layers, peft_layers
from es_lora_run import (
    STEP_NAME,
    EarlyStopRun,
    NoEarlyStop,
    add_arguments,
    carry_in_states,
    ended_where_wrong,
    read_settings,
    say,
    training_argument,
)

__all__ = ["add_arguments", "start", "training_argument", "add_callback"]

# --------------------------------------------------------------------------------------- sd-scripts


class NoNetworkEarlyStop(NoEarlyStop):
    def before_last_save(
        self, save_model: Callable, network: Any, metadata: Dict, step: int, epoch: int
    ) -> Tuple[int, int]:
        return step, epoch


def start(args: Any, accelerator: Any, network: Any, optimizer: Any, train_dataloader: Any) -> Any:
    """The early stop of a run of sd-scripts or musubi-tuner. Ends the program with code 2 and one
    line where a flag is wrong."""
    with ended_where_wrong():
        settings = read_settings(args, "matrix")
        if settings is None:
            return NoNetworkEarlyStop()
        return NetworkEarlyStop(args, settings, accelerator, network, optimizer, train_dataloader)


class NetworkEarlyStop:
    """The early stop of one run of train_network.py, of musubi-tuner's trainers, or of one built
    on them."""

    def __init__(
        self, args: Any, settings: StopSettings, accelerator: Any, network: Any, optimizer: Any, train_dataloader: Any
    ):
        self.args, self.network = args, accelerator.unwrap_model(network)
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
        self.to_training, self.to_evaluation = _schedule_free_switches(self.optimizer, args)
        if self.to_evaluation is not None:
            settings = settings.without_average(f"--optimizer_type {args.optimizer_type}")
        self._trained = False
        layers, left_out = network_layers(self.network)
        if args.resume and getattr(args, "resume_from_huggingface", False):
            raise ValueError(
                "--resume_from_huggingface cannot bring the CS history; download the state and --resume its folder"
            )
        if not args.output_dir:
            raise ValueError("--output_dir is not given; early stopping writes its history there")
        self.name = args.output_name or "last"
        self.run = EarlyStopRun(
            settings,
            Path(args.output_dir) / f"{self.name}-es-lora",
            layers,
            self._tensors_to_save,
            math.ceil(len(train_dataloader) / args.gradient_accumulation_steps),
            args.max_train_steps,
            len(train_dataloader),
            accelerator.is_main_process,
            Path(args.resume) if args.resume else None,
            {"trainer": _trainer_name(), "network_module": args.network_module, "seed": args.seed},
        )
        if left_out and accelerator.is_main_process:
            say(f"{left_out} modules of the network have no update of a weight matrix and are not measured.")
        self._learning_rate = self.optimizer.param_groups[-1]["lr"]
        if self.run.monitor is not None:
            carry_in_states(accelerator, self.run)

    @property
    def stopped(self) -> bool:
        return self.run.stopped

    def _tensors_to_save(self) -> Dict[str, torch.Tensor]:
        """What a file saved now would hold: of a schedule-free optimizer the averaged weights,
        swapped in to save.

        Swapping there and back rounds, so the training weights are put back bit for bit.
        """
        live = all_tensors(self.network)
        if self.to_evaluation is None or not self._trained:
            return live
        training = copies(live)
        self.to_evaluation()
        averaged = copies(live)
        self.to_training()
        put_in(live, training)
        return averaged

    def after_step(self, accelerator: Any, global_step: int, loss: torch.Tensor) -> None:
        """After every completed optimizer step. global_step: the trainer's own count, for its
        trackers."""
        self._trained = True
        if self.run.after_step(loss, self._learning_rate, accelerator.device):
            self.run.log_measured(accelerator, global_step)
        self._learning_rate = self.optimizer.param_groups[-1]["lr"]  # of the next step

    def before_last_save(
        self, save_model: Callable, network: Any, metadata: Dict, step: int, epoch: int
    ) -> Tuple[int, int]:
        """Prepare the trainer's last save, on the main process: gives the (step, epoch) to save
        under.

        On a stop the last weights are saved as NAME-last, and the turning point's stand in the
        network when the trainer saves it as NAME. Without --early_stop the turning point is saved
        as NAME-turning-point, and NAME is the end. Where the average at the end is kept, NAME is
        that, and the last weights are NAME-last.
        """
        run, kept, last = self.run, self.run.kept_step(), self.run.step
        outcome, live = run.outcome_kept_in(f"../{self._file()}"), all_tensors(network)
        stops = run.keeps_turning_point

        def save_as(what: str, of_step: int) -> None:
            name = self._file(f"-{what.replace('_', '-')}")
            outcome.saved(what, f"../{name}", of_step)
            metadata.update(outcome.metadata(what))
            save_model(name, network, of_step, run.epoch_of(of_step))

        if stops or outcome.keeps_average_of_all:
            save_as("last", last)
        if stops:
            put_in(live, run.monitor.load_snapshot(kept))
            step, epoch = kept, run.epoch_of(kept)
        elif kept is not None:
            end = copies(live)
            put_in(live, run.monitor.load_snapshot(kept))
            save_as("turning_point", kept)
            put_in(live, end)
        if outcome.keeps_average_of_all:
            put_in(live, run.monitor.kept_tensors())
        metadata.update(outcome.metadata("kept"))
        run.finish(outcome)
        return step, epoch

    def _file(self, kind: str = "") -> str:
        return f"{self.name}{kind}.{getattr(self.args, 'save_model_as', 'safetensors')}"


def _trainer_name() -> str:
    return "musubi-tuner" if "musubi_tuner" in sys.modules else "sd-scripts"


def _schedule_free_switches(optimizer: Any, args: Any) -> Tuple[Optional[Callable], Optional[Callable]]:
    """(to training, to evaluation weights), (None, None) where this trainer does not swap weights
    to save."""
    if not str(args.optimizer_type).lower().endswith("schedulefree"):
        return None, None
    if _trainer_name() == "musubi-tuner":
        return optimizer.train, optimizer.eval
    from library import train_util

    switches = getattr(train_util, "get_optimizer_train_eval_fn", None)
    return switches(optimizer, args) if switches is not None else (None, None)


# -------------------------------------------------------------------------------------------- qlora


def add_callback(trainer: Any, checkpoint_dir: Optional[str]) -> None:
    """Put early stopping into qlora's Trainer. checkpoint_dir: the checkpoint that this run carries
    on from, if any.

    qlora passes over unknown flags in silence, so the first line says whether early stopping is on.
    """
    with ended_where_wrong():
        settings = read_settings(trainer.args, "row")
        if settings is None:
            return say("installed, and off; --early_stop switches it on.")
        peft_layers(trainer.model)
    say("early stopping is on." if settings.early_stop else "CS is measured; --early_stop would also stop.")
    trainer.add_callback(QloraEarlyStop(settings, checkpoint_dir))


class QloraEarlyStop(TrainerCallback):
    """Measures after every step, stops the Trainer and leaves the turning point in
    `turning-point/adapter_model`.

    The last weights stay where qlora puts them (checkpoint-N/adapter_model). With --early_stop the
    model holds the turning point when the Trainer returns, so that evaluation and prediction are of
    it. An average at the end is left in `average/adapter_model`, and is then what the model holds.
    """

    def __init__(self, settings: StopSettings, checkpoint_dir: Optional[str]):
        self.settings, self.checkpoint = settings, Path(checkpoint_dir) if checkpoint_dir else None
        self.run: Optional[EarlyStopRun] = None
        self._loss: Optional[torch.Tensor] = None
        self._learning_rate: Optional[float] = None

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs) -> None:
        if self.checkpoint is not None and not (self.checkpoint / STEP_NAME).is_file():
            say(f"{self.checkpoint} holds no CS history; measuring begins anew.")
            self.checkpoint = None
        self.run = EarlyStopRun(
            self.settings,
            Path(args.output_dir),
            peft_layers(model),
            lambda: trainable_tensors(model),
            max(1, len(train_dataloader) // args.gradient_accumulation_steps),
            state.max_steps,
            len(train_dataloader),
            state.is_world_process_zero,
            self.checkpoint,
            {"trainer": "qlora", "seed": args.seed},
        )

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self._loss = torch.tensor(float(logs["loss"]))

    def on_step_end(self, args, state, control, optimizer=None, **kwargs) -> None:
        self.run.after_step(self._loss, self._learning_rate, args.device)
        self._learning_rate = optimizer.param_groups[0]["lr"] if optimizer is not None else None
        if self.run.stopped:
            control.should_training_stop = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        if self.run is not None and self.run.monitor is not None:
            self.run.monitor.note_heldout(self.run.step, (metrics or {}).get("eval_loss"))

    def on_save(self, args, state, control, **kwargs) -> None:
        if self.run.monitor is not None:
            self.run.save_state(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        if self.run.monitor is None:
            return
        live, kept, output_dir = trainable_tensors(model), self.run.kept_step(), Path(args.output_dir)
        outcome = self.run.outcome()
        outcome.saved("last", f"checkpoint-{state.global_step}", state.global_step)
        if kept is not None:
            outcome.saved("kept" if self.settings.early_stop else "turning_point", "turning-point", kept)
            end = copies(live)
            put_in(live, self.run.monitor.load_snapshot(kept))
            facts = outcome.facts("kept" if self.settings.early_stop else "turning_point")
            _save_adapter(model, output_dir / "turning-point", facts)
            if not self.settings.early_stop:
                put_in(live, end)
        if outcome.keeps_average_of_all:
            outcome.saved("kept", "average", state.global_step)
            put_in(live, self.run.monitor.kept_tensors())
            _save_adapter(model, output_dir / "average", outcome.facts("kept"))
        self.run.finish(outcome)


def _save_adapter(model: Any, folder: Path, facts: Dict[str, Any]) -> None:
    """qlora's checkpoint layout (FOLDER/adapter_model), step and verdict beside it; the folder
    appears whole."""

    def write(aside: Path) -> None:
        model.save_pretrained(str(aside / "adapter_model"))
        write_text_whole(aside / "es_lora.json", json.dumps(facts, indent=1) + "\n")

    write_folder_whole(folder, write)
