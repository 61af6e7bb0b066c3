"""What a run leaves besides its adapters: result.json, report.html, the last words on screen."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from es_lora.command_line import command_line, shown_path, without_flag
from es_lora.history import HISTORY_NAME
from es_lora.outcome import REPORT_NAME, Outcome
from es_lora.report import write_report
from settings.flags import Settings
from training.forgetting import forgetting_table

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors")
RESUME = "--resume_from_checkpoint"


def write_run_report(folder: Path, outcome: Outcome, settings: dict[str, Any]) -> None:
    """report.html from the history, where anything was measured."""
    if not (folder / HISTORY_NAME).is_file():
        return
    tables, mmlu, forgetting = outcome.tables(), outcome.extra.get("mmlu"), outcome.extra.get("forgetting")
    if mmlu:
        scores = [[score["when"], score["step"], f"{100 * score['accuracy']:.1f}%"] for score in mmlu]
        tables.append(("MMLU accuracy", ["when", "step", "accuracy"], scores))
    if forgetting:
        tables.append(forgetting_table(forgetting["loss"]))
    write_report(
        folder / REPORT_NAME,
        folder / HISTORY_NAME,
        verdict=f"{outcome.sentence()} {forgetting['sentence'] if forgetting else ''}".strip(),
        title=f"ES-LoRA: {folder.name}",
        decision=outcome.decision,
        settings=settings,
        tables=tables,
    )


def leave_results(folder: Path, outcome: Outcome, settings: Settings) -> None:
    """Write result.json, and report.html where anything was measured."""
    outcome.write(folder, settings.values(), PACKAGES)
    write_run_report(folder, outcome, settings.values(differing_only=True))


def forgetting_sentence(outcome: Outcome) -> str:
    """What is said of the general text, empty where none was given."""
    forgetting = outcome.extra["forgetting"]
    if not forgetting:
        return ""
    return forgetting["sentence"] or "General text: nothing was scored after training."


def go_on_command(program: Path, argv: Sequence[str]) -> str:
    """The command that goes on from the newest checkpoint. program: the trainer's file."""
    return command_line(sys.executable, program, [*without_flag(argv, RESUME), RESUME, "true"])


def next_commands(outcome: str, folder: Path, program: Path, argv: Sequence[str]) -> dict[str, str]:
    """{what for: command}: try the adapter, go on with the run. program: the trainer's file."""
    if outcome == "interrupted":
        return {"go on": go_on_command(program, argv)}
    if not (folder / "adapter").exists():
        return {}
    words = ["--adapter", shown_path(folder / "adapter"), "--prompt"]
    return {"try it": f'{command_line(sys.executable, program.with_name("generate_text.py"), words)} "..."'}
