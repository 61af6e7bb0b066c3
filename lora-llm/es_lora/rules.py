"""The rules that decide when to stop: a registry of small classes, replayable on any history.

A rule reads the history line by line: `update(record)` returns a Decision once, None before. It
names the columns it needs (`needs`), how many measurements back the kept weights may lie
(`lookback`), and after how many measurements it can answer at the earliest (`first_answer`).
Nothing here knows a model or a trainer. Python 3.8, as cs_fluctuation.py."""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple, Type

from cs_fluctuation import FluctuationSeries
from es_lora.gradient_evidence import memorising_evidence

DEFAULT_RULE = "gradient-agreement"
MOST_VALUE = 1_000_000  # of a rule's number: no run has so many epochs or measurements
AVERAGED = "_average"  # ends the name of a column that is measured on averaged weights


@dataclass(frozen=True)
class Decision:
    """A rule's answer: keep_step's weights are kept; those of `usable` (first, last) would do."""

    keep_step: int
    detected_step: int
    usable: Tuple[int, int]
    reason: str  # one plain sentence


@dataclass(frozen=True)
class RuleSettings:
    """window: M in measurements. component: whose CS decides. steps_per_epoch: optimizer steps.

    value: the rule's one number (valleys, epochs, a patience; StopRule.value_help); None: its own.
    averaged: averaged weights are kept, so that losses are read of them."""

    window: int
    component: str
    steps_per_epoch: float
    cs_interval: int
    value: Optional[float] = None
    averaged: bool = False


class StopRule:
    """Base of all rules: settings, reading a column, and the empty answers."""

    name = ""
    needs: Tuple[str, ...] = ("cs",)
    default_value = 0.0  # of the rule's number, where it has one
    value_help = ""  # what the rule's number is; empty where it has none
    uses_window = False  # whether the window M changes its answers

    def __init__(self, settings: RuleSettings):
        if settings.window < 1 or settings.cs_interval < 1:
            raise ValueError(
                f"window {settings.window} and cs_interval {settings.cs_interval}: both must be at least 1"
            )
        value = settings.value
        if value is not None and not self.value_help:
            raise ValueError(f"the rule {self.name} has no number to set (it was given {value:g}); leave it out")
        if value is not None and not 0 < value <= MOST_VALUE:
            bound = f"at most {MOST_VALUE}" if 0 < value < math.inf else "above 0"
            raise ValueError(
                f"the rule {self.name} was given {value:g}; its number, {self.value_help}, must be {bound}"
            )
        self.settings = settings
        self.value = self.default_value if value is None else value

    def lookback(self) -> int:
        """How many measurements before the detection the kept weights may lie; 0 for its own."""
        return 0

    def first_answer(self) -> int:
        """The number of measurements before which no answer is possible."""
        return 1

    def update(self, record: Dict[str, Any]) -> Optional[Decision]:
        """Take the next history line; the Decision at the measurement that brings it."""
        raise NotImplementedError

    def at_end(self, record: Dict[str, Any]) -> Optional[Decision]:
        """The Decision where the last measurement of the budget, `record`, has brought none."""
        return None

    def measurements(self, epochs: float) -> int:
        """So many epochs in measurements, at least 1."""
        return max(1, round(epochs * self.settings.steps_per_epoch / self.settings.cs_interval))

    def epoch(self, step: int) -> float:
        return step / self.settings.steps_per_epoch

    def read(self, record: Dict[str, Any], column: str) -> Optional[float]:
        """A column's value, the deciding component's where it has components; None if null."""
        value = record.get(column)
        return value.get(self.settings.component) if isinstance(value, dict) else value

    def kept_at_detection(self, record: Dict[str, Any], reason: str) -> Decision:
        step = record["step"]
        return Decision(step, step, (step, step), f"{reason} at step {step}.")


class NthValley(StopRule):
    """Stops at the N-th valley of CS-Fluctuation F; keeps the oldest of the last 3M-1 measurements.

    A valley is where the derivative F_k - F_(k-1) turns from below to above zero.
    Source: the paper's method, section 3, with N as its number."""

    name = "nth-valley"
    uses_window = True
    default_value = 2.0
    value_help = "valleys of CS-Fluctuation to count"

    def __init__(self, settings: RuleSettings):
        super().__init__(settings)
        if self.value != int(self.value):
            raise ValueError(f"the rule {self.name} was given {self.value:g}; valleys are counted in whole numbers")
        self.valley = int(self.value)
        self._series = FluctuationSeries(settings.window)
        self._steps: deque = deque(maxlen=self.lookback() + 1)
        self._last_fluctuation: Optional[float] = None  # F_(k-1)
        self._derivatives: List[float] = []  # the first one and the last one
        self._valleys = 0

    def lookback(self) -> int:
        return 3 * self.settings.window - 2

    def first_answer(self) -> int:
        return 3 * self.settings.window - 1 + 2 * self.valley

    def _count(self) -> int:
        """Valleys seen so far; called at a measurement, before its derivative is remembered."""
        return self._valleys

    def _which(self) -> str:
        return f"its valley number {self.valley}"

    def update(self, record: Dict[str, Any]) -> Optional[Decision]:
        self._steps.append(record["step"])
        fluctuation = self._series.update(record["cs"][self.settings.component]).fluctuation
        last_fluctuation, self._last_fluctuation = self._last_fluctuation, fluctuation
        if last_fluctuation is None or fluctuation is None:
            return None
        derivative = fluctuation - last_fluctuation
        if self._derivatives and self._derivatives[-1] < 0 < derivative:
            self._valleys += 1
        reached = self._count() >= self.valley
        self._derivatives = [*self._derivatives[:1], derivative]
        if not reached:
            return None
        keep, detected = self._steps[0], record["step"]
        reason = (
            f"CS-Fluctuation of {self.settings.component!r} passed {self._which()} at step {detected}: the direction "
            f"of the update has become steady. The turning point is step {keep}, where that window began."
        )
        return Decision(keep, detected, (keep, detected), reason)


class SecondValley(NthValley):
    """The published rule: the second valley, with the way the published code counts.

    That code scans the whole F series anew at every measurement and starts each scan with the last
    derivative of the scan before. A series whose first derivative is positive therefore shows one
    valley more whenever that was negative, and stops at its first real valley."""

    name = "second-valley"
    value_help = ""  # it counts to 2

    def first_answer(self) -> int:
        return 3 * self.settings.window + 2

    def _count(self) -> int:
        starts_rising = bool(self._derivatives) and self._derivatives[0] > 0 > self._derivatives[-1]
        return self._valleys + int(starts_rising)

    def _which(self) -> str:
        if self._valleys == 2:
            return "its second valley"
        return "its first valley, which the published code counts as the second because the series began by rising,"


class FixedEpochs(StopRule):
    """Stops after a fixed number of epochs, whatever happens: what other rules have to beat."""

    name = "fixed-epochs"
    needs = ()
    default_value = 2.0
    value_help = "epochs to train"

    def first_answer(self) -> int:
        return self.measurements(self.value)

    def update(self, record: Dict[str, Any]) -> Optional[Decision]:
        if self.epoch(record["step"]) < self.value - 1e-9:
            return None
        return self.kept_at_detection(record, f"The {self.value:g} epochs that the rule fixed-epochs allows were over")


class LowestLoss(StopRule):
    """Keeps the measurement with the lowest loss of a column, once enough later ones were not
    lower, or the training ends. A null is a measurement at which the loss was not taken, and counts
    for nothing. Where averaged weights are kept, it is their loss."""

    column = ""

    def __init__(self, settings: RuleSettings):
        super().__init__(settings)
        if settings.averaged:
            self.column += AVERAGED
            self.needs = (self.column,)
        self._lowest: Optional[Tuple[float, int]] = None  # (loss, step)
        self._since = 0  # losses taken after it

    def is_patient(self, steps: int, losses: int) -> bool:
        """Whether to wait on, so many optimizer steps and so many losses after the lowest one."""
        raise NotImplementedError

    def update(self, record: Dict[str, Any]) -> Optional[Decision]:
        loss, step = self.read(record, self.column), record["step"]
        if loss is None:
            return None
        if self._lowest is None or loss < self._lowest[0]:
            self._lowest, self._since = (loss, step), 0
            return None
        self._since += 1
        if self.is_patient(step - self._lowest[1], self._since):
            return None
        return self._decision(step, "overfitting began there")

    def at_end(self, record: Dict[str, Any]) -> Optional[Decision]:
        return self._decision(record["step"], "the training ends here") if self._since else None

    def _decision(self, step: int, conclusion: str) -> Decision:
        lowest, keep = self._lowest or (math.nan, step)
        reason = (
            f"{self.column} was lowest, {lowest:.4g}, at step {keep} and has not been lower in the {self._since} "
            f"measurements of it up to step {step}: {conclusion}."
        )
        return Decision(keep, step, (keep, step), reason)


class ValidationPatience(LowestLoss):
    """Early stopping on a held-out loss, the usual way: it costs the examples that are held out.
    Source: Prechelt, "Early Stopping - but when?", 1998 (criterion UP)."""

    name = "validation-patience"
    needs = ("heldout_loss",)
    column = "heldout_loss"
    default_value = 3.0
    value_help = "measurements of the held-out loss without a new lowest one"

    def is_patient(self, steps: int, losses: int) -> bool:
        return losses < self.lookback()

    def lookback(self) -> int:
        return max(1, round(self.value))

    def first_answer(self) -> int:
        return 1 + self.lookback()


class Shadow(LowestLoss):
    """Validation without giving up data: mean loss of shadow adapters, each on its left-out fold.

    Stops when nothing lower came for `value` epochs and in FEWEST_LATER losses at least.
    Source: cross-validation as a stopping criterion (Stone 1974), the folds trained beside."""

    name = "shadow"
    needs = ("shadow_loss",)
    column = "shadow_loss"
    default_value = 1.0
    value_help = "epochs without a lower loss of the shadows"
    FEWEST_LATER = 2

    def is_patient(self, steps: int, losses: int) -> bool:
        return losses < self.FEWEST_LATER or self.epoch(steps) < self.value - 1e-9

    def lookback(self) -> int:
        """Enough for scores that lie an epoch apart at most."""
        return self.measurements(max(1.0, self.value) + 1.0)

    def first_answer(self) -> int:
        return 1 + self.measurements(self.value)


class GradientAgreement(StopRule):
    """Stops when different examples no longer agree: the gradients of the last epoch agree no more
    than memorising would make them. Weights at detection, after the first epoch.

    Evidence is 1 plus what the inner products of the gradients in the running means add. Those of
    different examples are what helps an example that was never seen; once they have cancelled, a
    step teaches each example only itself. A language model's example gives the same gradient
    whenever it comes again, and that agreement with itself is no help to others:
    memorising_evidence says how much of it the running means hold (up to 2.16), and the evidence
    has to exceed it. A diffusion model meets its pictures with new noise and timesteps each time,
    so there the bound stays at 1. Nothing in it was fitted to runs. Source: the evidence of
    Mahsereci et al. (gradient-evidence), with this bound in place of a threshold; measured in
    tests/benchmarks/stop_quality."""

    name = "gradient-agreement"
    needs = ("cs", "grad_evidence")

    def first_answer(self) -> int:
        """After the first epoch, over which the means of the evidence first have to fill."""
        return self.measurements(1.0)

    def bound(self, record: Dict[str, Any]) -> float:
        """The evidence that memorising alone would leave at this measurement."""
        comes_again_unchanged = "lm" in record["cs"]
        per_epoch = max(1, round(self.settings.steps_per_epoch))
        return memorising_evidence(record["step"], per_epoch) if comes_again_unchanged else 1.0

    def reason(self, evidence: float, bound: float) -> str:
        agree = "The gradients of different examples no longer agree"
        if self.settings.steps_per_epoch <= 1:  # there may be one example only
            agree = "The gradients agree no more than memorising would make them"
        return f"{agree} (evidence {evidence:.3g}; memorising alone leaves {bound:.3g})"

    def update(self, record: Dict[str, Any]) -> Optional[Decision]:
        evidence, bound = self.read(record, "grad_evidence"), self.bound(record)
        if evidence is None or self.epoch(record["step"]) < 1 or evidence >= bound:
            return None
        return self.kept_at_detection(record, self.reason(evidence, bound))


RULES: Dict[str, Type[StopRule]] = {
    rule.name: rule for rule in (SecondValley, NthValley, GradientAgreement, FixedEpochs, ValidationPatience, Shadow)
}
# Rules of earlier versions that lost by the project's tables: see tests/benchmarks/stop_quality.
MOVED_RULES = ("cs-fall", "cs-trough", "update-norm-plateau", "objective-variance", "gradient-evidence")


def make_rule(name: str, settings: RuleSettings) -> StopRule:
    """A fresh rule by its registered name. Raises ValueError, naming all, for another name."""
    if name not in RULES and name in MOVED_RULES:
        raise ValueError(
            f"stop rule {name!r} is a baseline of tests/benchmarks/stop_quality now, since others decide better; "
            f"choose one of {', '.join(RULES)}"
        )
    if name not in RULES:
        raise ValueError(f"stop rule {name!r} is unknown; choose one of {', '.join(RULES)}")
    return RULES[name](settings)


def check_rule(name: str, value: Optional[float] = None) -> None:
    """Raises ValueError where there is no such rule, or it does not take this number."""
    make_rule(name, RuleSettings(1, "", 1, 1, value))


def value_of_valley(rule: str, valley: int) -> Optional[float]:
    """The number that `--valley N` gives a rule: that of nth-valley. N = 2 asks nothing of the
    others. Raises ValueError for N below 1, and for another N where the rule counts no valleys."""
    if valley < 1:
        raise ValueError("must be at least 1")
    if rule == NthValley.name:
        return float(valley)
    if valley == 2:
        return None
    raise ValueError(f"the rule {rule} counts no valleys (it was given {valley}); use the rule nth-valley")
