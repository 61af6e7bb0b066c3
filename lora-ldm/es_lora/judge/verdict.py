"""Which saved adapter is to be kept: the rule that the checkpoints allow, its answer in words."""

import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

from cs_fluctuation import FluctuationSeries, NonFiniteWeightsError
from es_lora.history import HISTORY_FORMAT, HISTORY_NAME, History, redecide, replay, rule_for
from es_lora.judge.adapter_files import read_adapter
from es_lora.judge.base_index import Base, Key
from es_lora.judge.measuring import Measurer
from es_lora.judge.run_folder import Checkpoint, Run
from es_lora.report import write_report
from es_lora.rules import DEFAULT_RULE, RULES, Decision
from es_lora.settings import auto_window

# Where only weights are at hand. By the figures of tests/benchmarks/stop_quality no rule on weights
# that does without a window, and so could judge one checkpoint an epoch, beats keeping epoch 2 of
# any run: there the verdict is "too sparse to say".
RULE_BY_WEIGHTS = "second-valley"
WEIGHT_COLUMNS = {"step", "epoch", "cs", "cs_row", "cs_matrix", "delta_norm", "stable_rank", "fluctuation"}
MEASUREMENTS_PER_EPOCH = 5  # fewer, and the window of at least 5 measurements no longer is about one epoch
MOST_LISTED = 1000  # of the measurements that are missing
MISSING_SHARE = 0.1  # of the measurements that a verdict bears


def measure_run(run: Run, base: Base, progress: bool = False) -> None:
    """Fill in every checkpoint's columns; one that cannot be read moves to run.problems.
    Raises ValueError where none can be read, BaseMismatchError where the base does not fit."""
    measurer, readable = Measurer(base), []
    layers: Optional[Set[Key]] = None
    for number, checkpoint in enumerate(run.checkpoints, start=1):
        if progress:
            print(f"\rmeasuring {number} of {len(run.checkpoints)} ", end="", file=sys.stderr, flush=True)
        try:
            layers = _measure(checkpoint, measurer, layers)
            readable.append(checkpoint)
        except (ValueError, NonFiniteWeightsError) as error:
            run.problems[checkpoint.name] = str(error)
    if progress:
        print("\r", end="", file=sys.stderr)
    run.checkpoints = readable
    if not readable:
        raise ValueError(
            "no checkpoint can be read: " + "; ".join(f"{name}: {why}" for name, why in run.problems.items())
        )


def _measure(checkpoint: Checkpoint, measurer: Measurer, layers: Optional[Set[Key]]) -> Set[Key]:
    """Fill in one checkpoint's columns; its LoRA layers. One adapter at a time is in memory."""
    adapter = read_adapter(checkpoint.file)
    if layers is not None and set(adapter.modules) != layers:
        raise ValueError("its LoRA layers are not those of the first checkpoint: it is of another run")
    checkpoint.columns, checkpoint.unjudged = measurer.measure(adapter), adapter.unjudged()
    return set(adapter.modules)


@dataclass
class Spacing:
    """Checkpoints `interval` steps apart; a run measures every `planned`; `window` measurements."""

    interval: int
    planned: int
    window: int
    missing: List[int]
    measured: List[Checkpoint]
    sparse: Optional[str]  # why nothing can be said by a rule that looks at a window


def find_spacing(run: Run) -> Spacing:
    """The measurements the checkpoints stand for: multiples of one interval, near the run's own."""
    header = run.history.header if run.history else {}
    per_epoch = run.steps_per_epoch
    planned = header.get("cs_interval") or max(1, round(per_epoch / 10))
    steps = [checkpoint.step for checkpoint in run.checkpoints]
    gaps = Counter(later - earlier for earlier, later in zip(steps, steps[1:]))
    gap = min(gaps, key=lambda value: (-gaps[value], value)) if gaps else max(1, steps[0])
    interval = gap * max(1, round(planned / gap))
    on_planned = len([step for step in steps if step and step % planned == 0])
    if on_planned >= (1 - MISSING_SHARE) * (steps[-1] // planned) and on_planned:
        interval = planned  # other checkpoints between the measurements do not hide them
    window = header["window"] if header and interval == planned else auto_window(per_epoch, interval)
    measured = [checkpoint for checkpoint in run.checkpoints if checkpoint.step and checkpoint.step % interval == 0]
    present = {checkpoint.step for checkpoint in measured}
    expected = range(interval, steps[-1] + 1, interval)
    absent = len(expected) - len(present)
    missing = list(islice((step for step in expected if step not in present), MOST_LISTED))
    sparse = None
    if run.counts_epochs:
        sparse = f"the checkpoints lie {interval} epoch{'s' * (interval > 1)} apart"
    elif interval > planned and per_epoch < MEASUREMENTS_PER_EPOCH * interval:
        sparse = f"the checkpoints lie {interval} steps ({interval / per_epoch:.2g} epochs) apart"
    elif absent > max(1, MISSING_SHARE * len(expected)):
        sparse = f"{absent} of {len(expected)} checkpoints, one every {interval} steps, are missing"
    return Spacing(interval, planned, window, missing, measured, sparse)


def build_history(run: Run, spacing: Spacing) -> History:
    """The run as cs_replay reads it; columns of training (loss, ...) stay beside the measured."""
    recorded = {record["step"]: record for record in run.history.records} if run.history else {}
    components = list(run.checkpoints[0].columns["cs_row"])
    header = {
        "format": HISTORY_FORMAT,
        "reduction": "row" if "lm" in components else "matrix",
        "decided_on": next((name for name in ("lm", "unet", "transformer", "te") if name in components), "all"),
        "rule": DEFAULT_RULE,
        **(run.history.header if run.history else {}),
        "cs_interval": spacing.interval,
        "window": spacing.window,
        "steps_per_epoch": run.steps_per_epoch,
    }
    if header["decided_on"] not in components:
        raise ValueError(
            f"the history decides on {header['decided_on']!r}; the checkpoints hold {', '.join(components)}"
        )
    series, records = FluctuationSeries(spacing.window), []
    for checkpoint in spacing.measured:
        cs = checkpoint.columns[f"cs_{header['reduction']}"]
        epoch = checkpoint.step / run.steps_per_epoch
        record = {"step": checkpoint.step, "epoch": epoch, "cs": cs, **checkpoint.columns}
        record["fluctuation"] = series.update(cs[header["decided_on"]]).fluctuation
        records.append({**recorded.get(checkpoint.step, {}), **record})
    return History(header, records, run.history.events if run.history else [])


def choose_rule(history: History, rule: Optional[str]) -> str:
    """The rule asked for, or the default if a history has its columns, or RULE_BY_WEIGHTS.
    Raises ValueError where the rule asked for needs a column that weights alone do not give."""
    columns = WEIGHT_COLUMNS | {name for line in history.records for name, value in line.items() if value is not None}
    if rule is not None:
        asked = rule_for(history, rule)
        lacking = [column for column in asked.needs if column not in columns]
        if lacking:
            raise ValueError(
                f"rule {asked.name} needs {', '.join(lacking)}, which saved weights do not tell; choose another rule"
            )
        return rule
    return DEFAULT_RULE if columns.issuperset(RULES[DEFAULT_RULE].needs) else RULE_BY_WEIGHTS


def judge(run: Run, rule: Optional[str] = None) -> Tuple[Dict[str, Any], History, Optional[Decision]]:
    """The verdict on a measured run (a JSON object), the history behind it, the Decision."""
    spacing = find_spacing(run)
    history = build_history(run, spacing)
    own = _finer_history(run, spacing, rule)
    if own is not None:
        return _by_own_history(run, spacing, own, rule)
    chosen = choose_rule(history, rule)
    deciding = rule_for(history, chosen)
    first_answer = deciding.first_answer()
    verdict = {
        **redecide(history, chosen),
        "keep": None,
        "usable": [],
        "certainty": "exact" if spacing.interval == spacing.planned and not spacing.missing else "approximate",
    }
    decision = None
    if spacing.sparse and deciding.uses_window:
        need = max(spacing.planned, run.steps_per_epoch // MEASUREMENTS_PER_EPOCH)
        verdict.update(stopped=False, stop_step=None, turning_step=None, certainty="too sparse")
        wanted = f"every {need} steps" if need > 1 else "every step"
        measured = f"every {spacing.planned} steps" if spacing.planned > 1 else "every step"
        if run.counts_epochs:
            wanted, measured = f"{MEASUREMENTS_PER_EPOCH} times an epoch", "10 times an epoch"
        verdict["reason"] = (
            f"Too sparse to say: {spacing.sparse}. The rule {deciding.name} needs one at least {wanted}, from the "
            f"start on; a run with early stopping measures {measured}."
        )
    elif len(history.records) < first_answer:
        verdict["certainty"] = "too few"
        verdict["reason"] = (
            f"Too early to say: the rule {deciding.name} answers after {first_answer} measurements at the earliest "
            f"(step {first_answer * spacing.interval}), and there are {len(history.records)}."
        )
    else:
        decision = replay(deciding, history.records)
        _name_checkpoints(verdict, run, decision)
        windows = max(1, spacing.window - 1), spacing.window, spacing.window + 1  # how much hangs on the choice
        nearby = [redecide(history, chosen, window=m)["turning_step"] for m in windows]
        verdict["turning_steps_of_nearby_windows"] = nearby
        told = [step for step in nearby if step is not None]
        if len(told) not in (0, 3) or (told and max(told) - min(told) > run.steps_per_epoch):
            verdict["certainty"] += ", but a window one larger or smaller decides otherwise"
    if spacing.missing and verdict["certainty"].startswith("approximate"):
        verdict["reason"] += f" Missing: step {', '.join(map(str, spacing.missing[:5]))}."
    return {**verdict, **_facts(run, spacing, history)}, history, decision


def _finer_history(run: Run, spacing: Spacing, rule: Optional[str]) -> Optional[History]:
    """The run's own history, where it is finer than the checkpoints and has what the rule needs."""
    own, as_often = run.history, spacing.interval == spacing.planned and not spacing.missing
    if own is None or as_often or not own.records or own.last_step() < run.checkpoints[-1].step:
        return None
    needs = rule_for(own, choose_rule(own, rule)).needs
    recorded = all(column in record for record in own.records for column in needs)
    return own if recorded and own.header["decided_on"] in own.records[0]["cs"] else None


def _by_own_history(
    run: Run, spacing: Spacing, own: History, rule: Optional[str]
) -> Tuple[Dict[str, Any], History, Optional[Decision]]:
    """The verdict of the run's own measurements, on the checkpoints that are there."""
    chosen = choose_rule(own, rule)
    decision = replay(rule_for(own, chosen), own.records)
    verdict = {**redecide(own, chosen), "keep": None, "usable": [], "certainty": "exact"}
    verdict["reason"] += f" So say the {len(own.records)} measurements of the run itself."
    _name_checkpoints(verdict, run, decision)
    if decision is not None and decision.keep_step not in [checkpoint.step for checkpoint in run.checkpoints]:
        verdict["certainty"] = f"approximate: no checkpoint is of step {decision.keep_step}"
    return {**verdict, **_facts(run, spacing, own)}, own, decision


def _name_checkpoints(verdict: Dict[str, Any], run: Run, decision: Optional[Decision]) -> None:
    if decision is None:  # no sign of overfitting: the newest weights are the best known
        verdict["keep"], verdict["usable"] = run.checkpoints[-1].name, [run.checkpoints[-1].name]
        return
    earlier = [checkpoint for checkpoint in run.checkpoints if checkpoint.step <= decision.keep_step]
    verdict["keep"] = (earlier or run.checkpoints[:1])[-1].name
    first, last = decision.usable
    verdict["usable"] = [checkpoint.name for checkpoint in run.checkpoints if first <= checkpoint.step <= last]


def _facts(run: Run, spacing: Spacing, history: History) -> Dict[str, Any]:
    component, reduction = history.header["decided_on"], history.header["reduction"]
    rows = []
    for checkpoint in run.checkpoints:
        columns = {name: values[component] for name, values in checkpoint.columns.items() if name != "delta_norm"}
        epoch = checkpoint.step / run.steps_per_epoch
        rows.append({"name": checkpoint.name, "step": checkpoint.step, "epoch": epoch, **columns})
    return {
        "component": component,
        "reduction": reduction,
        "steps_per_epoch": run.steps_per_epoch,
        "spacing_steps": spacing.interval,
        "measurement_steps": spacing.planned,
        "missing_steps": spacing.missing,
        "checkpoints": rows,
        "not_judged": run.problems,
        "left_out": next((checkpoint.unjudged for checkpoint in run.checkpoints if checkpoint.unjudged), ""),
    }


HEAD = ("checkpoint", "step", "epoch", "CS", "update norm", "stable rank", "verdict")


def mark_of(verdict: Dict[str, Any], name: str) -> str:
    """What the verdict says of a checkpoint: "keep", "usable", or nothing."""
    return "keep" if name == verdict["keep"] else "usable" if name in verdict["usable"] else ""


def table_rows(verdict: Dict[str, Any]) -> List[List[str]]:
    """The table of the screen and of the page: one row a checkpoint."""
    rows = []
    for row in verdict["checkpoints"]:
        cs = f"{row['cs_' + verdict['reduction']]:+.6f}"
        figures = [cs, f"{row['update_norm']:.4g}", f"{row['stable_rank']:.2f}"]
        rows.append([row["name"], str(row["step"]), f"{row['epoch']:.2f}", *figures, mark_of(verdict, row["name"])])
    return rows


def sentence(verdict: Dict[str, Any]) -> str:
    keep = f"Keep {verdict['keep']}. " if verdict["keep"] else ""
    return f"{keep}{verdict['reason']} Certainty: {verdict['certainty']}."


def print_verdict(verdict: Dict[str, Any]) -> None:
    lines = [list(HEAD), *table_rows(verdict)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    for name, problem in verdict["not_judged"].items():
        print(f"not judged: {name}: {problem}")
    if verdict["left_out"]:
        print(verdict["left_out"])
    print(f"\n{verdict['rule']}, window {verdict['window']}: {sentence(verdict)}")


def write_page(path: Path, verdict: Dict[str, Any], history: History, decision: Optional[Decision]) -> None:
    """The report page of cs_replay, with the table of the checkpoints."""
    tables: List[Tuple[str, Sequence[str], Sequence[Any]]] = [("Checkpoints", HEAD, table_rows(verdict))]
    if verdict["not_judged"]:
        tables.append(("Not judged", ("file", "why"), list(verdict["not_judged"].items())))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / HISTORY_NAME
        lines = [history.header, *history.records, *[event for event in history.events if "heldout_loss" in event]]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        write_report(path, file, verdict=sentence(verdict), title="Saved adapters", decision=decision, tables=tables)
