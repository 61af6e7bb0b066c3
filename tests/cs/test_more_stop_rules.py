"""The rules beside the valleys: each on series whose answer is plain, on series that never overfit,
and with nulls."""

import math

import pytest
import torch

from es_lora.gradient_evidence import GradientEvidence, memorising_evidence
from es_lora.history import replay
from es_lora.rules import MOVED_RULES, RULES, RuleSettings, make_rule, value_of_valley

PER_EPOCH = 20  # optimizer steps; measured at every second one: ten times an epoch
INTERVAL = 2


def settings(**more):
    return RuleSettings(10, "lm", PER_EPOCH, INTERVAL, **more)


def history(measurements, **columns):
    """Records of a run; a column is a function of the epoch, or of nothing that is recorded
    (None)."""
    records = []
    for index in range(measurements):
        step = INTERVAL * (index + 1)
        values = {name: function(step / PER_EPOCH) for name, function in columns.items()}
        cs = values.pop("cs_row", 0.0)
        norm = values.pop("delta_norm", 1.0)
        records.append({"step": step, "cs": {"lm": cs}, "cs_row": {"lm": cs}, "delta_norm": {"lm": norm}, **values})
    return records


def decide(name, records, **more):
    return replay(make_rule(name, settings(**more)), records)


def valley(epoch):
    return 2 + (epoch - 3) ** 2


@pytest.mark.parametrize("name, column", [("shadow", "shadow_loss"), ("validation-patience", "heldout_loss")])
def test_at_the_end_of_the_training_the_lowest_loss_is_kept(name, column):
    def decided(losses):
        records = [{"step": 10 * (i + 1), "cs": {"lm": 0.1}, column: loss} for i, loss in enumerate(losses)]
        return replay(make_rule(name, RuleSettings(10, "lm", 1000, 10)), records)

    ended = decided([3.0, 2.0, None, 2.5])
    assert (ended.keep_step, ended.detected_step) == (20, 40) and "the training ends here" in ended.reason
    going_on = [{"step": 10 * (i + 1), "cs": {"lm": 0.1}, column: loss} for i, loss in enumerate([3.0, 2.0, 2.5])]
    assert replay(make_rule(name, RuleSettings(10, "lm", 1000, 10)), going_on, ended=False) is None
    assert decided([3.0, 2.5, 2.0]) is None and decided([3.0, 2.5, None]) is None  # the last one is the lowest


def test_fixed_epochs_is_a_clock():
    decision = decide("fixed-epochs", history(60), value=2.5)
    assert (decision.keep_step, decision.detected_step) == (50, 50)
    assert decide("fixed-epochs", history(20), value=2.5) is None


def test_validation_patience_keeps_the_lowest_and_waits():
    decision = decide("validation-patience", history(100, heldout_loss=valley))
    assert decision.keep_step == 3 * PER_EPOCH
    assert decision.detected_step == 3 * PER_EPOCH + 3 * INTERVAL
    patient = decide("validation-patience", history(100, heldout_loss=valley), value=8)
    assert (patient.keep_step, patient.detected_step) == (3 * PER_EPOCH, 3 * PER_EPOCH + 8 * INTERVAL)


def test_measurements_without_a_value_are_passed_over():
    seldom = history(200, heldout_loss=valley)
    for index, record in enumerate(seldom):
        if index % 5 != 4:
            record["heldout_loss"] = None
    decision = decide("validation-patience", seldom)
    assert (decision.keep_step, decision.detected_step) == (3 * PER_EPOCH, 3 * PER_EPOCH + 15 * INTERVAL)


def test_shadow_is_not_stopped_by_less_than_an_epoch_of_worse_losses():
    def bumpy(epoch):
        return valley(epoch) + (2 if 1 < epoch < 1.85 else 0)

    assert decide("validation-patience", history(100, heldout_loss=bumpy)).keep_step == PER_EPOCH
    decision = decide("shadow", history(100, shadow_loss=bumpy))
    assert (decision.keep_step, decision.detected_step) == (3 * PER_EPOCH, 4 * PER_EPOCH)


@pytest.mark.parametrize("apart", [1, 3, 10])
def test_shadow_waits_an_epoch_however_seldom_it_is_scored(apart):
    seldom = history(200, shadow_loss=valley)
    for index, record in enumerate(seldom):
        if index % apart:
            record["shadow_loss"] = None
    rule = make_rule("shadow", settings())
    decision = replay(rule, seldom)
    assert abs(decision.keep_step - 3 * PER_EPOCH) <= INTERVAL * max(2, apart)
    waited = decision.detected_step - decision.keep_step
    assert PER_EPOCH <= waited <= PER_EPOCH + INTERVAL * (apart + 2) and waited / INTERVAL <= rule.lookback()
    assert decide("shadow", seldom, value=3).detected_step >= decision.keep_step + 3 * PER_EPOCH


NEVER = {
    "heldout_loss": lambda epoch: math.exp(-epoch),
    "shadow_loss": lambda epoch: math.exp(-epoch),
    "grad_evidence": lambda epoch: 5.0,
}


@pytest.mark.parametrize("name", [name for name in RULES if name != "fixed-epochs"])
def test_no_false_alarm_on_a_run_that_only_gets_better(name):
    assert decide(name, history(100, **NEVER)) is None


@pytest.mark.parametrize("name", list(RULES))
def test_nulls_in_every_optional_column_are_no_answer_and_no_error(name):
    records = history(80)
    for record in records:
        record.update(heldout_loss=None, shadow_loss=None, grad_evidence=None, loss=None, lr=None)
        record["delta_norm"] = record["cs_row"] = None
    decision = decide(name, records)
    assert (decision is None) == (name != "fixed-epochs")


@pytest.mark.parametrize("name", list(RULES))
def test_a_decision_never_keeps_more_than_lookback_measurements_before(name):
    records = history(
        300,
        heldout_loss=valley,
        shadow_loss=valley,
        cs_row=lambda epoch: math.sin(epoch) * math.exp(-epoch / 4),
        grad_evidence=lambda epoch: 4 - epoch,
    )
    rule = make_rule(name, settings())
    decision = replay(rule, records)
    assert decision is not None
    assert 0 <= (decision.detected_step - decision.keep_step) / INTERVAL <= rule.lookback()
    assert decision.detected_step / INTERVAL >= rule.first_answer()
    assert decision.usable[0] <= decision.keep_step <= decision.detected_step
    assert decision.reason.endswith(".")


def test_a_number_for_a_rule_without_one_and_a_bad_number_are_named():
    with pytest.raises(ValueError, match="second-valley has no number to set"):
        make_rule("second-valley", settings(value=3.0))
    with pytest.raises(ValueError, match="gradient-agreement counts no valleys .* use the rule nth-valley"):
        value_of_valley("gradient-agreement", 3)
    with pytest.raises(ValueError, match="counted in whole numbers"):
        make_rule("nth-valley", settings(value=2.5))
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="epochs to train, must be above 0"):
            make_rule("fixed-epochs", settings(value=bad))


def agreement_records(measurements, evidence, component):
    records = history(measurements, grad_evidence=evidence)
    for record in records:
        record["cs"] = {component: 0.0}
    return records


@pytest.mark.parametrize(("component", "expected_epoch"), [("lm", 2.2), ("unet", 4.1)])
def test_agreement_asks_more_of_examples_that_come_again_unchanged(component, expected_epoch):
    """Evidence falls from 5 by 1 an epoch: under the bound near 2.1 early for text, under 1 later
    for pictures."""

    def evidence(epoch):
        return 5 - epoch if component == "unet" else 4 - epoch

    records = agreement_records(80, evidence, component)
    rule = make_rule("gradient-agreement", RuleSettings(10, component, PER_EPOCH, INTERVAL))
    decision = replay(rule, records)
    assert decision.keep_step == decision.detected_step
    assert decision.keep_step / PER_EPOCH == pytest.approx(expected_epoch, abs=0.11)
    assert "memorising alone leaves" in decision.reason


def test_agreement_never_stops_within_the_first_epoch():
    decision = replay(make_rule("gradient-agreement", settings()), agreement_records(80, lambda epoch: 0.1, "lm"))
    assert decision.keep_step == PER_EPOCH


@pytest.mark.parametrize(("per_epoch", "words"), [(1, "memorising would make them"), (2, "of different examples")])
def test_one_step_an_epoch_is_not_said_to_be_of_different_examples(per_epoch, words):
    """Its one batch may hold one example only, which has none to disagree with."""
    rule = make_rule("gradient-agreement", RuleSettings(10, "lm", per_epoch, 1))
    decision = replay(rule, agreement_records(20, lambda epoch: 0.1, "lm"))
    assert words in decision.reason and ("different examples" in decision.reason) == (per_epoch > 1)


def literal_memorising_evidence(gradients, per_epoch):
    """Decaying weights of every gradient, summed by example and squared, over the sum of their
    squares."""
    decay = 1 - 1 / max(5, per_epoch)
    weights = [decay**age for age in range(gradients)]
    by_example = [sum(weights[first::per_epoch]) for first in range(per_epoch)]
    return sum(total**2 for total in by_example) / sum(weight**2 for weight in weights)


@pytest.mark.parametrize("per_epoch", [1, 2, 5, 8, 33])
def test_memorising_evidence_is_that_of_examples_that_agree_with_themselves_alone(per_epoch):
    for gradients in (1, 2, 3, per_epoch, per_epoch + 1, 2 * per_epoch, 3 * per_epoch + 2, 12 * per_epoch):
        expected = literal_memorising_evidence(gradients, per_epoch)
        assert memorising_evidence(gradients, per_epoch) == pytest.approx(expected, rel=1e-9)
    assert memorising_evidence(per_epoch, per_epoch) == pytest.approx(1)


def test_memorising_evidence_is_what_gradient_evidence_measures_on_such_examples():
    """Examples of independent random gradients, the same at every visit, through the real
    measurement."""
    torch.manual_seed(0)
    per_epoch, epochs = 12, 4
    parameter = torch.nn.Parameter(torch.zeros(40_000))
    examples = torch.randn(per_epoch, parameter.numel())
    evidence = GradientEvidence([parameter], per_epoch)
    for visit in range(per_epoch * epochs):
        (parameter * examples[visit % per_epoch]).sum().backward()
    # m^2 / v is a mean of ratios: v itself varies from parameter to parameter, which costs some
    # percent
    assert evidence.value() == pytest.approx(memorising_evidence(per_epoch * epochs, per_epoch), rel=0.1)


@pytest.mark.parametrize("name", MOVED_RULES)
def test_a_rule_that_has_moved_says_where_it_is(name):
    with pytest.raises(ValueError, match=f"'{name}' is a baseline of tests/benchmarks/stop_quality now.*choose one of"):
        make_rule(name, settings())
