"""The picture of a run, and its report page."""

import base64
import html
import io
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from cs_fluctuation import FluctuationSeries
from es_lora.files import write_text_whole
from es_lora.history import History, read_history, redecide, rule_for
from es_lora.rules import RULES, Decision

COLOURS = {"train": "#8a8f98", "heldout": "#c8553d", "kept": "#2a7f62", "detected": "#b58a00", "lines": "#2f5d8a"}


def _valleys(fluctuation: Sequence[Tuple[int, float]]) -> List[Tuple[int, float]]:
    values = [value for _, value in fluctuation]
    return [fluctuation[i] for i in range(1, len(values) - 1) if values[i] < values[i - 1] and values[i] < values[i + 1]]


def _fluctuation(history: History, window: int, component: str) -> List[Tuple[int, float]]:
    series = FluctuationSeries(window)
    points = [(r["step"], series.update(r["cs"][component]).fluctuation) for r in history.records]
    return [(step, value) for step, value in points if value]  # the axis is logarithmic: no zeros


def draw(history: History, decision: Optional[Decision], window: int, component: str):
    """The figure of a run: losses, CS by component, CS-Fluctuation with its valleys, gradient evidence where it is recorded,
    and the steps that matter."""
    from matplotlib.figure import Figure

    evidence = [(r["step"], r["grad_evidence"]) for r in history.records if r.get("grad_evidence") is not None]
    figure = Figure(figsize=(9, 10.6 if evidence else 8.2), layout="constrained")
    axes = figure.subplots(4 if evidence else 3, 1, sharex=True)
    loss_axis, cs_axis, fluctuation_axis = axes[:3]
    train = [(r["step"], r["loss"]) for r in history.records if r.get("loss") is not None]
    if train:
        loss_axis.plot(*zip(*train), color=COLOURS["train"], label="training loss")
    if history.heldout():
        loss_axis.plot(*zip(*history.heldout()), color=COLOURS["heldout"], marker=".", label="held-out loss")
    shadows = [(r["step"], r["shadow_loss"]) for r in history.records if r.get("shadow_loss") is not None]
    if shadows:
        loss_axis.plot(*zip(*shadows), color=COLOURS["lines"], marker=".", label="shadows' loss on their folds")
    loss_axis.set_ylabel("loss")
    components = [name for name in history.records[0]["cs"] if name != "all" or len(history.records[0]["cs"]) > 2]
    for index, name in enumerate(components):
        points = [(r["step"], r["cs"][name]) for r in history.records if name in r["cs"]]
        colour, width = (COLOURS["lines"], 2) if name == component else (f"C{index + 3}", 1)
        cs_axis.plot(*zip(*points), label=f"{name} ({history.header['reduction']})", color=colour, linewidth=width)
    cs_axis.set_ylabel("CS (cosine similarity)")
    fluctuation = _fluctuation(history, window, component)
    if fluctuation:
        label = f"CS-Fluctuation of {component}, M = {window}"
        fluctuation_axis.plot(*zip(*fluctuation), color=COLOURS["lines"], label=label)
        fluctuation_axis.set_yscale("log")
        if _valleys(fluctuation):
            fluctuation_axis.plot(*zip(*_valleys(fluctuation)), "v", color=COLOURS["heldout"], label="valley")
    fluctuation_axis.set_ylabel("CS-Fluctuation")
    if evidence:
        _draw_evidence(axes[3], history, evidence)
    axes[-1].set_xlabel("step")
    steps = []
    if decision is not None:
        steps.append((decision.keep_step, "turning point", COLOURS["kept"], "-"))
        steps.append((decision.detected_step, "detected", COLOURS["detected"], "--"))
    if decision is None or history.last_step() != decision.detected_step:
        steps.append((history.last_step(), "last", "black", ":"))
    for axis in axes:
        for step, name, colour, dashes in steps:
            label = f"{name}: step {step}" if axis is loss_axis else None
            axis.axvline(step, color=colour, linestyle=dashes, linewidth=1.8, label=label)
        if decision is not None:
            axis.axvspan(*decision.usable, color=COLOURS["kept"], alpha=0.07)
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    per_epoch = history.header.get("steps_per_epoch")
    if per_epoch:
        epochs = loss_axis.secondary_xaxis("top", functions=(lambda s: s / per_epoch, lambda e: e * per_epoch))
        epochs.set_xlabel("epoch")
    return figure


def _draw_evidence(axis, history: History, evidence: Sequence[Tuple[int, float]]) -> None:
    """Gradient evidence, and the bound under which the rule gradient-agreement stops."""
    rule = rule_for(history, "gradient-agreement")
    axis.plot(*zip(*evidence), color=COLOURS["lines"], label="gradient evidence")
    bound = [(record["step"], rule.bound(record)) for record in history.records]
    axis.plot(*zip(*bound), color="black", linewidth=1, label="what memorising alone leaves")
    axis.set_yscale("log")
    axis.set_ylabel("gradient evidence")


def _picture(history: History, decision: Optional[Decision], window: int, component: str) -> str:
    """The figure as inline SVG, or a sentence where matplotlib is not installed or nothing was measured."""
    if not history.records:
        return "<p>Nothing was measured, so there is nothing to draw.</p>"
    try:
        figure = draw(history, decision, window, component)
    except ImportError:
        return "<p>The picture needs matplotlib: install it and run <code>cs_replay.py</code> on the history.</p>"
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2126; background: #fbfbfa }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.verdict { border-left: .4rem solid #2a7f62; background: #eef5f2; padding: .8rem 1rem; font-size: 1.1rem }
table { border-collapse: collapse } td, th { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #ddd }
td { font-variant-numeric: tabular-nums } svg { width: 100%; height: auto; background: white }
figure { display: inline-block; vertical-align: top; width: 12rem; margin: .4rem } img { width: 100% }
figcaption { font-size: .8rem }
"""


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cells(values, tag):
        return "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<h2>{html.escape(title)}</h2><table><tr>{cells(head, 'th')}</tr>{body}</table>"


def _redecided_rows(history: History) -> List[List[Any]]:
    """What every rule makes of the run; those that look at windows also with half and twice the window."""
    m, rows = history.header["window"], []
    for name, rule in RULES.items():
        missing = [column for column in rule.needs if column not in history.records[0]]
        for window in sorted({max(1, m // 2), m, 2 * m}) if rule.uses_window else [m]:
            if missing:
                rows.append([name, "", f"needs {', '.join(missing)}", ""])
                continue
            verdict = redecide(history, name, window=window)
            kept = "does not stop" if not verdict["stopped"] else f"keeps step {verdict['turning_step']}"
            rows.append([name, window if rule.uses_window else "", kept, verdict["stop_step"] or ""])
    return rows


def write_report(
    path: Union[str, Path],
    history_path: Union[str, Path],
    *,
    verdict: str,
    title: str = "ES-LoRA run",
    decision: Optional[Decision] = None,
    settings: Optional[Dict[str, Any]] = None,
    tables: Sequence[Tuple[str, Sequence[str], Sequence[Sequence[Any]]]] = (),
    images: Sequence[Tuple[str, Union[str, Path]]] = (),
) -> None:
    """Write one self-contained HTML page: the verdict, the curves, tables, images in a grid, the settings.

    verdict: one sentence. tables: (title, head, rows). images: (caption, PNG file). The page appears whole or not at all.
    """
    history = read_history(history_path)
    header = history.header
    parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="verdict">{html.escape(verdict)}</p>']
    parts.append(_picture(history, decision, header["window"], header["decided_on"]))
    parts += [_table(*table) for table in tables]
    if images:
        parts.append("<h2>Pictures</h2>")
    for caption, file in images:
        data = base64.b64encode(Path(file).read_bytes()).decode("ascii")
        label = html.escape(caption)
        picture = f'<img alt="{label}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{picture}<figcaption>{label}</figcaption></figure>")
    if history.records:
        head = ["rule", "window M", "verdict", "detected at step"]
        parts.append(_table("The same run under other rules and windows", head, _redecided_rows(history)))
    facts = {**{key: value for key, value in header.items() if key != "format"}, **(settings or {})}
    parts.append(_table("Settings", ["setting", "value"], sorted(facts.items(), key=lambda item: item[0])))
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"{meta}<title>{html.escape(title)}</title><style>{STYLE}</style>"
    body = "".join(parts)
    write_text_whole(Path(path), f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>')
