"""The baselines of the suite on the quality of stopping: rules that lose, on series whose answer is
plain.

They register themselves when they are imported; here they are taken off the registry again after
each test.
"""

import math
import sys
from pathlib import Path

import pytest

from es_lora.history import replay
from es_lora.rules import MOVED_RULES, RULES, RuleSettings

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks" / "stop_quality"))
PRODUCT = dict(RULES)

from baselines import BASELINES  # noqa: E402

RULES.clear()
RULES.update(PRODUCT)

PER_EPOCH = 20  # optimizer steps; measured at every second one: ten times an epoch
INTERVAL = 2
KNOWN = {rule.name: rule for rule in BASELINES}


def history(measurements, **columns):
    """Records of a run; a column is a function of the epoch."""
    records = []
    for index in range(measurements):
        step = INTERVAL * (index + 1)
        values = {name: function(step / PER_EPOCH) for name, function in columns.items()}
        cs, norm = values.pop("cs_row", 0.0), values.pop("delta_norm", 1.0)
        records.append({"step": step, "cs": {"lm": cs}, "cs_row": {"lm": cs}, "delta_norm": {"lm": norm}, **values})
    return records


def decide(name, records, value=None):
    return replay(KNOWN[name](RuleSettings(10, "lm", PER_EPOCH, INTERVAL, value)), records)


def test_the_baselines_are_the_rules_that_moved():
    assert set(KNOWN) == set(MOVED_RULES) and not set(KNOWN) & set(RULES)


@pytest.mark.parametrize("sign", [1, -1])
def test_cs_fall_sees_the_magnitude_come_back(sign):
    records = history(100, cs_row=lambda epoch: sign * math.sin(min(epoch, math.pi)))
    decision = decide("cs-fall", records)
    falls = math.pi - math.asin(0.8)  # where the sine has fallen to 0.8 of its height
    assert decision.keep_step / PER_EPOCH == pytest.approx(falls, abs=0.25)


def test_cs_trough_sees_only_negative_cs():
    below = decide("cs-trough", history(100, cs_row=lambda epoch: -math.sin(min(epoch, math.pi))))
    assert below.keep_step / PER_EPOCH == pytest.approx(math.pi - math.asin(0.8), abs=0.35)
    assert decide("cs-trough", history(100, cs_row=lambda epoch: math.sin(min(epoch, math.pi)))) is None


def test_gradient_evidence_waits_for_its_first_epoch():
    low_from_the_start = decide("gradient-evidence", history(100, grad_evidence=lambda epoch: 0.5))
    assert low_from_the_start.keep_step == PER_EPOCH
    falling = decide("gradient-evidence", history(100, grad_evidence=lambda epoch: 5 - epoch), value=1.5)
    assert falling.keep_step == 3.5 * PER_EPOCH + INTERVAL


def test_update_norm_plateau():
    decision = decide("update-norm-plateau", history(100, delta_norm=lambda epoch: 1 - math.exp(-epoch)))
    growth = next(e / 10 for e in range(11, 100) if (1 - math.exp(-e / 10)) <= 1.1 * (1 - math.exp(-e / 10 + 1)))
    assert decision.keep_step / PER_EPOCH == pytest.approx(growth, abs=0.11)


def test_objective_variance_needs_fifty_measurements_and_stillness():
    records = history(200, probe_loss=lambda epoch: math.exp(-epoch))
    decision = decide("objective-variance", records)
    losses = [record["probe_loss"] for record in records]

    def spread(values):
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / len(values)

    still = next(n for n in range(51, 200) if spread(losses[n - 50 : n]) < 0.15 * spread(losses[:n]))
    assert decision.keep_step == records[still - 1]["step"]
    assert decide("objective-variance", records[:50]) is None


NEVER = {
    "cs_row": lambda epoch: -0.01 * math.exp(epoch),
    "grad_evidence": lambda epoch: 5.0,
    "delta_norm": lambda epoch: math.exp(epoch),
    "probe_loss": lambda epoch: -epoch,
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_no_false_alarm_on_a_run_that_only_gets_better(name):
    assert decide(name, history(100, **NEVER)) is None


@pytest.mark.parametrize("name", list(KNOWN))
def test_nulls_are_no_answer_and_no_error(name):
    records = history(80)
    for record in records:
        record.update(grad_evidence=None, probe_loss=None, delta_norm=None, cs_row=None)
    assert decide(name, records) is None
