"""The end of a run: which weights are saved under which name, the pictures that compare them, the result, the report."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from es_lora.files import write_text_whole
from es_lora.report import write_report
from es_lora.rules import Decision
from network.metadata import build_metadata, minimum_metadata
from training.measuring import verdict_of_each_part
from training.schedule_free import averaged_weights


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


EXIT_CODES = {"stopped_early": 0, "budget_reached": 0, "no_turning_point": 0, "interrupted": 130, "diverged": 3}
PART_NAMES = {"unet": "U-Net", "te": "text encoder", "te1": "first text encoder", "te2": "second text encoder"}
PACKAGES = "torch diffusers transformers peft accelerate safetensors".split()


@dataclass
class Outcome:
    """How a run ended. files: {"kept": path, "last": path, "turning_point": path, "state": path} as far as they exist."""

    name: str
    last_step: int
    total_steps: int
    decision: Optional[Decision] = None
    parts: dict = field(default_factory=dict)  # {component: verdict of its own CS}
    kept_step: Optional[int] = None  # whose weights lie under the normal name
    files: dict = field(default_factory=dict)
    measured: bool = False
    shadows: Optional[dict] = None  # what the shadow adapters have cost

    @property
    def exit_code(self):
        return EXIT_CODES[self.name]

    def sentence(self):
        """The verdict in plain words."""
        last, found = self.last_step, self.decision
        if self.name == "diverged":
            kept = f"The weights of step {self.kept_step} are kept." if self.kept_step is not None else "Nothing was saved."
            return f"Training diverged (NaN or Inf) in step {last + 1}. {kept} Lower the learning rate and start again."
        if self.name == "interrupted":
            return f"Interrupted after step {last} of {self.total_steps}; the state is saved."
        if self.name == "stopped_early":
            return (
                f"Stopped after step {last} of {self.total_steps}: overfitting began at about step {found.keep_step}, and "
                f"the weights of that step are the result. {found.reason}"
            )
        if found is not None:
            return (
                f"Trained all {last} steps, as asked. The turning point was step {found.keep_step}; its weights lie beside "
                f"the last ones. {found.reason}"
            )
        if self.measured:
            return f"Trained all {last} steps. No evidence of overfitting yet: the last weights are the result."
        return f"Trained all {last} steps."


def versions():
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **installed}


def write_result(folder, outcome, args, seed):
    """result.json: the outcome as one JSON object."""
    found = outcome.decision
    content = {
        "outcome": outcome.name,
        "exit_code": outcome.exit_code,
        "kept_step": outcome.kept_step,
        "turning_step": found.keep_step if found else None,
        "detection_step": found.detected_step if found else None,
        "usable_steps": list(found.usable) if found else None,
        "last_step": outcome.last_step,
        "total_steps": outcome.total_steps,
        "reason": found.reason if found else outcome.sentence(),
        "parts": outcome.parts,
        "shadows": outcome.shadows,
        "files": {name: Path(path).name for name, path in outcome.files.items()},
        "seed": seed,
        "versions": versions(),
        "settings": plain_settings(args),
    }
    write_text_whole(Path(folder) / "result.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def plain_settings(args):
    """The settings that were given or differ from nothing, as JSON values, without keys and tokens."""
    hidden = ("wandb_api_key", "huggingface_token")
    chosen = {key: value for key, value in vars(args).items() if value not in (None, False, "") and key not in hidden}
    return {key: value if isinstance(value, (int, float, str, list)) else str(value) for key, value in chosen.items()}


def write_run_report(folder, outcome, args, monitor, pictures):
    """report.html beside the history. pictures: [(caption, PNG path)]."""
    head = ["part", "turning point (step)", "detected at step", "verdict"]
    rows = [[part, v["turning_step"] or "none", v["stop_step"] or "", v["reason"]] for part, v in outcome.parts.items()]
    files = [[name.replace("_", " "), Path(path).name] for name, path in outcome.files.items()]
    write_report(
        Path(folder) / "report.html",
        monitor.history_path,
        verdict=outcome.sentence(),
        title=f"ES-LoRA: {args.output_name}",
        decision=outcome.decision,
        settings=plain_settings(args),
        tables=[("Each part by itself", head, rows), ("Files", ["what", "file"], files)],
        images=pictures,
    )


def verdict_metadata(outcome):
    """What a LoRA file says about its early stop."""
    found = outcome.decision
    facts = {"outcome": outcome.name, "last_step": outcome.last_step}
    if found is not None:
        facts.update(turning_step=found.keep_step, detection_step=found.detected_step, reason=found.reason)
    return {f"es_lora_{name}": str(value) for name, value in facts.items()}


def last_lines(outcome, args, prompt):
    """The verdict, each part's own, the files, and the command to go on with."""
    lines = ["", outcome.sentence()]
    for part, verdict in outcome.parts.items() if len(outcome.parts) > 1 else ():
        name = PART_NAMES.get(part, part)
        lines.append(f"  {name} alone: " + (f"turning point {verdict['turning_step']}" if verdict["stopped"] else "none yet"))
    if outcome.shadows:
        lines.append(f"  {outcome.shadows['sentence']}")
    for name, path in sorted(outcome.files.items(), key=lambda item: item[0] == "state"):
        lines.append(f"  {name.replace('_', ' ')}: {show(path)}")
    report = Path(args.output_dir) / "report.html"
    if report.exists():
        lines.append(f"  report: {show(report)}")
    python = show(sys.executable)
    if outcome.name == "interrupted":
        words = _words_without_resume(sys.argv)
        lines += ["Carry on with:", f"  {shlex.join([python, *words, '--resume', show(outcome.files['state'])])}"]
    elif "kept" in outcome.files:
        kind = (["--v2"] if args.v2 else []) + (["--v_parameterization"] if args.v_parameterization else [])
        text = ["--clip_skip", str(args.clip_skip)] if args.clip_skip else []
        kept, base = show(outcome.files["kept"]), args.pretrained_model_name_or_path
        models = ["--base", kept] if args.train_full_unet else ["--base", base, "--lora", kept]
        lines += ["Try it:", _command("sample_images.py", *models, *kind, *text, "--prompt", prompt)]
        if args.train_full_unet:
            words = ["--model_org", base, "--model_tuned", kept, *kind, "--save_to", f"{kept}-lora.safetensors"]
            lines += ["Make a LoRA of it, which stage two trains on:", _command("extract_lora.py", *words)]
    return lines


def _command(script, *words):
    """A command line of another script of this folder."""
    return "  " + shlex.join([show(sys.executable), show(Path(__file__).resolve().parents[1] / script), *words])


def show(path):
    """A path as a person at this place would type it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.path.join("..", "..")) else relative


def _words_without_resume(words):
    result, skip = [], False
    for word in words:
        if not (skip or word == "--resume" or word.startswith("--resume=")):
            result.append(word)
        skip = word == "--resume"
    return result
