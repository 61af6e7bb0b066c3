"""Record image runs. record_runs.py calls it, in the diffusion environment with lora-ldm/ on the path."""

import copy
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from recorded_columns import EveryNth, GradientNorm, adam_ratio, group_columns, record_all, write_trace
from runs import CACHE, ROOT, data_folder, trace_path

from images.batches import build_datasets
from settings.parsing import parse_arguments
from training.loop import NetworkTrainer
from training.setup import cache_latents
from training.validation import validation_loss

HELDOUT_POINTS = 40  # about so many held-out losses a run
PROBE_BATCHES = 1
MORE_FLAGS = {"validation": ["--validation_split", "0.1"], "shadow": ["--shadows", "2"]}


def arguments_of(spec, data, output, more=()):
    flags = {
        "pretrained_model_name_or_path": ROOT / "lora-ldm" / "tiny_base",
        "train_data_dir": data,
        "caption_extension": ".txt",
        "resolution": "64,64",
        "output_dir": output,
        "output_name": "run",
        "network_dim": spec.rank,
        "network_alpha": spec.rank,
        "learning_rate": spec.learning_rate,
        "lr_scheduler": spec.schedule,
        "train_batch_size": spec.batch,
        "max_train_epochs": spec.epochs,
        "seed": spec.seed,
        "validation_seed": 0,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    words += ["--calculate_cs", "--cache_latents", *more]
    if not spec.trains_text_encoder:
        words.append("--network_train_unet_only")
    return words


def folder_of(pictures, repeats, parent):
    """Make `parent` a folder as the trainer reads it: `<repeats>_pictures` in it points to the pictures."""
    parent.mkdir()
    (parent / f"{repeats}_pictures").symlink_to(pictures.resolve(), target_is_directory=True)


class RecordingTrainer(NetworkTrainer):
    """The trainer, with the norm of every step's gradient noted before it is clipped."""

    def __init__(self, args):
        super().__init__(args)
        self.gradient_norm = GradientNorm()

    def _share_gradients(self):
        super()._share_gradients()
        self.gradient_norm.note(self.parameters)


def loss_over(trainer, arguments, most_batches=None):
    """A function that scores other pictures as the trainer scores its validation pictures: fixed noise and timesteps."""
    view = copy.copy(trainer)
    view.args = copy.copy(trainer.args)
    view.args.max_validation_steps = most_batches
    view.batches, view.validation_batches = None, build_datasets(parse_arguments(arguments))[0]
    cache_latents(view)
    return lambda: validation_loss(view)


def groups_of(layer):
    """Its place in the model (down, mid, up; te) and the kind of its block (attn1, attn2, ff, ...)."""
    known = ("down_blocks", "mid_block", "up_blocks", "attn1", "attn2", "ff", "proj_in", "proj_out")
    return [layer.component] if layer.component != "unet" else [name for name in known if name in layer.name]


def pictures_of(spec):
    return next((data_folder(spec) / "train").glob("*_*"))


def record(spec, scratch):
    output = CACHE / "outputs" / spec.name
    shutil.rmtree(output, ignore_errors=True)
    train, score, probe = (scratch / name for name in ("train", "score", "probe"))
    folder_of(pictures_of(spec), spec.repeats, train)
    folder_of(data_folder(spec) / "heldout", 1, score)
    folder_of(pictures_of(spec), 1, probe)
    more = MORE_FLAGS.get(spec.purpose, [])
    trainer = RecordingTrainer(parse_arguments(arguments_of(spec, train, output, more)))
    trainer.set_up()
    heldout_loss = loss_over(trainer, arguments_of(spec, score, output))
    add_columns(trainer, heldout_loss, loss_over(trainer, arguments_of(spec, probe, output), PROBE_BATCHES))
    trainer.monitor.snapshots = None  # nothing is restored here
    at_start = heldout_loss()
    trainer.train()
    if trainer.outcome_name == "interrupted":
        raise KeyboardInterrupt
    trainer.monitor.close()
    write_trace(output, trace_path(spec), spec, heldout_at_start=at_start, outcome=trainer.outcome_name)
    shutil.rmtree(output, ignore_errors=True)


def add_columns(trainer, heldout_loss, probe_loss):
    every = max(1, round(trainer.total_steps / trainer.cs_interval / HELDOUT_POINTS))
    columns = trainer.columns
    columns.update(group_columns(trainer.network.layers(), groups_of, every))
    columns["probe_loss"], columns["grad_norm"] = EveryNth(probe_loss, every), trainer.gradient_norm.value
    columns["adam_ratio"] = lambda: adam_ratio(trainer.raw_optimizer)
    columns["heldout_loss"] = EveryNth(heldout_loss, every)
    if trainer.validation_batches is not None:
        columns["validation_loss"] = EveryNth(lambda: validation_loss(trainer), every)


def record_in_scratch(spec):
    with tempfile.TemporaryDirectory() as folder:
        record(spec, Path(folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(record_all(record_in_scratch, sys.argv[1:]))
