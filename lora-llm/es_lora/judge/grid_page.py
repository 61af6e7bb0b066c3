"""A grid to choose by: saved adapters by seeds on one page, with the verdict and what was measured.

The room `grid` of a tree draws (pictures, answers); here are the parts that no tree owns."""

import html
import sys
from argparse import ArgumentParser, ArgumentTypeError
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from es_lora.files import read_text, write_text_whole
from es_lora.inputs.bounds import number, whole
from es_lora.inputs.json_text import parsed_json
from es_lora.judge.run_folder import Checkpoint
from es_lora.judge.verdict import mark_of, sentence
from es_lora.outcome import RESULT_NAME
from es_lora.report import html_page, html_table

PAGE_NAME = "grid.html"
BASE_NAME = "no LoRA"
MOST_SEEDS, MOST_STRENGTHS, MOST_SEED, MOST_STRENGTH = 16, 8, 2**31 - 1, 1000
STYLE = """
body { max-width: 84rem } dt { font-weight: 600 } dd { margin: 0 0 .4rem 1rem }
.wide { overflow-x: auto } .wide th[scope=row] { min-width: 9rem; font-weight: 400; font-size: .85rem }
.wide th b { display: block; font-size: .95rem } .wide td { vertical-align: top; padding: .3rem .6rem .3rem 0 }
.wide th { vertical-align: top; position: sticky; left: 0; background: #fbfbfa }
.kept th[scope=row] { border-left: .4rem solid #2a7f62; padding-left: .5rem; background: #eef5f2 }
.wide img { width: 11rem; height: auto; display: block; border-radius: .3rem }
.wide small { color: #667; display: block; max-width: 11rem; overflow-wrap: anywhere }
.answer { white-space: pre-wrap; min-width: 14rem; max-width: 26rem; font-size: .88rem; overflow-wrap: anywhere }
mark { background: #f6dcd5 }
"""


class Figure(NamedTuple):
    """A number that each row has: its name, what it says in a sentence or two, digits shown."""

    name: str
    says: str
    digits: int = 3


@dataclass
class Row:
    """A checkpoint at one strength; the base and the training data are rows without a checkpoint.
    cells: HTML of each prompt's seeds, none for a row that is measured only."""

    name: str
    figures: Dict[str, Optional[float]]
    cells: List[List[str]] = field(default_factory=list)
    checkpoint: Optional[str] = None
    strength: Optional[float] = None


@dataclass
class Grid:
    """Rows by columns (seeds), a table a prompt. notes: sentences on how it was made."""

    prompts: List[str]
    columns: List[str]
    figures: List[Figure]
    rows: List[Row]
    notes: List[str]


def add_grid_flags(parser: ArgumentParser) -> None:
    """The flags of a grid that mean the same for pictures and for answers."""
    group = parser.add_argument_group("grid", "checkpoints by seeds on one page, to choose by")
    add = group.add_argument
    add("--grid", type=Path, metavar="PROMPTS", help="draw what every checkpoint makes of the prompts of this file")
    add("--grid_page", type=Path, help=f"where the page goes, a new file (default: FOLDER/{PAGE_NAME})")
    add("--grid_checkpoints", type=whole(1), default=12, help="draw so many at most, evenly (default: %(default)s)")
    add("--seeds", type=_listed(whole(0, MOST_SEED), MOST_SEEDS), help="of the columns, as 1,2,3")
    strengths = _listed(number(MOST_STRENGTH), MOST_STRENGTHS)
    add("--strength", type=strengths, default=[1.0], help="of the LoRA, as 0.6,1: a row each (default: 1)")
    add("--training_data", help="what the LoRA was trained on (default: what the folder's result.json names)")
    add("--unrelated", help="what it was not trained for: prompts of pictures, or a text of language models")


def _listed(read: Callable[[str], Any], most: int) -> Callable[[str], List[Any]]:
    """A type for argparse: values between commas, each read by `read` and taken once."""

    def values(text: str) -> List[Any]:
        found = list(dict.fromkeys(read(word) for word in text.split(",")))
        if len(found) > most:
            raise ArgumentTypeError(f"{len(found)} values: {most} are the most")
        return found

    return values


def page_of(folder: Path, asked: Optional[Path]) -> Path:
    """Where the page goes. Raises ValueError where something is there."""
    path = asked or folder / PAGE_NAME
    if path.exists():
        raise ValueError(f"{path} is there already: move it, or name another file with --grid_page")
    return path


def trained_on(folder: Path, setting: str) -> Optional[str]:
    """What a run's result.json names as its training data, where that is there; else None."""
    try:
        result = parsed_json(read_text(folder / RESULT_NAME))
        named = result["settings"][setting]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return named if isinstance(named, str) and Path(named).exists() else None


def chosen_checkpoints(checkpoints: Sequence[Checkpoint], keep: Optional[str], most: int) -> List[Checkpoint]:
    """At most `most` of them, evenly spaced, the last one and the kept one among them."""
    if len(checkpoints) <= most:
        return list(checkpoints)
    last = len(checkpoints) - 1
    places = {last} if most == 1 else {round(last * place / (most - 1)) for place in range(most)}
    kept = next((place for place, checkpoint in enumerate(checkpoints) if checkpoint.name == keep), None)
    if kept is not None and kept not in places:
        places.remove(min(places, key=lambda place: abs(place - kept)))
        places.add(kept)
    return [checkpoints[place] for place in sorted(places)]


def picture_cell(data: bytes, kind: str, caption: str) -> str:
    """HTML of a picture. kind: "png" or "jpeg"."""
    label = html.escape(caption)
    return f'<img alt="{label}" src="data:image/{kind};base64,{b64encode(data).decode()}"><small>{label}</small>'


def answer_cell(pieces: Sequence[Tuple[str, bool]], caption: str) -> str:
    """HTML of a text in pieces, those marked that are to be."""
    text = "".join(f"<mark>{html.escape(piece)}</mark>" if mark else html.escape(piece) for piece, mark in pieces)
    return f'<div class="answer">{text or "(empty)"}</div><small>{html.escape(caption)}</small>'


def _shown(figure: Figure, row: Row) -> str:
    value = row.figures.get(figure.name)
    return "-" if value is None else f"{value:.{figure.digits}f}"


def figure_table(grid: Grid, verdict: Dict[str, Any]) -> List[List[str]]:
    """Head and rows of the table of all figures, CS and the mark of the verdict beside them."""
    known = {row["name"]: row for row in verdict["checkpoints"]}
    lines = [["", "step", "epoch", "CS", "verdict", *[figure.name for figure in grid.figures]]]
    for row in grid.rows:
        of = known.get(row.checkpoint or "")
        facts = ["", "", "", ""]
        if of is not None:
            cs = f"{of['cs_' + verdict['reduction']]:+.6f}"
            facts = [str(of["step"]), f"{of['epoch']:.2f}", cs, mark_of(verdict, of["name"])]
        lines.append([row.name, *facts, *[_shown(figure, row) for figure in grid.figures]])
    return lines


def _prompt_table(grid: Grid, number_of_prompt: int, verdict: Dict[str, Any]) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in grid.columns)
    lines = [f"<tr><th></th>{head}</tr>"]
    for row in grid.rows:
        if not row.cells:
            continue
        mark = mark_of(verdict, row.checkpoint) if row.checkpoint else ""
        figures = [f"{figure.name} {_shown(figure, row)}" for figure in grid.figures]
        facts = "<br>".join(html.escape(text) for text in ([mark] if mark else []) + figures)
        cells = "".join(f"<td>{cell}</td>" for cell in row.cells[number_of_prompt])
        kind = ' class="kept"' if mark == "keep" else ""
        lines.append(f'<tr{kind}><th scope="row"><b>{html.escape(row.name)}</b>{facts}</th>{cells}</tr>')
    title = html.escape(grid.prompts[number_of_prompt])
    return f'<h2>{title}</h2><div class="wide"><table>{"".join(lines)}</table></div>'


def grid_html(grid: Grid, verdict: Dict[str, Any]) -> str:
    """The page: verdict, figures and what they say, then a table a prompt."""
    head, *rows = figure_table(grid, verdict)
    parts = [f'<p class="verdict">{html.escape(sentence(verdict))}</p>']
    parts.append(f'<div class="wide">{html_table("Checkpoints", head, rows)}</div>')
    told = "".join(f"<dt>{html.escape(one.name)}</dt><dd>{html.escape(one.says)}</dd>" for one in grid.figures)
    parts.append(f"<dl>{told}</dl>" + "".join(f"<p>{html.escape(note)}</p>" for note in grid.notes))
    parts += [_prompt_table(grid, place, verdict) for place in range(len(grid.prompts))]
    return html_page("Saved adapters side by side", parts, STYLE)


def grid_facts(grid: Grid, page: Path) -> Dict[str, Any]:
    """What --json says of a grid."""
    rows = [{"name": row.name, "checkpoint": row.checkpoint, "strength": row.strength, **row.figures}
            for row in grid.rows]  # fmt: skip
    return {"page": str(page), "figures": {one.name: one.says for one in grid.figures}, "rows": rows}


def write_grid(page: Path, grid: Grid, verdict: Dict[str, Any]) -> None:
    write_text_whole(page, grid_html(grid, verdict))


def print_grid(grid: Grid, page: Path, verdict: Dict[str, Any]) -> None:
    lines = figure_table(grid, verdict)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    print()
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    print("\n".join(["", *grid.notes, f"The grid: {page}"]))


def announce(text: str) -> None:
    """What is said before the drawing begins, beside what goes to the standard output."""
    print(f"judge_checkpoints: {text}", file=sys.stderr)


def announce_rows(drawn: int, of: int, strengths: int, each: str) -> int:
    """Say how much will be made; the number of rows. each: what one row takes, in words."""
    rows = 1 + drawn * strengths
    those = f"{drawn} checkpoints" + (f" of {of} (--grid_checkpoints)" if drawn < of else "")
    by = f" at {strengths} strengths" if strengths > 1 else ""
    announce(f"{rows} rows of {each}: the base, and {those}{by}")
    return rows
