"""cs_history.jsonl: its names, reading it, and deciding a recorded run again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from es_lora.files import read_text
from es_lora.inputs.json_text import parsed_json
from es_lora.rules import DEFAULT_RULE, Decision, RuleSettings, StopRule, make_rule
from es_lora.settings import auto_window

HISTORY_NAME = "cs_history.jsonl"
HISTORY_FORMAT = "cs-history/1"
LARGEST = 1e100  # of a number: sums of its squares are finite
MOST_STEPS = 10**12


@dataclass(frozen=True)
class Kind:
    """What a value may be: in words, and as a question."""

    words: str
    fits: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether it is a number that can be computed with: finite, and not beyond LARGEST."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether it is a whole number from `least` to MOST_STEPS."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST_STEPS


def _are_parts(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(is_number, value.values()))


COUNT = Kind("a whole number from 1 to 10^12", lambda value: is_whole(value, 1))
NUMBER = Kind("a finite number", is_number)
TEXT = Kind("a text", lambda value: isinstance(value, str))
PARTS = Kind("an object of finite numbers, one a component", _are_parts)
HEADER = {  # what deciding again needs
    "cs_interval": COUNT,
    "window": COUNT,
    "steps_per_epoch": Kind("a number from 0.001 to 10^12", lambda value: is_number(value) and 1e-3 <= value <= 1e12),
    "decided_on": TEXT,
    "reduction": Kind("row or matrix", lambda value: value in ("row", "matrix")),
}
MORE_OF_HEADER = {"rule": TEXT, "rule_value": NUMBER, "valley": COUNT}
MEASUREMENT = {"step": COUNT, "cs": PARTS}
_PARTED = ("cs_matrix", "cs_row", "delta_norm", "stable_rank", "update_norm")
_LOSSES = ("loss", "heldout_loss", "heldout_loss_average", "shadow_loss", "shadow_loss_average")
MORE_OF_MEASUREMENT = {
    **dict.fromkeys(_PARTED, PARTS),
    **dict.fromkeys((*_LOSSES, "epoch", "lr", "fluctuation", "grad_evidence"), NUMBER),
}
EVENT = {"step": Kind("a whole number from 0 to 10^12", is_whole)}
MORE_OF_EVENT = dict.fromkeys(("heldout_loss", "heldout_loss_average"), NUMBER)


@dataclass
class History:
    """A recorded run: header, measurements and events (evaluations, the turning point)."""

    header: Dict[str, Any]
    records: List[Dict[str, Any]]
    events: List[Dict[str, Any]]

    def heldout(self, column: str = "heldout_loss") -> List[Tuple[int, float]]:
        """(step, held-out loss), from measurements and evaluations between them, each step once.
        column: heldout_loss_average: of the averaged weights."""
        points = [(r["step"], r.get(column)) for r in [*self.records, *self.events]]
        return sorted({step: loss for step, loss in points if loss is not None}.items())

    def decided_at_end(self) -> bool:
        """Whether the rule decided because the budget ended."""
        return any(event.get("at_end") for event in self.events)

    def last_step(self) -> int:
        return max((line["step"] for line in [*self.records, *self.events]), default=0)


def read_history(path: Union[str, Path]) -> History:
    """Read a history file, or the one in a folder. A torn last line, left by a kill, is skipped.
    Raises FileNotFoundError where there is none, ValueError, with the line, for a bad one."""
    path = Path(path) / HISTORY_NAME if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no history at {path}; give a {HISTORY_NAME} or the folder of a run with --calculate_cs"
        )
    (number, header), *body = _objects(path)
    if header.get("format") != HISTORY_FORMAT:
        raise ValueError(f"{path}: its first line is no header of the format {HISTORY_FORMAT}")
    lacking = [name for name in HEADER if header.get(name) is None]
    if lacking:
        raise ValueError(f"{path}: its header lacks {', '.join(lacking)}; write them into its first line")
    _check(f"{path}, line {number}", header, HEADER, MORE_OF_HEADER)
    records = [(number, line) for number, line in body if "event" not in line]
    events = [(number, line) for number, line in body if "event" in line]
    for number, line in events:
        _check(f"{path}, line {number}", line, EVENT, MORE_OF_EVENT)
    _check_records(path, records)
    return History(header, [line for _, line in records], [line for _, line in events])


def _objects(path: Path) -> List[Tuple[int, Dict[str, Any]]]:
    """(number, object) of every line. Raises ValueError for a damaged one, and where none is."""
    lines = read_text(path).split("\n")
    parsed: List[Tuple[int, Dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        try:
            value = parsed_json(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            if number == len(lines):  # not ended by a line break: it was being written
                break
            raise ValueError(f"{path}, line {number}: {error}; the file is damaged") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: it is no JSON object; the file is damaged")
        if line.strip():
            parsed.append((number, value))
    if not parsed:
        raise ValueError(f"{path} is empty; give a {HISTORY_NAME}, or the folder of a run that has been measured")
    return parsed


def _check(where: str, line: Mapping[str, Any], needed: Mapping[str, Kind], known: Mapping[str, Kind]) -> None:
    """Raises ValueError where a value is missing or of another kind.

    What is `known` may be missing or null.
    """
    for name in needed:
        if name not in line:
            raise ValueError(f"{where}: {json.dumps(line)[:60]} lacks its {name}; the file is damaged")
    for name, kind in {**needed, **known}.items():
        value = line.get(name)
        if not kind.fits(value) and (name in needed or value is not None):
            raise ValueError(f"{where}: {name} is {value!r:.60}, where {kind.words} is needed; the file is damaged")


def _check_records(path: Path, records: Sequence[Tuple[int, Dict[str, Any]]]) -> None:
    """Raises ValueError for a measurement that is none, and where steps or components change."""
    before: Dict[str, Any] = {"step": 0}
    for number, line in records:
        where = f"{path}, line {number}"
        _check(where, line, MEASUREMENT, MORE_OF_MEASUREMENT)
        if line["step"] <= before["step"]:
            raise ValueError(f"{where}: step {line['step']} comes after step {before['step']}; the file is damaged")
        if set(line["cs"]) != set(before.get("cs", line["cs"])):
            raise ValueError(
                f"{where}: cs has the components {', '.join(line['cs'])}, and before {', '.join(before['cs'])}; "
                "the file is damaged"
            )
        before = line


def rule_for(
    history: History,
    rule: str = DEFAULT_RULE,
    *,
    window: Union[int, str, None] = None,
    component: Optional[str] = None,
    value: Optional[float] = None,
) -> StopRule:
    """A fresh rule for a replay. What is not given is the header's; N only with its own rule.

    rule: a name, or "recorded". window: M, or "auto". Raises ValueError for an unknown rule."""
    header = history.header
    if rule == "recorded" and "rule" not in header:
        raise ValueError("the history does not say by which rule it was recorded; name one in place of recorded")
    name = header["rule"] if rule == "recorded" else rule
    interval, per_epoch = header["cs_interval"], header["steps_per_epoch"]
    if window is None:
        window = header["window"]
    m = auto_window(per_epoch, interval) if window == "auto" else int(window)
    if value is None and name == header.get("rule"):
        value = _recorded_value(header)
    averaged = bool(header.get("average"))
    return make_rule(name, RuleSettings(m, component or header["decided_on"], per_epoch, interval, value, averaged))


def _recorded_value(header: Dict[str, Any]) -> Optional[float]:
    """The number of the run's rule. Earlier versions wrote that of nth-valley as `valley`."""
    if header.get("rule_value") is None and header.get("rule") == "nth-valley":
        return header.get("valley")
    return header.get("rule_value")


def redecide(history: History, rule: str = DEFAULT_RULE, *, ended: bool = True, **choices: Any) -> Dict[str, Any]:
    """The verdict: rule, window, stopped, stop_step (detection), turning_step (kept), reason.
    ended: whether no measurement comes any more. choices: as rule_for takes them."""
    deciding = rule_for(history, rule, **choices)
    decision = replay(deciding, history.records, ended)
    verdict = {"rule": deciding.name, "window": deciding.settings.window, "stopped": decision is not None}
    if decision is None:
        reason = f"No evidence of overfitting in {len(history.records)} measurements up to step {history.last_step()}."
        return {**verdict, "stop_step": None, "turning_step": None, "reason": reason}
    steps = {"stop_step": decision.detected_step, "turning_step": decision.keep_step}
    return {**verdict, **steps, "reason": decision.reason}


def replay(rule: StopRule, records: Sequence[Dict[str, Any]], ended: bool = True) -> Optional[Decision]:
    """Re-decide a recorded run. ended: whether no measurement comes any more. Raises ValueError
    where a column that the rule needs is missing."""
    for record in records:
        for column in rule.needs:
            if column not in record:
                step = record.get("step")
                raise ValueError(f"rule {rule.name} needs the column {column!r}, and step {step} does not record it")
        if rule.settings.component not in record.get("cs", {rule.settings.component: None}):
            known = ", ".join(record["cs"])
            raise ValueError(f"component {rule.settings.component!r} is not recorded; recorded are {known}")
        decision = rule.update(record)
        if decision is not None:
            return decision
    return rule.at_end(records[-1]) if records and ended else None
