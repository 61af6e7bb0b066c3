"""The end of a run: which weights are saved under which name, compared pictures, result, report."""

import sys
import textwrap
from argparse import Namespace
from pathlib import Path
from typing import Any, Optional

import torch

from es_lora.command_line import command_line, shown_path, without_flag
from es_lora.history import read_history, redecide
from es_lora.monitor import EarlyStopMonitor
from es_lora.outcome import REPORT_NAME, Outcome
from es_lora.report import write_report
from settings.checks import plain_settings
from training.loop import Ending, save_run
from training.setup import Run
from training.state import newest_state

PACKAGES = "torch diffusers transformers peft accelerate safetensors".split()
TREE = Path(__file__).resolve().parents[1]
TEXT_FLAGS = ("clip_skip", "max_token_length")  # how text is encoded: by training and by sample_images.py
PROMPT_LETTERS = 120  # of the prompt in the command to go on with
NOT_FINITE = "NaN or Inf in the loss, the gradients or the weights"

Pictures = list[tuple[str, Path]]


def finish(run: Run, ending: Ending) -> Outcome:
    """Save what the outcome asks for, write result.json and report.html. All processes call it."""
    args, names, outcome, state = run.args, run.files.names, outcome_of(run, ending), None
    if outcome.name == "interrupted":
        state = save_run(run, names.step_part(run.progress.step))
    elif outcome.name != "diverged" and (args.save_state or args.save_state_on_train_end):
        state = save_run(run)
    if run.processes.is_main:
        with run.optimization.weights_to_use():
            pictures = save_results(run, ending, outcome)
        if state is not None:
            outcome.saved("state", state, run.progress.step)
        settings = {name: value for name, value in plain_settings(args).items() if value not in (None, False, "")}
        outcome.write(names.folder, settings, PACKAGES)
        if run.monitor is not None:
            if run.monitor.history_path.exists():
                write_run_report(outcome, run.monitor, settings, pictures)
            run.monitor.close()
    run.processes.accelerator.end_training()
    return outcome


def outcome_of(run: Run, ending: Ending) -> Outcome:
    """How the run ended, without its files."""
    decision = run.monitor.decision if run.monitor is not None else None
    undecided = ending.name == "budget_reached" and run.monitor is not None and decision is None
    return Outcome(
        "no_turning_point" if undecided else ending.name,
        run.progress.step,
        run.length.total_steps,
        plan=run.plan,
        decision=decision,
        diverged=NOT_FINITE if ending.name == "diverged" else None,
        parts=verdict_of_each_part(run.monitor) if run.monitor is not None else {},
        shadows=run.shadows.training.cost(ending.seconds) if run.shadows is not None else None,
        seconds=ending.seconds,
        seed=run.args.seed,
    )


def verdict_of_each_part(monitor: EarlyStopMonitor) -> dict[str, dict[str, Any]]:
    """{component: the rule's verdict on its own CS}, as cs_replay gives it."""
    if not monitor.measurements:
        return {}
    history = read_history(monitor.history_path)
    parts = [name for name in history.records[-1]["cs"] if name != "all"]
    ended = history.decided_at_end()
    return {part: redecide(history, "recorded", ended=ended, component=part) for part in parts}


def save_results(run: Run, ending: Ending, outcome: Outcome) -> Pictures:
    """The LoRA files, or the model, that this outcome leaves; -> pictures for the report.

    With --early_stop the kept weights get the normal name and the last ones `-last`; without it the
    last ones get the normal name and those of the turning point `-turning-point`. At the end of the
    budget an average gets the normal name, and the last weights are `-last` beside it."""
    if outcome.name == "interrupted":
        return []
    if outcome.name == "diverged":
        if ending.finite is not None:
            step, tensors = ending.finite
            save(run, outcome, "kept", step, tensors, averaged=False)
        return []
    found = run.monitor.load_snapshot(outcome.decision.keep_step) if outcome.decision is not None else None
    if outcome.name == "stopped_early":
        save(run, outcome, "kept", outcome.decision.keep_step, found)
        save(run, outcome, "last", outcome.last_step)
    else:
        average = run.monitor.kept_tensors() if outcome.keeps_average_of_all else None
        save(run, outcome, "kept", outcome.last_step, average)
        if average is not None:
            save(run, outcome, "last", outcome.last_step)
        if found is not None:
            save(run, outcome, "turning_point", outcome.decision.keep_step, found)
    if run.args.train_full_unet:
        run.previews.save("-last")  # there is no LoRA to switch off for a comparison
        return []
    kinds = [] if found is None or outcome.keeps_last else [("turning point", "-turning-point", found)]
    if outcome.keeps_average_of_all:
        kinds.append(("average", "-average", run.monitor.kept_tensors()))
    return run.previews.compared([*kinds, ("last", "-last", None)])


def save(
    run: Run,
    outcome: Outcome,
    what: str,
    step: int,
    tensors: Optional[dict[str, torch.Tensor]] = None,
    averaged: Optional[bool] = None,
) -> None:
    """Write a step's weights as "kept" (normal name), "last" or "turning_point", and note it.
    tensors: those of that step, None: the live ones. averaged: as Outcome.saved."""
    part = "" if what == "kept" else f"-{what.replace('_', '-')}"
    outcome.saved(what, run.files.names.path(part).name, step, averaged)
    run.files.save(part, run.network.state_for_file(tensors=tensors), step, outcome.metadata(what))


def write_run_report(outcome: Outcome, monitor: EarlyStopMonitor, settings: dict[str, Any], pictures: Pictures) -> None:
    """report.html beside the history."""
    write_report(
        monitor.folder / REPORT_NAME,
        monitor.history_path,
        verdict=outcome.sentence(),
        title=f"ES-LoRA: {settings['output_name']}",
        decision=outcome.decision,
        settings=settings,
        tables=outcome.tables(),
        images=pictures,
    )


def last_lines(outcome: Outcome, run: Run) -> list[str]:
    """The verdict, each part's own, the files, and the command to go on with."""
    return outcome.last_lines(run.files.names.folder, [], next_commands(outcome, run))


def next_commands(outcome: Outcome, run: Run) -> dict[str, str]:
    """{what for: the exact command}."""
    args, folder = run.args, run.files.names.folder
    if outcome.name == "interrupted":
        return {"Carry on with": go_on_command(folder / outcome.files["state"].path)}
    if "kept" not in outcome.files:
        return {}
    kind = (["--v2"] if args.v2 else []) + (["--v_parameterization"] if args.v_parameterization else [])
    text = [word for flag in TEXT_FLAGS if getattr(args, flag) for word in (f"--{flag}", getattr(args, flag))]
    kept, base = shown_path(folder / outcome.files["kept"].path), args.pretrained_model_name_or_path
    models = ["--base", kept] if args.train_full_unet else ["--base", base, "--lora", kept]
    prompts = run.previews.prompts
    prompt = prompts[0].prompt if prompts else run.loader.batches.whole_captions()[0]
    words = [*models, *kind, *text, "--prompt", short_prompt(prompt)]
    commands = {"Try it": _script("sample_images.py", *words)}
    if args.train_full_unet:
        words = ["--model_org", base, "--model_tuned", kept, *kind, "--save_to", f"{kept}-lora.safetensors"]
        commands["Make a LoRA of it, which stage two trains on"] = _script("extract_lora.py", *words)
    return commands


def go_on_command(state: Path) -> str:
    """The command that goes on from a state folder."""
    script, *words = sys.argv
    return command_line(sys.executable, script, [*without_flag(words, "--resume"), "--resume", shown_path(state)])


def how_to_go_on(args: Namespace) -> str:
    """What is said of the newest whole state when the machine has failed."""
    state = newest_state(Path(args.output_dir))
    if state is None:
        return "No state has been saved: start anew (--save_state saves some)."
    return f"The last whole state is {shown_path(state)}. Go on with: {go_on_command(state)}"


def short_prompt(text: str) -> str:
    """The beginning of a caption, whole words of one line, as much as a command shows well."""
    return textwrap.shorten(text, PROMPT_LETTERS, placeholder="").rstrip(",;: ") or text[:PROMPT_LETTERS]


def _script(name, *words):
    """A command line of another script of this tree."""
    return command_line(sys.executable, TREE / name, words)
