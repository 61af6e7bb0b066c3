"""Record image runs. record_runs.py calls it, in the diffusion environment with lora-ldm/ on the
path."""

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from recorded_columns import (
    Alignment,
    Averages,
    EveryNth,
    GradientNorm,
    ShadowScores,
    adam_ratio,
    group_columns,
    record_all,
    shadow_interval,
    weighted_evidence,
    write_trace,
)
from runs import CACHE, ROOT, data_folder, trace_path

from images.batches import build_datasets
from settings.parsing import parse_arguments
from training import loop
from training.objective import HeldOut
from training.setup import cache_latents, set_up

HELDOUT_POINTS = 30  # about so many held-out losses a run
AVERAGES_EVERY = 2  # averages, whose losses move slowly, at every second of these
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
    """Make `parent` a folder as the trainer reads it: `<repeats>_pictures` in it points to the
    pictures."""
    parent.mkdir()
    (parent / f"{repeats}_pictures").symlink_to(pictures.resolve(), target_is_directory=True)


def note_steps(run, norm, alignment, averaged):
    """Have every step's gradient noted, shared by all processes and before it is clipped, and its
    weights averaged. averaged: whatever has an update()."""
    share = run.processes.share_gradients

    def share_and_note(parameters):
        share(parameters)
        norm.note(parameters)
        alignment.note()

    def average(*_):
        for averages in averaged:
            averages.update()

    run.processes.share_gradients = share_and_note
    run.optimization.raw.register_step_post_hook(average)


def heldout_of(run, arguments, most_batches=None):
    """Other pictures as the trainer's held-out ones: fixed noise and timesteps, cached latents."""
    batches = build_datasets(parse_arguments(arguments))[0]
    cache_latents(run.objective, [batches])
    return HeldOut(run.objective, run.network, run.optimization, batches, most_batches)


def groups_of(layer):
    """Its place in the model (down, mid, up; te) and the kind of its block (attn1, attn2, ff,
    ...)."""
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
    run = set_up(parse_arguments(arguments_of(spec, train, output, more)))
    heldout = heldout_of(run, arguments_of(spec, score, output))
    add_columns(run, spec, heldout, heldout_of(run, arguments_of(spec, probe, output), PROBE_BATCHES))
    run.monitor.snapshots = None  # nothing is restored here
    at_start = heldout.loss()
    ending = loop.train(run)
    if ending.name == "interrupted":
        raise KeyboardInterrupt
    run.monitor.close()
    write_trace(output, trace_path(spec, anew=True), spec, heldout_at_start=at_start, outcome=ending.name)
    shutil.rmtree(output, ignore_errors=True)


def add_columns(run, spec, heldout, probe):
    layers, averages = run.network.layers(), Averages(run.network.tensors)
    norm, alignment = GradientNorm(), Alignment(layers)
    measurements = run.length.total_steps // run.plan.cs_interval
    every = max(1, round(measurements / HELDOUT_POINTS))
    columns = run.monitor.columns
    slow = {**group_columns(layers, groups_of), "probe_loss": probe.loss, "heldout_loss": heldout.loss}
    columns.update({name: EveryNth(function, every, measurements) for name, function in slow.items()})
    columns["heldout_loss_average"] = EveryNth(averages.scored(heldout.loss), AVERAGES_EVERY * every, measurements)
    columns.update(weighted_evidence(run.monitor.evidence))
    columns["grad_norm"] = norm.value
    columns["alignment"], columns["average_distance"] = alignment.value, averages.distances
    columns["adam_ratio"] = lambda: adam_ratio(run.optimization.raw)
    averaged = [averages]
    if run.shadows is not None:
        interval = shadow_interval(run.length.steps_per_epoch / run.plan.cs_interval)
        shadows = ShadowScores(run.shadows.training, run.shadows.fold_losses, interval)
        columns["shadow_loss"], columns["shadow_losses"] = shadows.mean, shadows.each
        averaged.append(shadows)
    note_steps(run, norm, alignment, averaged)
    if run.validation is not None:
        columns["validation_loss"] = EveryNth(run.validation.loss, every, measurements)


def record_in_scratch(spec):
    with tempfile.TemporaryDirectory() as folder:
        record(spec, Path(folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(record_all(record_in_scratch, sys.argv[1:]))
