"""The overview of a run of many jobs: overview.html, overview.json, and the best of each grid."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from es_lora.files import write_text_whole
from es_lora.history import read_history
from es_lora.report import STYLE

WIDTH, HEIGHT = 160, 32  # of a sparkline, in px
OUTCOMES = {
    "stopped_early": "stopped early",
    "budget_reached": "trained to its budget",
    "no_turning_point": "trained to its budget, no turning point",
    "diverged": "diverged",
    "refused": "not trained",
}


def saved_by_stop(result: dict[str, Any]) -> tuple[int, float]:
    """(steps, estimated seconds) saved by an early stop: the rest of the budget, at its pace."""
    if result["outcome"] != "stopped_early":
        return 0, 0.0
    steps = result["total_steps"] - result["last_step"]
    return steps, steps * result["seconds"] / result["last_step"]


def choose(results: Sequence[dict[str, Any]]) -> Optional[tuple[dict[str, Any], str]]:
    """The best job of a grid and the reason, or None where none has weights to keep.

    Where every one was scored on held-out examples: the lowest held-out loss of the kept weights.
    Otherwise by the early-stop verdicts: of those with a turning point, the one that had seen the
    most examples when it came, for it could learn longest before it only memorised. On the tuning
    half of tests/benchmarks/stop_quality that is better than the first to its turning point in four
    of six data sets, and a weak judge all the same. Without any turning point none is chosen."""
    kept = [job for job in results if job["outcome"] in ("stopped_early", "budget_reached", "no_turning_point")]
    scored = {result["name"]: kept_loss(result) for result in kept}
    if kept and all(loss is not None for loss in scored.values()):
        best = min(kept, key=lambda result: scored[result["name"]])
        return best, f"the lowest held-out loss of {len(kept)}, {scored[best['name']]:.4f}"
    turned = [result for result in kept if result["keep_step"] is not None]
    if not turned:
        return None
    best = max(turned, key=_examples_to_turning_point)
    return best, (
        f"of {len(turned)} with a turning point it learnt longest before it, {_examples_to_turning_point(best)} "
        "examples; held-out examples would tell more"
    )


def _examples_to_turning_point(result: dict[str, Any]) -> int:
    return result["keep_step"] * result["settings"]["batch_size"] * result["settings"]["accumulation"]


def kept_loss(result: dict[str, Any]) -> Optional[float]:
    """Held-out loss of the weights that the run is for: the turning point's, else the average at
    the end, else the last."""
    losses = [result["heldout"].get(name) for name in ("kept", "average", "last")]
    return next((loss for loss in losses if loss is not None), None)


def choices(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{group: {"name", "reason"}} of every grid in the results."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if result.get("group"):
            groups.setdefault(result["group"], []).append(result)
    chosen = {}
    for group, members in groups.items():
        best = choose(members)
        reason = "no job of this grid has a turning point; train longer, or give held-out examples"
        chosen[group] = {"name": best[0]["name"], "reason": best[1]} if best else {"name": None, "reason": reason}
    return chosen


def sparkline(values: Sequence[float], mark: Optional[int]) -> str:
    """CS-Fluctuation as an inline SVG on a logarithmic scale; mark: index of the turning point."""
    logs = [math.log10(value) if value > 0 else None for value in values]
    known = [value for value in logs if value is not None]
    if len(known) < 2:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0

    def place(index: int) -> str:
        x = 2 + (WIDTH - 4) * index / (len(logs) - 1)
        return f"{x:.1f},{HEIGHT - 3 - (HEIGHT - 6) * ((logs[index] - low) / span):.1f}"

    points = " ".join(place(index) for index, value in enumerate(logs) if value is not None)
    dot = ""
    if mark is not None and logs[mark] is not None:
        x, y = place(mark).split(",")
        dot = f'<circle cx="{x}" cy="{y}" r="3" fill="#2a7f62"/>'
    line = f'<polyline points="{points}" fill="none" stroke="#2f5d8a" stroke-width="1.5"/>'
    return f'<svg style="width:{WIDTH}px" viewBox="0 0 {WIDTH} {HEIGHT}">{line}{dot}</svg>'


def _spark_of(folder: Path, keep_step: Optional[int]) -> str:
    try:
        history = read_history(folder)
    except (FileNotFoundError, ValueError):
        return ""
    points = [(line["step"], line["fluctuation"]) for line in history.records if line["fluctuation"] is not None]
    after = [index for index, (step, _) in enumerate(points) if keep_step is not None and step >= keep_step]
    return sparkline([value for _, value in points], after[0] if after else None)


def _number(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.4f}"


def _row(folder: Path, result: dict[str, Any], best: set[str]) -> str:
    name = html.escape(result["name"])
    if result["outcome"] == "refused":
        return f'<tr><td>{name}</td><td colspan="9">not trained: {html.escape(result["reason"])}</td></tr>'
    settings, heldout = result["settings"], result["heldout"]
    steps, seconds = saved_by_stop(result)
    kept = f"step {result['files']['kept']['step']}" if "kept" in result["files"] else ""
    has_report = (folder / result["name"] / "report.html").is_file()  # not where a job diverged before it was measured
    cells = [
        (f'<a href="{name}/report.html">{name}</a>' if has_report else name)
        + (" &#9733;" if result["name"] in best else ""),
        f"{settings['rank']}, {settings['learning_rate']:g}",
        OUTCOMES[result["outcome"]],
        kept,
        f"{result['last_step']} of {result['total_steps']}",
        _spark_of(folder / result["name"], result["keep_step"]),
        _number(heldout.get("before")),
        _number(kept_loss(result)),
        f"{result['seconds']:.1f}",
        f"{steps} steps, about {seconds:.1f} s" if steps else "",
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def summary(results: Sequence[dict[str, Any]], seconds: float) -> str:
    """One sentence: how many jobs, how they ended, the time, and what the early stops saved."""
    counts = {words: sum(result["outcome"] == outcome for result in results) for outcome, words in OUTCOMES.items()}
    ends = ", ".join(f"{count} {words}" for words, count in counts.items() if count)
    steps = sum(saved_by_stop(result)[0] for result in results)
    budget = sum(result.get("total_steps", 0) for result in results)
    saved = f" The early stops saved {steps} of {budget} steps." if steps else ""
    return f"{len(results)} job{'s' * (len(results) != 1)}: {ends}, in {seconds:.0f} seconds.{saved}"


def write_overview(
    output_dir: Path, results: Sequence[dict[str, Any]], seconds: float, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write overview.html and overview.json; -> the latter. results: of every job, refused too."""
    chosen = choices(results)
    overview = {"summary": summary(results, seconds), "seconds": round(seconds, 1), "chosen": chosen, **facts}
    listed = [{key: value for key, value in job.items() if key not in ("settings", "versions")} for job in results]
    write_text_whole(output_dir / "overview.json", json.dumps({**overview, "jobs": listed}, indent=2) + "\n")
    head = ["job", "rank, learning rate", "outcome", "kept", "last step", "CS-Fluctuation", "held-out loss before"]
    head += ["held-out loss kept", "seconds", "saved by the stop"]
    best = {choice["name"] for choice in chosen.values()}
    rows = "".join(_row(output_dir, result, best) for result in results)
    sentences = [f"{group}: {one['name'] or 'none chosen'} ({one['reason']})." for group, one in chosen.items()]
    verdict = "<br>".join(html.escape(sentence) for sentence in [overview["summary"], *sentences])
    page = (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>ES-LoRA: {html.escape(output_dir.name)}</title>'
        f"<style>{STYLE} body {{ max-width: 84rem }} svg {{ background: none }}</style>"
        f"<h1>ES-LoRA: many adapters over {html.escape(str(facts['model']))}</h1>"
        f'<p class="verdict">{verdict}</p>'
        f"<table><tr>{''.join(f'<th>{title}</th>' for title in head)}</tr>{rows}</table></html>\n"
    )
    write_text_whole(output_dir / "overview.html", page)
    return {**overview, "jobs": list(results)}
