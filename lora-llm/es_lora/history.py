"""cs_history.jsonl: its names, reading it, and deciding a recorded run again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from es_lora.files import read_text
from es_lora.rules import DEFAULT_RULE, Decision, RuleSettings, StopRule, make_rule
from es_lora.settings import auto_window

HISTORY_NAME = "cs_history.jsonl"
HISTORY_FORMAT = "cs-history/1"
HEADER_FIELDS = ("cs_interval", "window", "steps_per_epoch", "decided_on")  # what deciding again needs


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
    lines = read_text(path).split("\n")
    parsed: List[Dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                parsed.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # not ended by a line break: it was being written
                break
            raise ValueError(f"{path}, line {number}: {error}; the file is damaged") from error
    _check_lines(path, parsed)
    body = parsed[1:]
    return History(parsed[0], [r for r in body if "event" not in r], [r for r in body if "event" in r])


def _check_lines(path: Path, parsed: Sequence[Any]) -> None:
    """Raises ValueError where a line is no object, or header or lines lack what readers need."""
    if not all(isinstance(line, dict) for line in parsed):
        raise ValueError(f"{path}: a line is no JSON object; the file is damaged")
    if not parsed or parsed[0].get("format") != HISTORY_FORMAT:
        raise ValueError(f"{path}: its first line is no header of the format {HISTORY_FORMAT}")
    lacking = [name for name in HEADER_FIELDS if parsed[0].get(name) is None]
    if lacking:
        raise ValueError(f"{path}: its header lacks {', '.join(lacking)}; write them into its first line")
    for line in parsed[1:]:
        if "step" not in line:
            raise ValueError(f"{path}: the line {json.dumps(line)[:60]} lacks its step; the file is damaged")


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
