"""The rules that decide when to stop: a registry of small classes, replayable on any recorded history.

A rule reads the history line by line: `update(record)` returns a Decision once, None before. It names the columns it
needs (`needs`), how many measurements back the kept weights may lie (`lookback`), and after how many measurements it can
answer at the earliest (`first_answer`). Nothing here knows a model or a trainer. Python 3.8, as cs_fluctuation.py.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type

from cs_fluctuation import FluctuationSeries
from es_lora.gradient_evidence import memorising_evidence

DEFAULT_RULE = "gradient-agreement"


@dataclass(frozen=True)
class Decision:
    """A rule's answer: the weights of keep_step are the result, and those of the steps in `usable` (first, last) would do."""

    keep_step: int
    detected_step: int
    usable: Tuple[int, int]
    reason: str  # one plain sentence


@dataclass(frozen=True)
class RuleSettings:
    """window: M in measurements. component: whose CS decides. steps_per_epoch: optimizer steps. valley: N of nth-valley.
    value: the one number of the other rules (epochs, a patience, a threshold; StopRule.value_help); None: the rule's own."""

    window: int
    component: str
    steps_per_epoch: float
    cs_interval: int
    valley: int = 2
    value: Optional[float] = None


class StopRule:
    """Base of all rules: settings, reading a column, and the empty answers."""

    name = ""
    needs: Tuple[str, ...] = ("cs",)
    default_value: Optional[float] = None
    value_help = ""  # what the rule's number is; empty where it has none
    uses_window = False  # whether the window M changes its answers
    counts_valleys = False

    def __init__(self, settings: RuleSettings):
        if settings.window < 1 or settings.valley < 1 or settings.cs_interval < 1:
            raise ValueError(
                f"window {settings.window}, valley {settings.valley} and cs_interval {settings.cs_interval}: "
                "all must be at least 1"
            )
        if settings.valley != 2 and not self.counts_valleys:
            raise ValueError(f"the rule {self.name} counts no valleys (it was given {settings.valley}); use the rule nth-valley")
        if settings.value is not None and not self.value_help:
            raise ValueError(f"the rule {self.name} has no number to set (it was given {settings.value:g}); leave it out")
        if settings.value is not None and not (math.isfinite(settings.value) and settings.value > 0):
            raise ValueError(f"the rule {self.name} was given {settings.value:g}; its number, {self.value_help}, must be above 0")
        self.settings = settings
        self.value = self.default_value if settings.value is None else settings.value

    def lookback(self) -> int:
        """How many measurements before the detection the kept weights may lie; 0 where the detection's are kept."""
        return 0

    def first_answer(self) -> int:
        """The number of measurements before which no answer is possible."""
        return 1

    def update(self, record: Dict[str, Any]) -> Optional[Decision]:
        """Take the next history line; the Decision at the measurement that brings it."""
        raise NotImplementedError

    def measurements(self, epochs: float) -> int:
        """So many epochs in measurements, at least 1."""
        return max(1, round(epochs * self.settings.steps_per_epoch / self.settings.cs_interval))

    def epoch(self, step: int) -> float:
        return step / self.settings.steps_per_epoch

    def read(self, record: Dict[str, Any], column: str) -> Optional[float]:
        """A column's value, of the component that decides where it has components; None where it is null."""
        value = record.get(column)
        return value.get(self.settings.component) if isinstance(value, dict) else value

    def kept_at_detection(self, record: Dict[str, Any], reason: str) -> Decision:
        step = record["step"]
        return Decision(step, step, (step, step), f"{reason} at step {step}.")


class RunningMean:
    """The mean of the last `count` values; None before there are so many."""

    def __init__(self, count: int):
        self._values: deque = deque(maxlen=max(1, count))

    def update(self, value: float) -> Optional[float]:
        self._values.append(value)
        return math.fsum(self._values) / len(self._values) if len(self._values) == self._values.maxlen else None


class NthValley(StopRule):
    """Stops at the N-th valley of CS-Fluctuation F and keeps the oldest of the last 3M-1 measurements.

    A valley is where the derivative F_k - F_(k-1) turns from below to above zero.
    Source: the paper's method, section 3, with N as `valley`.
    """

    name = "nth-valley"
    uses_window = counts_valleys = True

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


class FixedEpochs(StopRule):
    """Stops after a fixed number of epochs, whatever the run does: what the other rules have to beat."""

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
    """Keeps the measurement with the lowest loss of a column, once enough later ones were not lower.

    A null is a measurement at which the loss was not taken, and counts for nothing.
    """

    column = ""

    def __init__(self, settings: RuleSettings):
        super().__init__(settings)
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
        lowest, keep = self._lowest
        if self.is_patient(step - keep, self._since):
            return None
        reason = (
            f"{self.column} was lowest, {lowest:.4g}, at step {keep} and has not been lower in the {self._since} "
            f"measurements of it up to step {step}: overfitting began there."
        )
        return Decision(keep, step, (keep, step), reason)


class ValidationPatience(LowestLoss):
    """Early stopping on a held-out loss, the usual way: it costs the examples that are held out.

    Source: Prechelt, "Early Stopping - but when?", 1998 (criterion UP).
    """

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
    """Validation without giving up data: the mean loss of small shadow adapters, each on the fold it was not trained on.

    Stops when nothing lower came for `value` epochs and in FEWEST_LATER losses at least: shadows may be scored seldom.
    Source: cross-validation as a stopping criterion (Stone 1974), with the folds' adapters trained beside the one that is
    kept.
    """

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


class ObjectiveVariance(StopRule):
    """Stops when the loss of a fixed batch with fixed noise has stopped moving: the variance of its last 50 measurements
    falls below `value` times the variance of all. Weights at detection.

    Source: DVAR, "Is This Loss Informative? Faster Text-to-Image Customization by Tracking Objective Dynamics",
    NeurIPS 2023.
    """

    name = "objective-variance"
    needs = ("probe_loss",)
    default_value = 0.15
    value_help = "share of the whole variance below which the recent one counts as still"
    LAST = 50

    def __init__(self, settings: RuleSettings):
        super().__init__(settings)
        self._losses: List[float] = []

    def first_answer(self) -> int:
        return self.LAST + 1

    def update(self, record: Dict[str, Any]) -> Optional[Decision]:
        loss = self.read(record, "probe_loss")
        if loss is None:
            return None
        self._losses.append(loss)
        if len(self._losses) <= self.LAST:
            return None
        recent, whole = variance(self._losses[-self.LAST :]), variance(self._losses)
        if recent >= self.value * whole:
            return None
        return self.kept_at_detection(record, f"The loss of the fixed batch moves less than {self.value:g} of its range before")


def variance(values: Sequence[float]) -> float:
    """Population variance."""
    centre = math.fsum(values) / len(values)
    return math.fsum((value - centre) ** 2 for value in values) / len(values)


class CsFall(StopRule):
    """Stops when the magnitude of the row cosine has fallen to `value` of its highest so far, averaged over a quarter of an
    epoch. Weights at detection. Source: this project's measurements on language models (tests/benchmarks/stop_quality).
    """

    name = "cs-fall"
    needs = ("cs_row",)
    default_value = 0.8
    value_help = "share of the highest |CS| at which it counts as fallen"
    SMOOTHING_EPOCHS = 0.25

    def __init__(self, settings: RuleSettings):
        super().__init__(settings)
        self._mean = RunningMean(self.measurements(self.SMOOTHING_EPOCHS))
        self._extreme = 0.0

    def first_answer(self) -> int:
        return self.measurements(self.SMOOTHING_EPOCHS) + 1

    def depth(self, cs: float) -> float:
        """How far CS has moved in the direction that is watched; the rule waits for its return."""
        return abs(cs)

    def update(self, record: Dict[str, Any]) -> Optional[Decision]:
        cs = self.read(record, "cs_row")
        mean = None if cs is None else self._mean.update(cs)
        if mean is None:
            return None
        depth = self.depth(mean)
        self._extreme = max(self._extreme, depth)
        if self._extreme == 0 or depth > self.value * self._extreme:
            return None
        return self.kept_at_detection(record, f"CS has come back to {self.value:g} of its extreme")


class CsTrough(CsFall):
    """Stops when the signed row cosine, averaged over half an epoch, has passed its trough below zero and come back to
    `value` of it. Weights at detection. Source: as cs-fall.
    """

    name = "cs-trough"
    default_value = 0.8
    value_help = "share of the deepest negative CS at which it counts as come back"
    SMOOTHING_EPOCHS = 0.5

    def depth(self, cs: float) -> float:
        return max(0.0, -cs)


class EvidenceBelowBound(StopRule):
    """Stops where grad_evidence is below a bound, after the first epoch, over which its means first have to fill."""

    def first_answer(self) -> int:
        return self.measurements(1.0)

    def bound(self, record: Dict[str, Any]) -> float:
        raise NotImplementedError

    def reason(self, evidence: float, bound: float) -> str:
        raise NotImplementedError

    def update(self, record: Dict[str, Any]) -> Optional[Decision]:
        evidence, bound = self.read(record, "grad_evidence"), self.bound(record)
        if evidence is None or self.epoch(record["step"]) < 1 or evidence >= bound:
            return None
        return self.kept_at_detection(record, self.reason(evidence, bound))


class GradientEvidenceRule(EvidenceBelowBound):
    """Stops when the gradients of the last epoch no longer agree: grad_evidence below `value`. Weights at detection.

    Source: Mahsereci, Balles, Lassner, Hennig: "Early Stopping without a Validation Set", 2017.
    """

    name = "gradient-evidence"
    needs = ("grad_evidence",)
    default_value = 1.0
    value_help = "evidence (1: what chance alone leaves) below which the gradients count as noise"

    def bound(self, record: Dict[str, Any]) -> float:
        return self.value

    def reason(self, evidence: float, bound: float) -> str:
        return f"The gradients of the last epoch no longer agree (evidence {evidence:.3g})"


class GradientAgreement(EvidenceBelowBound):
    """Stops when different examples no longer agree: the gradients of the last epoch agree no more than memorising would make
    them. Weights at detection, after the first epoch.

    Evidence is 1 plus what the inner products of the gradients in the running means add. Those of different examples are what
    helps an example that was never seen; once they have cancelled, a step teaches each example only itself. A language
    model's example gives the same gradient whenever it comes again, and that agreement with itself is no help to others:
    memorising_evidence says how much of it the running means hold (up to 2.16), and the evidence has to exceed it. A
    diffusion model meets its pictures with new noise and timesteps each time, so there the bound stays at 1. Nothing in it was
    fitted to runs. Source: the evidence of Mahsereci et al. (gradient-evidence), with this bound in place of a threshold;
    measured in tests/benchmarks/stop_quality.
    """

    name = "gradient-agreement"
    needs = ("cs", "grad_evidence")

    def bound(self, record: Dict[str, Any]) -> float:
        """The evidence that memorising alone would leave at this measurement."""
        comes_again_unchanged = "lm" in record["cs"]
        per_epoch = max(1, round(self.settings.steps_per_epoch))
        return memorising_evidence(record["step"], per_epoch) if comes_again_unchanged else 1.0

    def reason(self, evidence: float, bound: float) -> str:
        return (
            f"The gradients of different examples no longer agree (evidence {evidence:.3g}; memorising alone leaves {bound:.3g})"
        )


class UpdateNormPlateau(StopRule):
    """Stops when the update has stopped growing: its norm grew over the last epoch by less than the share `value`. Weights
    at detection. Source: the plateau of ||BA|| as a sign of convergence; a baseline.
    """

    name = "update-norm-plateau"
    needs = ("delta_norm",)
    default_value = 0.1
    value_help = "growth of the update's norm over an epoch below which it counts as still"

    def __init__(self, settings: RuleSettings):
        super().__init__(settings)
        self._norms: deque = deque(maxlen=self.measurements(1.0) + 1)

    def first_answer(self) -> int:
        return self.measurements(1.0) + 1

    def update(self, record: Dict[str, Any]) -> Optional[Decision]:
        norm = self.read(record, "delta_norm")
        if norm is None:
            return None
        self._norms.append(norm)
        if len(self._norms) < self.first_answer() or norm > (1 + self.value) * self._norms[0]:
            return None
        return self.kept_at_detection(record, f"The update grew by less than {self.value:.0%} over the last epoch")


RULES: Dict[str, Type[StopRule]] = {
    rule.name: rule
    for rule in (
        SecondValley,
        NthValley,
        GradientAgreement,
        GradientEvidenceRule,
        FixedEpochs,
        CsFall,
        CsTrough,
        UpdateNormPlateau,
        ObjectiveVariance,
        ValidationPatience,
        Shadow,
    )
}


def make_rule(name: str, settings: RuleSettings) -> StopRule:
    """A fresh rule by its registered name. Raises ValueError, naming the rules there are, for another name."""
    if name not in RULES:
        raise ValueError(f"stop rule {name!r} is unknown; choose one of {', '.join(RULES)}")
    return RULES[name](settings)


def check_rule(name: str, valley: int = 2, value: Optional[float] = None) -> None:
    """Raises ValueError where there is no such rule, or it does not take these numbers."""
    make_rule(name, RuleSettings(1, "", 1, 1, valley, value))
