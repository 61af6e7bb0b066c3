"""What a run leaves besides its adapters: result.json, report.html and the last words on the screen."""

import json
import math
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

from es_lora.files import write_text_whole
from es_lora.history import HISTORY_NAME
from es_lora.report import write_report
from es_lora.rules import Decision
from training.forgetting import forgetting_table

EXIT_CODES = {"stopped_early": 0, "budget_reached": 0, "no_turning_point": 0, "evaluated": 0, "diverged": 3, "interrupted": 130}
VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in VERSIONED}}


def held_out_sentence(kept: Optional[float], last: Optional[float]) -> str:
    """Compares the two held-out losses where both are known; empty otherwise."""
    if kept is None or last is None:
        return ""
    change = 100 * (last / kept - 1)
    direction = "higher" if change > 0 else "lower"
    return f" Held-out loss: {kept:.4f} there, {last:.4f} at the last step ({abs(change):.1f}% {direction})."


def verdict_sentence(outcome: str, facts: dict[str, Any], decision: Optional[Decision], steps_per_epoch: float) -> str:
    """The verdict in plain words. facts: last_step, budget_steps, heldout {"kept", "last"}, diverged."""
    last, budget, heldout = facts["last_step"], facts["budget_steps"], facts["heldout"]
    compared = held_out_sentence(heldout.get("kept"), heldout.get("last"))
    kept = None if decision is None else f"step {decision.keep_step} (epoch {decision.keep_step / steps_per_epoch:.1f})"
    if outcome == "stopped_early":
        return f"Stopped early at step {last} of {budget}. The weights of the turning point, {kept}, are kept.{compared}"
    trained = f"Trained to its budget of {budget} steps"
    if last < budget:
        trained = f"Trained to the end of the data, step {last} of {budget}"
    if outcome == "budget_reached" and decision is not None:
        found = f"The turning point was {kept}, found at step {decision.detected_step}."
        return f"{trained}. {found}{compared}"
    if outcome == "budget_reached":
        return f"{trained}."
    if outcome == "no_turning_point":
        return f"{trained}: no evidence of overfitting yet, so there is no turning point."
    if outcome == "diverged":
        return f"Training diverged at step {last}: {facts['diverged']}. {facts['diverged_kept']}"
    return f"Interrupted at step {last} of {budget}; everything needed to go on is saved."


def next_commands(outcome: str, output_dir: Path, program: Path, argv: list[str]) -> list[str]:
    """The exact commands that follow: try the adapter, or go on with the run."""
    python = shlex.quote(sys.executable)
    if outcome == "interrupted":
        resumed = _without_resume(argv)
        return [f"go on:  {python} {shlex.quote(str(program))} {shlex.join(resumed)} --resume_from_checkpoint true"]
    if outcome == "diverged" and not (output_dir / "adapter").exists():
        return ["next:   lower --learning_rate and start anew in another --output_dir"]
    generate = program.with_name("generate_text.py")
    adapter = shlex.quote(str(output_dir / "adapter"))
    return [f'try it: {python} {shlex.quote(str(generate))} --adapter {adapter} --prompt "..."']


def _without_resume(argv: list[str]) -> list[str]:
    kept, skip = [], False
    for word in argv:
        if skip and not word.startswith("--"):
            skip = False
            continue
        skip = word == "--resume_from_checkpoint"
        if not skip and not word.startswith("--resume_from_checkpoint="):
            kept.append(word)
    return kept


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_result(output_dir: Path, result: dict[str, Any]) -> None:
    write_text_whole(output_dir / "result.json", json.dumps(_finite(result), indent=2) + "\n")


def write_run_report(output_dir: Path, result: dict[str, Any], decision: Optional[Decision]) -> bool:
    """report.html from the history; False where nothing was measured."""
    if not (output_dir / HISTORY_NAME).is_file():
        return False
    heldout = result["heldout"]
    names = {"before": "before training", "kept": "turning point", "last": "last step"}
    known = {key: value for key, value in heldout.items() if value is not None}
    rows = [[names[key], f"{value:.4f}", f"{math.exp(min(value, 50)):.2f}"] for key, value in known.items()]
    tables = [("Held-out loss", ["weights", "loss", "perplexity"], rows)] if rows else []
    if result["mmlu"]:
        scores = [[score["when"], score["step"], f"{100 * score['accuracy']:.1f}%"] for score in result["mmlu"]]
        tables.append(("MMLU accuracy", ["when", "step", "accuracy"], scores))
    forgetting = result.get("forgetting")
    if forgetting:
        tables.append(forgetting_table(forgetting["loss"]))
    write_report(
        output_dir / "report.html",
        output_dir / HISTORY_NAME,
        verdict=f"{result['verdict']} {forgetting['sentence'] if forgetting else ''}".strip(),
        title=f"ES-LoRA: {output_dir.name}",
        decision=decision,
        settings=result["settings"],
        tables=tables,
    )
    return True
