"""The end of a run: which weights are saved under which name, the pictures that compare them, the result, the report."""

import time

from early_stopping import verdict_of_each_part
from lora_metadata import build_metadata, minimum_metadata
from run_outcome import Outcome, verdict_metadata, write_result, write_run_report
from training_optimizers import averaged_weights


def finish(trainer):
    """Save what the outcome asks for, write result.json and report.html; returns the Outcome. All processes call it."""
    args = trainer.args
    outcome = Outcome(trainer.outcome_name, trainer.progress.step, trainer.total_steps, measured=args.calculate_cs)
    if trainer.monitor is not None:
        outcome.decision, outcome.parts = trainer.monitor.decision, verdict_of_each_part(trainer.monitor)
        if outcome.name == "budget_reached" and outcome.decision is None:
            outcome.name = "no_turning_point"
    if trainer.shadows is not None:
        outcome.shadows = trainer.shadows.training.cost(trainer.train_seconds)
    if outcome.name == "interrupted":
        outcome.files["state"] = trainer.save_state(trainer.files.step_part(trainer.progress.step))
    elif outcome.name != "diverged" and (args.save_state or args.save_state_on_train_end):
        outcome.files["state"] = trainer.save_state()
    if trainer.is_main:
        with averaged_weights(trainer.raw_optimizer):
            pictures = save_results(trainer, outcome)
        write_result(args.output_dir, outcome, args, trainer.seed)
        if trainer.monitor is not None:
            if trainer.monitor.history_path.exists():
                write_run_report(args.output_dir, outcome, args, trainer.monitor, pictures)
            trainer.monitor.close()
    trainer.accelerator.end_training()
    return outcome


def save_results(trainer, outcome):
    """The LoRA files, or the whole model, that this outcome leaves; returns pictures for the report, [(caption, path)].

    With --early_stop the kept weights get the normal name and the last ones `-last`; without it the last ones get the
    normal name and those of the turning point `-turning-point`.
    """
    if outcome.name == "interrupted":
        return []
    if outcome.name == "diverged":
        outcome.kept_step, tensors = trainer.safety_copy
        outcome.files["kept"] = trainer.save_weights("", _state_with(trainer, tensors), outcome)
        return []
    last = trainer.network.state_for_file()
    found = trainer.monitor.load_snapshot(outcome.decision.keep_step) if outcome.decision else None
    if outcome.name == "stopped_early":
        outcome.kept_step = outcome.decision.keep_step
        outcome.files["kept"] = trainer.save_weights("", _state_with(trainer, found), outcome)
        outcome.files["last"] = trainer.save_weights("-last", last, outcome)
    else:
        outcome.kept_step = outcome.last_step
        outcome.files["kept"] = trainer.save_weights("", last, outcome)
        if found:
            turning_point = _state_with(trainer, found)
            outcome.files["turning_point"] = trainer.save_weights("-turning-point", turning_point, outcome)
    if trainer.args.train_full_unet:
        trainer.save_previews("-last")  # there is no LoRA to switch off for a comparison
        return []
    return compare(trainer, found)


def _state_with(trainer, tensors):
    """What a file holds, with the trainable tensors of another step; the live ones stay as they are."""
    return trainer.network.state_for_file(tensors=tensors)


def compare(trainer, found):
    """Pictures without LoRA, of the turning point and of the last weights, at the same seeds: [(caption, path)]."""
    network = trainer.network
    live = {name: tensor.detach().clone() for name, tensor in network.tensors().items()}
    kinds = [("no LoRA", "-base", live), ("turning point", "-turning-point", found), ("last", "-last", live)]
    rows = []
    for caption, part, tensors in kinds:
        if tensors is None:
            continue
        network.load_tensors(tensors)
        network.multiplier = 0.0 if caption == "no LoRA" else 1.0
        made = trainer.save_previews(part)
        rows.append([(f"{caption}: {prompt.prompt} (seed {prompt.seed})", path) for prompt, path in made])
    network.multiplier = 1.0
    network.load_tensors(live)
    return [picture for of_one_prompt in zip(*rows) for picture in of_one_prompt]


def lora_metadata(trainer, outcome=None):
    """Everything a file says about its training: ss_*, modelspec.* and the verdict."""
    args, optimizer = trainer.args, type(trainer.raw_optimizer)
    training = {
        "session_id": trainer.seed,
        "training_started_at": trainer.started_at,
        "training_finished_at": time.time(),
        "output_name": args.output_name,
        "optimizer": f"{optimizer.__module__}.{optimizer.__name__}({','.join(args.optimizer_args or [])})",
        "num_epochs": trainer.total_epochs,
        "epoch": trainer.progress.epoch[0],
        "max_train_steps": trainer.total_steps,
        "steps": trainer.progress.step,
        "seed": trainer.seed,
    }
    metadata = build_metadata(
        vars(args),
        base=trainer.model.base_hashes,
        network_args=trainer.network_args,
        data=trainer.batches.metadata(),
        training=training,
    )
    metadata = minimum_metadata(metadata) if args.no_metadata else metadata
    return {**metadata, **(verdict_metadata(outcome) if outcome else {})}
