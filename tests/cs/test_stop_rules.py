"""CS-Fluctuation and the decisions, against the golden traces and the literal method."""

import json

import numpy as np
import published_method
import pytest

from cs_fluctuation import FluctuationSeries
from es_lora.history import replay
from es_lora.rules import RuleSettings, make_rule, value_of_valley
from es_lora.settings import StopSettings

GOLDEN_TRACES = range(21)
PUBLISHED = StopSettings(stop_rule="second-valley")


def records(cs, component="lm"):
    return [{"step": index, "cs": {component: value}} for index, value in enumerate(cs)]


def decide(name, cs, window, valley=None):
    return replay(make_rule(name, RuleSettings(window, "lm", 10, 1, valley)), records(cs))


def trace(golden, index):
    return json.loads((golden / "cs_fluctuation_traces.json").read_text())["traces"][index]


def test_every_golden_trace_is_tested(golden):
    assert len(json.loads((golden / "cs_fluctuation_traces.json").read_text())["traces"]) == len(GOLDEN_TRACES)


@pytest.mark.parametrize("index", GOLDEN_TRACES)
def test_golden_decision(golden, index):
    entry = trace(golden, index)
    decision = decide("second-valley", entry["cs"], entry["window"])
    if entry["stop"] is None:
        assert decision is None
    else:
        assert (decision.detected_step, decision.keep_step) == (entry["stop"], entry["turning"])
        assert decision.usable == (entry["turning"], entry["stop"])


@pytest.mark.parametrize("index", GOLDEN_TRACES)
def test_golden_series(golden, index):
    entry = trace(golden, index)
    series = FluctuationSeries(entry["window"])
    end = len(entry["cs"]) if entry["stop"] is None else entry["stop"] + 1
    points = [series.update(cs) for cs in entry["cs"][:end]]
    scale = max(abs(cs) for cs in entry["cs"]) or 1.0
    names = (("mean_cs", "ma_cs", 1), ("mean_difference", "ma_diff", 1), ("fluctuation", "fluctuation", 2))
    for name, expected, order in names:
        ours = [getattr(point, name) for point in points if getattr(point, name) is not None]
        assert len(ours) == len(entry[expected])
        np.testing.assert_allclose(ours, entry[expected], rtol=1e-9, atol=1e-15 * scale**order)


@pytest.mark.parametrize("window", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(6))
def test_streaming_equals_the_literal_formulas_step_by_step(window, seed):
    generator = np.random.default_rng(seed)
    cs = np.cumsum(generator.normal(size=60)) * 1e-3 if seed % 2 else generator.normal(size=60)
    series = FluctuationSeries(window)
    for k in range(len(cs)):
        point = series.update(cs[k])
        literals = published_method.fluctuation_series(cs[: k + 1], window)
        for ours, literal in zip((point.mean_cs, point.mean_difference, point.fluctuation), literals):
            assert (ours is None) == (len(literal) == 0)
            if ours is not None:
                assert ours == pytest.approx(literal[-1], rel=1e-6, abs=1e-18)
    decision = decide("second-valley", cs, window)
    ours = (None, None) if decision is None else (decision.detected_step, decision.keep_step)
    assert ours == published_method.published_stop(cs, window)


@pytest.mark.parametrize("valley", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(6))
def test_nth_valley_equals_one_literal_scan(valley, seed):
    cs = np.cumsum(np.random.default_rng(seed).normal(size=120)) * 1e-3
    decision = decide("nth-valley", cs, 3, valley)
    ours = (None, None) if decision is None else (decision.detected_step, decision.keep_step)
    assert ours == published_method.literal_stop(cs, 3, valley)


def test_the_two_rules_differ_on_a_series_that_starts_by_rising():
    differing = 0
    for seed in range(40):
        cs = np.cumsum(np.random.default_rng(seed).normal(size=80))
        published, literal = decide("second-valley", cs, 2), decide("nth-valley", cs, 2)
        if (published.keep_step, published.detected_step) != (literal.keep_step, literal.detected_step):
            differing += 1
            fluctuation = published_method.fluctuation_series(cs, 2)[2]
            assert fluctuation[1] > fluctuation[0]
            assert published.detected_step < literal.detected_step
    assert differing > 5


def test_a_constant_series_fluctuates_by_exactly_zero():
    series = FluctuationSeries(7)
    assert {series.update(0.1).fluctuation for _ in range(60)} == {None, 0.0}
    assert decide("second-valley", [0.1] * 60, 7) is None


@pytest.mark.parametrize("name", ["second-valley", "nth-valley"])
def test_no_answer_before_first_answer(name):
    """first_answer is reachable and nothing comes earlier, over many short random series."""
    window, earliest = 2, 10**9
    rule = make_rule(name, RuleSettings(window, "lm", 10, 1))
    for seed in range(400):
        decision = decide(name, np.random.default_rng(seed).normal(size=40), window)
        if decision is not None:
            earliest = min(earliest, decision.detected_step + 1)
    assert earliest == rule.first_answer()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="second-valley, nth-valley"):
        make_rule("third-valley", RuleSettings(5, "lm", 10, 1))
    with pytest.raises(ValueError, match="use the rule nth-valley"):
        value_of_valley("second-valley", 3)
    with pytest.raises(ValueError, match="at least 1"):
        FluctuationSeries(0)
    with pytest.raises(ValueError, match="needs the column 'cs'"):
        replay(make_rule("second-valley", RuleSettings(5, "lm", 10, 1)), [{"step": 1}])
    with pytest.raises(ValueError, match="'unet' is not recorded; recorded are lm"):
        replay(make_rule("second-valley", RuleSettings(5, "unet", 10, 1)), records([0.1]))


@pytest.mark.parametrize(
    "steps_per_epoch, interval, window",
    [(1, 1, 5), (5, 1, 5), (8, 1, 8), (20, 2, 10), (25, 2, 12), (150, 15, 10), (1000, 100, 10)],
)
def test_automatic_interval_and_window(steps_per_epoch, interval, window):
    plan = PUBLISHED.plan(["lm"], steps_per_epoch, 100 * steps_per_epoch + 100)
    assert (plan.cs_interval, plan.window) == (interval, window)
    assert bool(plan.notices) == (interval * window > steps_per_epoch * 1.05)


def test_a_budget_too_short_to_decide_is_said_before_the_run():
    needed = 3 * 10 + 2
    assert "too short" in PUBLISHED.plan(["lm"], 10, needed - 1).notices[0]
    assert PUBLISHED.plan(["lm"], 10, needed).notices == ()
