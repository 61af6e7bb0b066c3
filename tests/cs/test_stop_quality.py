"""The suite on the quality of stopping: its design, its scores, and that the committed traces are
those of its runs."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

SUITE = Path(__file__).resolve().parents[1] / "benchmarks" / "stop_quality"
sys.path.append(str(SUITE))

from runs import IMAGE_SETS, RUNS, TEXT_SETS, data_folder, trace_path  # noqa: E402
from scores import Kept, correlation, decide, outcomes, summary  # noqa: E402
from traces import Trace, read_trace  # noqa: E402

RECORDED = [spec for spec in RUNS.values() if trace_path(spec).exists()]
ANEW = [spec for spec in RUNS.values() if trace_path(spec, anew=True).exists()]


def test_there_are_as_many_runs_as_the_design_says():
    recording = [spec for spec in RUNS.values() if spec.purpose != "validation"]
    text = [spec for spec in recording if spec.model == "text"]
    assert len(text) >= 100 and sum(spec.base == "larger" for spec in text) >= 20
    assert sum(spec.model == "image" for spec in recording) >= 32
    for model, least in (("text", 24), ("image", 8)):
        shadowed = [spec for spec in recording if spec.model == model and spec.purpose == "shadow"]
        assert len(shadowed) >= least
        assert len({sum(spec.half == half for spec in shadowed) for half in ("tuning", "test")}) == 1
        assert all(f"{spec.name}-validation" in RUNS for spec in shadowed)


def test_the_new_half_has_its_runs_on_every_base():
    def count(half, model, base):
        return sum(
            (spec.half, spec.model, spec.base) == (half, model, base) and spec.purpose != "validation"
            for spec in RUNS.values()
        )

    assert count("new", "text", "embedded") >= 60 and count("new", "image", "embedded") >= 24
    assert count("new", "text", "smollm2") >= 12 and count("tuning", "text", "smollm2") >= 8
    kinds = [kind for kind, half, _ in TEXT_SETS.values() if half == "new"]
    assert len(set(kinds)) == 4 and len(kinds) == 2 * 4
    assert sum(half == "new" for _, half, _ in IMAGE_SETS.values()) == 4


def test_halves_are_of_data_sets_and_balanced():
    for sets in (TEXT_SETS, IMAGE_SETS):
        halves = [half for _, half, _ in sets.values()]
        assert halves.count("tuning") == halves.count("test")
    assert all(
        len({spec.half for spec in RUNS.values() if spec.dataset == name}) == 1 for name in [*TEXT_SETS, *IMAGE_SETS]
    )
    kinds = {kind for kind, _, _ in TEXT_SETS.values()}
    assert len(kinds) == 4 and {kind for kind, half, _ in TEXT_SETS.values() if half == "test"} == kinds


@pytest.mark.parametrize("name", [*TEXT_SETS, *IMAGE_SETS])
def test_a_data_set_has_the_size_that_is_written_and_keeps_its_held_out_part_apart(name):
    folder = data_folder(next(spec for spec in RUNS.values() if spec.dataset == name))
    if name in TEXT_SETS:
        training, heldout = ((folder / f"{part}.jsonl").read_text("utf8").splitlines() for part in ("train", "heldout"))
    else:
        training = [path.read_bytes() for path in (folder / "train").glob("*/*.png")]
        heldout = [path.read_bytes() for path in (folder / "heldout").glob("*.png")]
    assert len(training) == {**TEXT_SETS, **IMAGE_SETS}[name][2]
    assert len(heldout) >= 10 and not set(training) & set(heldout)


def plain(text):
    """A text without case, blanks and signs: near duplicates become equal."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


@pytest.mark.parametrize("name", TEXT_SETS)
def test_no_question_and_no_answer_of_a_text_set_is_in_both_parts(name):
    folder = data_folder(next(spec for spec in RUNS.values() if spec.dataset == name))
    parts = [
        [json.loads(line) for line in (folder / f"{part}.jsonl").read_text("utf8").splitlines()]
        for part in ("train", "heldout")
    ]
    for side in ("input", "output"):
        training, heldout = ({plain(row[side]) for row in rows} for rows in parts)
        assert training and heldout and not training & heldout


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_no_caption_of_an_image_set_is_in_both_parts(name):
    folder = data_folder(next(spec for spec in RUNS.values() if spec.dataset == name))
    training, heldout = (
        {plain(path.read_text("utf8")) for path in folder.glob(pattern)}
        for pattern in ("train/*/*.txt", "heldout/*.txt")
    )
    assert training and heldout and not training & heldout


@pytest.mark.parametrize("spec", RECORDED, ids=lambda spec: spec.name)
def test_a_committed_trace_is_that_of_its_run(spec):
    trace = read_trace(spec)
    assert trace.header["run"] == spec.settings()
    assert trace.records[-1]["epoch"] > spec.epochs - 0.3  # whole: to its budget
    assert len(trace.steps) >= 10 and np.isfinite(trace.losses).all()
    assert not any(
        "/" in str(value) for name, value in trace.header.items() if name != "format"
    )  # no path of a machine


@pytest.mark.parametrize("spec", ANEW, ids=lambda spec: spec.name)
def test_a_trace_that_was_recorded_anew_holds_the_losses_of_averages(spec):
    trace = read_trace(spec, anew=True)
    assert trace.header["run"] == spec.settings() and trace.records[-1]["epoch"] > spec.epochs - 0.3
    assert trace.widths == ["0.1", "0.25", "0.4"] and len(trace.steps) >= 10
    for width in trace.widths:
        steps, losses = trace.averaged(width)
        assert np.isfinite(losses).all() and len(steps) >= 7
        assert losses[1] == pytest.approx(trace.losses[1], rel=1e-4) or steps[1] > 1
    if spec.purpose == "shadow":
        scored = [record["shadow_losses"] for record in trace.records if record["shadow_losses"] is not None]
        assert scored and all(set(each) >= {"0", "0.25", "0.4"} for each in scored)


def toy(losses, dataset="a", per_epoch=10):
    """A trace whose held-out loss is `losses`, measured at every step from 0."""
    spec = replace(RECORDED[0], dataset=dataset)
    header = {"steps_per_epoch": per_epoch, "heldout_at_start": losses[0], "cs_interval": 1, "decided_on": "lm"}
    return Trace(spec, header, [{"step": step, "heldout_loss": loss} for step, loss in enumerate(losses) if step])


def test_regret_is_0_at_the_best_step_and_1_where_training_has_brought_nothing():
    trace = toy([4.0, 3.0, 2.0, 3.0, 4.0])
    assert [trace.regret(step) for step in (0, 1, 2, 2.5, 4)] == [1.0, 0.5, 0.0, 0.25, 1.0]
    assert trace.best_step == 2 and trace.improves and not toy([1.0, 2.0, 3.0]).improves


def test_a_clock_is_decided_on_a_trace():
    trace = toy([4.0, 3.0, 2.0, 3.0, 4.0], per_epoch=2)
    assert decide(trace, "fixed-epochs", value=1.5) == Kept(3, 3, True)
    assert decide(trace, "fixed-epochs", value=5) == Kept(4, 4, False)


def test_correlation_is_of_logarithms_and_unknown_for_a_clock():
    assert correlation(np.array([1.0, 2.0, 8.0]), np.array([2.0, 4.0, 16.0])) == pytest.approx(1)
    assert np.isnan(correlation(np.array([2.0, 2.0]), np.array([1.0, 3.0])))


def test_intervals_come_from_whole_data_sets():
    """Many runs of two sets with regrets 0 and 1: by runs the mean would be certain, by sets it is
    not."""
    traces = [toy([4.0, 2.0, 4.0], dataset) for dataset in ("a", "b") for _ in range(50)]
    kept = [Kept(1 if trace.spec.dataset == "a" else 2, 2, True) for trace in traces]
    mean, low, high = summary(outcomes(traces, kept), resamples=200)["mean"]
    assert (mean, low, high) == (0.5, 0.0, 1.0)
