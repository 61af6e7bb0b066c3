"""The picture of a run, and its report page."""

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from cs_fluctuation import FluctuationSeries
from es_lora.command_line import without_secret_flags
from es_lora.files import write_text_whole
from es_lora.history import History, read_history, redecide, rule_for
from es_lora.rules import AVERAGED, RULES, Decision, GradientAgreement

COLOURS = {"train": "#8a8f98", "heldout": "#c8553d", "kept": "#2a7f62", "detected": "#b58a00", "lines": "#2f5d8a"}


Points = List[Tuple[int, float]]
Line = Tuple[Points, str, Dict[str, Any]]


@dataclass
class Panel:
    """One set of axes of the figure: its subject, its scale, its lines (points, label, style)."""

    title: str
    lines: List[Line]
    logarithmic: bool = False

    def draw(self, axis: Any) -> None:
        for points, label, style in self.lines:
            if points:
                axis.plot(*zip(*points), label=label, **style)
        axis.set_ylabel(self.title)
        if self.logarithmic:
            axis.set_yscale("log")


def _column(history: History, name: str) -> Points:
    return [(record["step"], record[name]) for record in history.records if record.get(name) is not None]


def _losses(history: History) -> Panel:
    training = _column(history, "loss"), "training loss", {"color": COLOURS["train"]}
    heldout = history.heldout(), "held-out loss", {"color": COLOURS["heldout"], "marker": "."}
    style, dashed = {"color": COLOURS["lines"], "marker": "."}, {"linestyle": "--"}
    lines = [training, heldout, (_column(history, "shadow_loss"), "shadows' loss on their folds", style)]
    averaged = history.heldout("heldout_loss" + AVERAGED), "held-out loss, averaged", {**heldout[2], **dashed}
    shadows = _column(history, "shadow_loss" + AVERAGED), "averaged shadows' loss on their folds", {**style, **dashed}
    return Panel("loss", [*lines, averaged, shadows])


def _cosines(history: History, component: str) -> Panel:
    parts = [name for name in history.records[0]["cs"] if name != "all" or len(history.records[0]["cs"]) > 2]
    lines = []
    for index, name in enumerate(parts):
        points = [(record["step"], record["cs"][name]) for record in history.records if name in record["cs"]]
        colour, width = (COLOURS["lines"], 2) if name == component else (f"C{index + 3}", 1)
        style = {"color": colour, "linewidth": width}
        lines.append((points, f"{name} ({history.header['reduction']})", style))
    return Panel("CS (cosine similarity)", lines)


def _valleys(points: Points) -> Points:
    values = [value for _, value in points]
    return [points[i] for i in range(1, len(values) - 1) if values[i] < values[i - 1] and values[i] < values[i + 1]]


def _fluctuation(history: History, window: int, component: str) -> Panel:
    series = FluctuationSeries(window)
    known = [(r["step"], series.update(r["cs"][component]).fluctuation) for r in history.records]
    points = [(step, value) for step, value in known if value]  # the axis is logarithmic: no zeros
    valleys = {"color": COLOURS["heldout"], "marker": "v", "linestyle": "none"}
    label = f"CS-Fluctuation of {component}, M = {window}"
    lines = [(points, label, {"color": COLOURS["lines"]}), (_valleys(points), "valley", valleys)]
    return Panel("CS-Fluctuation", lines, logarithmic=True)


def _evidence(history: History) -> Panel:
    """Gradient evidence, and the bound under which the rule gradient-agreement stops."""
    evidence = _column(history, "grad_evidence")
    rule = GradientAgreement(rule_for(history, GradientAgreement.name).settings)
    bound = [(record["step"], rule.bound(record)) for record in history.records] if evidence else []
    thin = {"color": "black", "linewidth": 1}
    lines: List[Line] = [
        (evidence, "gradient evidence", {"color": COLOURS["lines"]}),
        (bound, "what memorising alone leaves", thin),
    ]
    return Panel("gradient evidence", lines, logarithmic=True)


def draw(history: History, decision: Optional[Decision], window: int, component: str) -> Any:
    """The figure of a run: losses, CS by component, CS-Fluctuation with its valleys, gradient
    evidence, and the steps that matter. A panel without values is left out."""
    from matplotlib.figure import Figure

    panels = [_losses(history), _cosines(history, component), _fluctuation(history, window, component)]
    panels = [panel for panel in [*panels, _evidence(history)] if any(points for points, _, _ in panel.lines)]
    figure = Figure(figsize=(9, 1 + 2.4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for panel, axis in zip(panels, axes):
        panel.draw(axis)
        _mark_steps(axis, history, decision, named=axis is axes[0])
    axes[-1].set_xlabel("step")
    per_epoch = history.header.get("steps_per_epoch")
    if per_epoch:
        epochs = axes[0].secondary_xaxis("top", functions=(lambda s: s / per_epoch, lambda e: e * per_epoch))
        epochs.set_xlabel("epoch")
    return figure


def _mark_steps(axis: Any, history: History, decision: Optional[Decision], named: bool) -> None:
    """Lines at the turning point, the detection and the last step; named: in the legend too."""
    steps = []
    if decision is not None:
        steps.append((decision.keep_step, "turning point", COLOURS["kept"], "-"))
        steps.append((decision.detected_step, "detected", COLOURS["detected"], "--"))
        axis.axvspan(*decision.usable, color=COLOURS["kept"], alpha=0.07)
    if decision is None or history.last_step() != decision.detected_step:
        steps.append((history.last_step(), "last", "black", ":"))
    for step, name, colour, dashes in steps:
        label = f"{name}: step {step}" if named else None
        axis.axvline(step, color=colour, linestyle=dashes, linewidth=1.8, label=label)
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _picture(history: History, decision: Optional[Decision], window: int, component: str) -> str:
    """The figure as inline SVG, or a sentence where matplotlib or a measurement is missing."""
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
table { border-collapse: collapse }
td, th { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #ddd }
td { font-variant-numeric: tabular-nums } svg { width: 100%; height: auto; background: white }
figure { display: inline-block; vertical-align: top; width: 12rem; margin: .4rem } img { width: 100% }
figcaption { font-size: .8rem }
"""


def html_page(title: str, parts: Sequence[str], style: str = "") -> str:
    """One self-contained page of HTML parts. style: further CSS."""
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"{meta}<title>{html.escape(title)}</title><style>{STYLE}{style}</style>"
    body = "".join([f"<h1>{html.escape(title)}</h1>", *parts])
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'


def html_table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cells(values: Sequence[Any], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<h2>{html.escape(title)}</h2><table><tr>{cells(head, 'th')}</tr>{body}</table>"


def _redecided_rows(history: History) -> List[List[Any]]:
    """What every rule makes of the run; those with windows also with half and twice the window."""
    m, rows = history.header["window"], []
    for name, rule in RULES.items():
        missing = [column for column in rule.needs if any(column not in record for record in history.records)]
        for window in sorted({max(1, m // 2), m, 2 * m}) if rule.uses_window else [m]:
            if missing:
                rows.append([name, "", f"needs {', '.join(missing)}", ""])
                continue
            verdict = redecide(history, name, window=window)
            kept = "had not decided when the run ended"
            if verdict["stopped"]:
                kept = f"keeps step {verdict['turning_step']}"
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
    """Write one self-contained HTML page: verdict, curves, tables, a grid of images, settings.

    verdict: one sentence. tables: (title, head, rows). images: (caption, PNG file)."""
    history = read_history(history_path)
    header = history.header
    parts = [f'<p class="verdict">{html.escape(verdict)}</p>']
    parts.append(_picture(history, decision, header["window"], header["decided_on"]))
    parts += [html_table(*table) for table in tables]
    if images:
        parts.append("<h2>Pictures</h2>")
    for caption, file in images:
        data = base64.b64encode(Path(file).read_bytes()).decode("ascii")
        label = html.escape(caption)
        picture = f'<img alt="{label}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{picture}<figcaption>{label}</figcaption></figure>")
    if history.records:
        head = ["rule", "window M", "verdict", "detected at step"]
        parts.append(html_table("The same run under other rules and windows", head, _redecided_rows(history)))
    facts = {**{key: value for key, value in header.items() if key != "format"}, **without_secret_flags(settings or {})}
    parts.append(html_table("Settings", ["setting", "value"], sorted(facts.items(), key=lambda item: item[0])))
    write_text_whole(Path(path), html_page(title, parts))
