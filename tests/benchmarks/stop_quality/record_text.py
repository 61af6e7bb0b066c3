"""Record text runs. record_runs.py calls it, in the language-model environment with lora-llm/ on
the path."""

import shutil
import sys

import es_lora_llm
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
from transformers import TrainerCallback

from es_lora.hugging_face.peft_models import peft_lora_layers, trainable_tensors
from settings.parsing import parse_arguments
from text.sources import read_table_as_pairs
from training.losses import RowLoss

HELDOUT_ROWS, HELDOUT_POINTS = 32, 24  # examples scored; about so many times a run
AVERAGES_EVERY = 2  # averages, whose losses move slowly, at every second of these
PROBE_ROWS, EVALUATION_BATCH = 8, 20
BASES = {
    "embedded": ROOT / "lora-llm" / "tiny_base",
    "larger": CACHE / "larger_base",
    "smollm2": "smollm2",  # the trainer fetches it
}


def arguments_of(spec, output):
    folder = data_folder(spec)
    flags = {
        "model_name_or_path": BASES[spec.base],
        "dataset": folder / "train.jsonl",
        "output_dir": output,
        "bits": 32 if spec.bits == 16 else spec.bits,  # 16-bit weights; a CPU without bf16 units would take hours
        "lora_r": spec.rank,
        "lora_alpha": 2 * spec.rank,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": spec.schedule,
        "warmup_ratio": 0,
        "num_train_epochs": spec.epochs,
        "per_device_train_batch_size": spec.batch,
        "gradient_accumulation_steps": 1,
        "source_max_len": 128,
        "target_max_len": 128,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "optim": "adamw_torch",
        "disable_tqdm": True,
        "seed": spec.seed,
    }
    if spec.purpose == "validation":
        flags.update(do_eval=True, eval_dataset_size=0.1)
    if spec.purpose == "shadow":
        flags.update(shadows=2)
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def loss_over(run, rows):
    return RowLoss(run.model, run.collator, rows, EVALUATION_BATCH)


class NotesSteps(TrainerCallback):
    """Notes every step's gradients and averages its weights. The monitor keeps no snapshots:
    nothing is restored here. averaged: whatever has an update()."""

    def __init__(self, run, norm, alignment, averaged):
        self.run, self.norm, self.alignment, self.averaged = run, norm, alignment, averaged
        self.parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]

    def on_train_begin(self, args, state, control, **kwargs):
        monitor = self.run.early_stop.monitor
        monitor.snapshots = None
        monitor.columns.update(weighted_evidence(monitor.evidence))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.norm.note(self.parameters)
        self.alignment.note()

    def on_optimizer_step(self, args, state, control, **kwargs):
        for averages in self.averaged:
            averages.update()


def add_columns(run, spec, heldout, probe):
    """Fill the callback's further columns, and note steps for them. The slow ones are measured
    about HELDOUT_POINTS times a run."""
    columns, depth, layers = run.early_stop.columns, run.model.config.num_hidden_layers, peft_lora_layers(run.model)
    norm, alignment, averages = GradientNorm(), Alignment(layers), Averages(lambda: trainable_tensors(run.model))

    def groups_of(layer):
        """A layer's projection (q_proj, ...) and its third of the depth."""
        parts = layer.name.split(".")
        number = int(next(part for part in parts if part.isdigit()))
        return parts[-1], f"third-{3 * number // depth + 1}"

    steps_per_epoch = -(-len(run.splits.train) // spec.batch)
    cs_interval = max(1, round(steps_per_epoch / 10))
    measurements = spec.epochs * steps_per_epoch // cs_interval
    every = max(1, round(measurements / HELDOUT_POINTS))
    slow = {**group_columns(layers, groups_of), "probe_loss": probe, "heldout_loss": heldout}
    columns.update({name: EveryNth(function, every, measurements) for name, function in slow.items()})
    columns["heldout_loss_average"] = EveryNth(averages.scored(heldout), AVERAGES_EVERY * every, measurements)
    columns["grad_norm"] = norm.value
    columns["alignment"], columns["average_distance"] = alignment.value, averages.distances
    columns["adam_ratio"] = lambda: adam_ratio(run.trainer.optimizer.optimizer)
    averaged = [averages]
    if run.shadows is not None:
        interval = shadow_interval(steps_per_epoch / cs_interval)
        shadows = ShadowScores(run.shadows.training, run.shadows.fold_losses, interval)
        columns["shadow_loss"], columns["shadow_losses"] = shadows.mean, shadows.each
        averaged.append(shadows)
    run.trainer.add_callback(NotesSteps(run, norm, alignment, averaged))
    if spec.purpose == "validation":
        columns["validation_loss"] = EveryNth(loss_over(run, list(run.splits.evaluation)), every, measurements)


def record(spec):
    output = CACHE / "outputs" / spec.name
    shutil.rmtree(output, ignore_errors=True)
    run = es_lora_llm.set_up(parse_arguments(arguments_of(spec, output)))
    rows, _ = read_table_as_pairs(data_folder(spec) / "heldout.jsonl")
    heldout = loss_over(run, list(rows)[:HELDOUT_ROWS])
    probe = loss_over(run, [run.splits.train[index] for index in range(PROBE_ROWS)])
    add_columns(run, spec, heldout, probe)
    at_start = heldout()
    outcome = es_lora_llm.train(run).name
    if outcome == "interrupted":
        raise KeyboardInterrupt
    run.early_stop.monitor.close()
    write_trace(output, trace_path(spec, anew=True), spec, heldout_at_start=at_start, outcome=outcome)
    shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(record_all(record, sys.argv[1:]))
