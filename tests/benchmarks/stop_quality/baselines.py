"""Stop rules that lose by the suite's own tables: baselines, which register themselves beside the
trainers' rules.

Importing this module makes them choosable by name wherever a rule is replayed in this process.
"""

import math
from collections import deque
from typing import Any, Optional, Sequence

from es_lora.rules import RULES, Decision, GradientAgreement, RuleSettings, StopRule


class RunningMean:
    """The mean of the last `count` values; None before there are so many."""

    def __init__(self, count: int):
        self._values: deque = deque(maxlen=max(1, count))

    def update(self, value: float) -> Optional[float]:
        self._values.append(value)
        return math.fsum(self._values) / len(self._values) if len(self._values) == self._values.maxlen else None


class ObjectiveVariance(StopRule):
    """Stops when the loss of a fixed batch with fixed noise has stopped moving: the variance of its
    last 50 measurements falls below `value` times the variance of all. Weights at detection.

    Source: DVAR, "Is This Loss Informative? Faster Text-to-Image Customization by Tracking
    Objective Dynamics", NeurIPS 2023.
    """

    name = "objective-variance"
    needs = ("probe_loss",)
    default_value = 0.15
    value_help = "share of the whole variance below which the recent one counts as still"
    LAST = 50

    def __init__(self, settings: RuleSettings):
        super().__init__(settings)
        self._losses: list[float] = []

    def first_answer(self) -> int:
        return self.LAST + 1

    def update(self, record: dict[str, Any]) -> Optional[Decision]:
        loss = self.read(record, "probe_loss")
        if loss is None:
            return None
        self._losses.append(loss)
        if len(self._losses) <= self.LAST:
            return None
        recent, whole = variance(self._losses[-self.LAST :]), variance(self._losses)
        if recent >= self.value * whole:
            return None
        return self.kept_at_detection(
            record, f"The loss of the fixed batch moves less than {self.value:g} of its range before"
        )


def variance(values: Sequence[float]) -> float:
    """Population variance."""
    centre = math.fsum(values) / len(values)
    return math.fsum((value - centre) ** 2 for value in values) / len(values)


class CsFall(StopRule):
    """Stops when the magnitude of the row cosine has fallen to `value` of its highest so far,
    averaged over a quarter of an epoch. Weights at detection. Source: this project's measurements
    on language models.
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

    def update(self, record: dict[str, Any]) -> Optional[Decision]:
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
    """Stops when the signed row cosine, averaged over half an epoch, has passed its trough below
    zero and come back to `value` of it. Weights at detection. Source: as cs-fall.
    """

    name = "cs-trough"
    default_value = 0.8
    value_help = "share of the deepest negative CS at which it counts as come back"
    SMOOTHING_EPOCHS = 0.5

    def depth(self, cs: float) -> float:
        return max(0.0, -cs)


class GradientEvidenceRule(GradientAgreement):
    """Stops when the gradients of the last epoch no longer agree: grad_evidence below `value`.
    Weights at detection.

    Source: Mahsereci, Balles, Lassner, Hennig: "Early Stopping without a Validation Set", 2017.
    """

    name = "gradient-evidence"
    needs = ("grad_evidence",)
    default_value = 1.0
    value_help = "evidence (1: what chance alone leaves) below which the gradients count as noise"

    def bound(self, record: dict[str, Any]) -> float:
        return self.value

    def reason(self, evidence: float, bound: float) -> str:
        return f"The gradients of the last epoch no longer agree (evidence {evidence:.3g})"


class UpdateNormPlateau(StopRule):
    """Stops when the update has stopped growing: its norm grew over the last epoch by less than the
    share `value`. Weights at detection. Source: the plateau of ||BA|| as a sign of convergence; a
    baseline.
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

    def update(self, record: dict[str, Any]) -> Optional[Decision]:
        norm = self.read(record, "delta_norm")
        if norm is None:
            return None
        self._norms.append(norm)
        if len(self._norms) < self.first_answer() or norm > (1 + self.value) * self._norms[0]:
            return None
        return self.kept_at_detection(record, f"The update grew by less than {self.value:.0%} over the last epoch")


BASELINES = (GradientEvidenceRule, CsFall, CsTrough, UpdateNormPlateau, ObjectiveVariance)
RULES.update({rule.name: rule for rule in BASELINES})
