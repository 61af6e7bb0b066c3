"""The settings of early stopping, and the plan of a run that is made of them."""

import math
from dataclasses import dataclass
from typing import Optional, Tuple

from es_lora.rules import RuleSettings, StopRule, make_rule


@dataclass(frozen=True)
class MeasurementPlan:
    """By which rule a run is decided, when CS is measured, and what the person should know before the run starts."""

    rule_name: str
    settings: RuleSettings
    notices: Tuple[str, ...]

    @property
    def cs_interval(self) -> int:
        return self.settings.cs_interval

    @property
    def window(self) -> int:
        return self.settings.window

    def rule(self) -> StopRule:
        """A fresh rule."""
        return make_rule(self.rule_name, self.settings)


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
    value: Optional[float] = None,
) -> MeasurementPlan:
    """Resolve cs_interval and window (None: automatic) against the run.

    steps_per_epoch, total_steps: completed optimizer steps, everything counted in (repeats, accumulation, processes).
    """
    interval = cs_interval or max(1, round(steps_per_epoch / 10))
    m = window or auto_window(steps_per_epoch, interval)
    settings = RuleSettings(m, component, steps_per_epoch, interval, valley, value)
    rule, notices = make_rule(rule_name, settings), []
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
    return MeasurementPlan(rule_name, settings, tuple(notices))
