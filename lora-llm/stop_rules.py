"""The rules that decide when to stop: a registry of small classes, replayable on any recorded history.

A rule reads the history line by line: `update(record)` returns a Decision once, None before. It names the columns it
needs (`needs`), how many measurements back the kept weights may lie (`lookback`), and after how many measurements it can
answer at the earliest (`first_answer`). Nothing here knows a model or a trainer. Python 3.8, as cs_fluctuation.py.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type

from cs_fluctuation import Decision, FluctuationSeries

DEFAULT_RULE = "second-valley"


@dataclass(frozen=True)
class RuleSettings:
    """window: M in measurements. component: whose CS decides. steps_per_epoch: optimizer steps. valley: N of nth-valley."""

    window: int
    component: str
    steps_per_epoch: float
    cs_interval: int
    valley: int = 2


class StopRule:
    """Base of all rules: settings, and the empty answers."""

    name = ""
    needs: Tuple[str, ...] = ("cs",)

    def __init__(self, settings: RuleSettings):
        if settings.window < 1 or settings.valley < 1 or settings.cs_interval < 1:
            raise ValueError(
                f"window {settings.window}, valley {settings.valley} and cs_interval {settings.cs_interval}: "
                "all must be at least 1"
            )
        self.settings = settings

    def lookback(self) -> int:
        """How many measurements before the detection the kept weights may lie; 0 where the detection's are kept."""
        return 0

    def first_answer(self) -> int:
        """The number of measurements before which no answer is possible."""
        return 1

    def update(self, record: Dict[str, Any]) -> Optional[Decision]:
        """Take the next history line; the Decision at the measurement that brings it."""
        raise NotImplementedError


class NthValley(StopRule):
    """Stops at the N-th valley of CS-Fluctuation F and keeps the oldest of the last 3M-1 measurements.

    A valley is where the derivative F_k - F_(k-1) turns from below to above zero.
    Source: the paper's method, section 3, with N as `valley`.
    """

    name = "nth-valley"

    def __init__(self, settings: RuleSettings):
        super().__init__(settings)
        self._series = FluctuationSeries(settings.window)
        self._steps: deque = deque(maxlen=self.lookback() + 1)
        self._last_fluctuation: Optional[float] = None  # F_(k-1)
        self._derivatives: List[float] = []  # the first one and the last one
        self._valleys = 0

    def lookback(self) -> int:
        return 3 * self.settings.window - 2

    def first_answer(self) -> int:
        return 3 * self.settings.window - 1 + 2 * self.settings.valley

    def _count(self) -> int:
        """Valleys seen so far; called at a measurement that may have added one, before its derivative is remembered."""
        return self._valleys

    def _which(self) -> str:
        return f"its valley number {self.settings.valley}"

    def update(self, record: Dict[str, Any]) -> Optional[Decision]:
        self._steps.append(record["step"])
        fluctuation = self._series.update(record["cs"][self.settings.component]).fluctuation
        last_fluctuation, self._last_fluctuation = self._last_fluctuation, fluctuation
        if last_fluctuation is None or fluctuation is None:
            return None
        derivative = fluctuation - last_fluctuation
        if self._derivatives and self._derivatives[-1] < 0 < derivative:
            self._valleys += 1
        reached = self._count() >= self.settings.valley
        self._derivatives = [*self._derivatives[:1], derivative]
        if not reached:
            return None
        keep, detected = self._steps[0], record["step"]
        reason = (
            f"CS-Fluctuation of {self.settings.component!r} passed {self._which()} at step {detected}: the direction of the "
            f"update has become steady. The turning point is step {keep}, where that window began."
        )
        return Decision(keep, detected, (keep, detected), reason)


class SecondValley(NthValley):
    """The published rule: the second valley, with the way the published code counts.

    That code scans the whole F series anew at every measurement and starts each scan with the derivative that the scan
    before ended with. A series whose first derivative is positive therefore shows one valley more at its start whenever
    the last derivative was negative, and stops at its first real valley.
    """

    name = "second-valley"

    def __init__(self, settings: RuleSettings):
        super().__init__(settings)
        if settings.valley != 2:
            raise ValueError(f"second-valley counts to 2; for valley {settings.valley} use the rule nth-valley")

    def first_answer(self) -> int:
        return 3 * self.settings.window + 2

    def _count(self) -> int:
        starts_rising = bool(self._derivatives) and self._derivatives[0] > 0 > self._derivatives[-1]
        return self._valleys + int(starts_rising)

    def _which(self) -> str:
        if self._valleys == 2:
            return "its second valley"
        return "its first valley, which the published code counts as the second because the series began by rising,"


RULES: Dict[str, Type[StopRule]] = {rule.name: rule for rule in (SecondValley, NthValley)}


def make_rule(name: str, settings: RuleSettings) -> StopRule:
    """A fresh rule by its registered name. Raises ValueError, naming the rules there are, for another name."""
    if name not in RULES:
        raise ValueError(f"stop rule {name!r} is unknown; choose one of {', '.join(RULES)}")
    return RULES[name](settings)


def replay(rule: StopRule, records: Sequence[Dict[str, Any]]) -> Optional[Decision]:
    """Re-decide a recorded run. Raises ValueError where the records lack a column that the rule needs."""
    for record in records:
        for column in rule.needs:
            if column not in record:
                step = record.get("step")
                raise ValueError(f"rule {rule.name} needs the column {column!r}, and step {step} does not record it")
        if rule.settings.component not in record["cs"]:
            known = ", ".join(record["cs"])
            raise ValueError(f"component {rule.settings.component!r} is not recorded; recorded are {known}")
        decision = rule.update(record)
        if decision is not None:
            return decision
    return None


@dataclass(frozen=True)
class MeasurementPlan:
    """When CS is measured, over which window, and what the person should know before the run starts."""

    cs_interval: int
    window: int
    notices: Tuple[str, ...]


def auto_window(steps_per_epoch: float, cs_interval: int) -> int:
    """M = about one epoch, and at least 5 measurements."""
    return max(5, round(steps_per_epoch / cs_interval))


def plan_measurements(
    rule_name: str,
    component: str,
    steps_per_epoch: float,
    total_steps: int,
    cs_interval: Optional[int] = None,
    window: Optional[int] = None,
    valley: int = 2,
) -> MeasurementPlan:
    """Resolve cs_interval and window (None: automatic) against the run.

    steps_per_epoch, total_steps: completed optimizer steps, everything counted in (repeats, accumulation, processes).
    """
    interval = cs_interval or max(1, round(steps_per_epoch / 10))
    m = window or auto_window(steps_per_epoch, interval)
    rule = make_rule(rule_name, RuleSettings(m, component, steps_per_epoch, interval, valley))
    notices = []
    if m * interval > math.ceil(steps_per_epoch * 1.05):
        notices.append(
            f"The window of {m} measurements every {interval} steps spans {m * interval / steps_per_epoch:.1f} epochs of "
            f"{steps_per_epoch:g} steps."
        )
    if total_steps // interval < rule.first_answer():
        notices.append(
            f"This run is too short for the rule {rule_name} to decide: it answers after {rule.first_answer() * interval} "
            f"steps at the earliest and the budget is {total_steps}. Train longer, or lower --cs_interval or --window_size."
        )
    return MeasurementPlan(interval, m, tuple(notices))
