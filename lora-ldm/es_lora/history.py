"""cs_history.jsonl: its names, reading it, and deciding a recorded run again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from es_lora.rules import DEFAULT_RULE, Decision, RuleSettings, StopRule, make_rule
from es_lora.settings import auto_window

HISTORY_NAME = "cs_history.jsonl"
HISTORY_FORMAT = "cs-history/1"


@dataclass
class History:
    """A recorded run: the header, the measurements and the events (evaluations, the turning point)."""

    header: Dict[str, Any]
    records: List[Dict[str, Any]]
    events: List[Dict[str, Any]]

    def heldout(self) -> List[Tuple[int, float]]:
        """(step, held-out loss), from the measurements and from evaluations between them, each step once."""
        points = [(r["step"], r.get("heldout_loss")) for r in [*self.records, *self.events]]
        return sorted({step: loss for step, loss in points if loss is not None}.items())

    def last_step(self) -> int:
        return max((line["step"] for line in [*self.records, *self.events]), default=0)


def read_history(path: Union[str, Path]) -> History:
    """Read a history file, or the one in a folder. A torn last line, which a kill leaves, is passed over.

    Raises FileNotFoundError where there is none; ValueError, with the line number, where it is not a history.
    """
    path = Path(path) / HISTORY_NAME if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no history at {path}; give a {HISTORY_NAME} or the folder of a run with --calculate_cs")
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    parsed: List[Dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                parsed.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # not ended by a line break: it was being written
                break
            raise ValueError(f"{path}, line {number}: {error}; the file is damaged") from error
    if not parsed or parsed[0].get("format") != HISTORY_FORMAT:
        raise ValueError(f"{path}: its first line is no header of the format {HISTORY_FORMAT}")
    body = parsed[1:]
    return History(parsed[0], [r for r in body if "event" not in r], [r for r in body if "event" in r])


def settings_for(history: History, rule: str, window=None, valley=None, component=None, value=None):
    """(rule name, RuleSettings) for a replay; what is not given is the header's, valley and value where the rule is, too."""
    header = history.header
    recorded = rule in ("recorded", header.get("rule"))
    name = header["rule"] if rule == "recorded" else rule
    interval, per_epoch = header["cs_interval"], header["steps_per_epoch"]
    m = header["window"] if window is None else auto_window(per_epoch, interval) if window == "auto" else int(window)
    n = valley or (header.get("valley", 2) if recorded else 2)
    number = header.get("rule_value") if value is None and recorded else value
    return name, RuleSettings(m, component or header["decided_on"], per_epoch, interval, n, number)


def redecide(history: History, rule: str = DEFAULT_RULE, window=None, valley=None, component=None, value=None) -> Dict[str, Any]:
    """The verdict as one dictionary: rule, window, stopped, stop_step (detection), turning_step (kept), reason."""
    name, settings = settings_for(history, rule, window, valley, component, value)
    decision = replay(make_rule(name, settings), history.records)
    verdict = {"rule": name, "window": settings.window, "stopped": decision is not None}
    if decision is None:
        reason = f"No evidence of overfitting in {len(history.records)} measurements up to step {history.last_step()}."
        return {**verdict, "stop_step": None, "turning_step": None, "reason": reason}
    return {**verdict, "stop_step": decision.detected_step, "turning_step": decision.keep_step, "reason": decision.reason}


def replay(rule: StopRule, records: Sequence[Dict[str, Any]]) -> Optional[Decision]:
    """Re-decide a recorded run. Raises ValueError where the records lack a column that the rule needs."""
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
    return None
