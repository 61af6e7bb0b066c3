"""How a run ended: one sentence, one schema, and what saved weights say of themselves."""

import json

import pytest

from es_lora.outcome import EXIT_CODES, Outcome
from es_lora.rules import Decision
from es_lora.settings import StopSettings

FOUND = Decision(40, 88, (40, 88), "It became steady at step 88.")
AT_THE_END = Decision(88, 88, (88, 88), "Gradients no longer agree at step 88.")
PLAN = StopSettings(early_stop=True).plan(["lm"], 16, 204)


def outcome(name, decision=None, last=88, **more):
    return Outcome(name, last, 204, plan=PLAN, decision=decision, **more)


@pytest.mark.parametrize(
    "made, words",
    [
        (
            outcome("stopped_early", FOUND, heldout={"kept": 3.9, "last": 4.29}),
            "Stopped early at step 88 of 204. The weights of the turning point, step 40 (epoch 2.5), are kept. "
            "Held-out "
            "loss: 3.9000 there, 4.2900 at the last step (10.0% higher).",
        ),
        (
            outcome("stopped_early", AT_THE_END, heldout={"kept": 3.84}),
            "Stopped early at step 88 of 204. The last weights are those of the turning point, step 88 (epoch 5.5). "
            "Held-out loss: 3.8400 there.",
        ),
        (
            outcome("budget_reached", FOUND, last=204),
            "Trained to its budget of 204 steps. The turning point was step 40 (epoch 2.5), found at step 88.",
        ),
        (
            outcome("no_turning_point", last=190),
            "Trained to the end of the data, step 190 of 204. No evidence of overfitting yet: the last weights are "
            "kept.",
        ),
        (Outcome("budget_reached", 204, 204), "Trained to its budget of 204 steps."),
        (outcome("interrupted"), "Interrupted at step 88 of 204; everything needed to go on is saved."),
        (
            outcome("stopped_by_other", stopped_by="EarlyStoppingCallback"),
            "Stopped at step 88 of 204 by EarlyStoppingCallback. No evidence of overfitting yet: the last weights are "
            "kept.",
        ),
    ],
)
def test_the_verdict_in_one_sentence(made, words):
    assert made.sentence() == words


def test_a_divergence_says_whose_weights_are_kept():
    made = outcome("diverged", diverged="the loss is NaN")
    assert "Training diverged at step 88: the loss is NaN. No finite weights are known" in made.sentence()
    made.saved("kept", "adapter", 80)
    assert "The weights of step 80, the last finite ones known, are kept." in made.sentence()
    made.saved("kept", "adapter", 88)
    assert "The weights of that moment are finite and kept." in made.sentence()
    assert made.exit_code == 3


@pytest.mark.parametrize("name", EXIT_CODES)
def test_every_outcome_has_a_sentence_and_a_result(name, tmp_path):
    made = outcome(name, FOUND, diverged="x", stopped_by="y", heldout={"before": float("nan"), "kept": 3.0})
    made.saved("kept", "adapter", 40)
    result = made.write(tmp_path, {"seed": 1}, ("torch", "not-installed"))
    read = json.loads((tmp_path / "result.json").read_text())
    assert read["outcome"] == name and read["exit_code"] == EXIT_CODES[name] and read["verdict"] == made.sentence()
    assert (read["keep_step"], read["detected_step"], read["usable_steps"]) == (40, 88, [40, 88])
    assert read["files"] == {"kept": {"path": "adapter", "step": 40, "averaged": False}}
    assert read["heldout"] == {"before": None, "kept": 3.0}  # JSON has no NaN
    assert "torch" in read["versions"] and "not-installed" not in read["versions"]
    assert set(read) == set(result)


def test_the_schema_is_the_same_whatever_is_known():
    full = outcome("stopped_early", FOUND).as_result({}, ())
    assert set(Outcome("interrupted", 0, 10).as_result({}, ())) == set(full)


def test_saved_weights_say_which_step_they_are_of():
    made = outcome("stopped_early", FOUND)
    made.saved("kept", "adapter", 40)
    made.saved("last", "adapter-last", 88)
    assert [made.facts(what)["step"] for what in ("kept", "last")] == [40, 88]
    assert {made.facts(what)["keep_step"] for what in ("kept", "last")} == {40}
    assert made.metadata("last")["es_lora_step"] == "88" and made.metadata("kept")["es_lora_averaged"] == "False"


def test_the_last_lines_name_what_is_there_and_the_next_command(tmp_path):
    made = outcome(
        "stopped_early", FOUND, parts={"unet": {"stopped": True, "turning_step": 40}, "te": {"stopped": False}}
    )
    made.saved("kept", "lora.safetensors", 40)
    made.saved("last", "gone.safetensors", 88)
    (tmp_path / "lora.safetensors").touch()
    (tmp_path / "report.html").touch()
    lines = made.last_lines(tmp_path, ["General text: as before.", ""], {"try it": "python x.py"})
    assert lines[1] == made.sentence() and lines[2] == f"Why: {FOUND.reason}"
    text = "\n".join(lines)
    assert "U-Net alone: turning point 40" in text and "text encoder alone: none yet" in text
    assert "lora.safetensors" in text and "report.html" in text and "gone.safetensors" not in text
    assert lines[-1].split(None, 2) == ["try", "it:", "python x.py"]


def test_tables_without_rows_are_left_out():
    assert outcome("no_turning_point").tables() == []
    titles = [title for title, _, _ in outcome("stopped_early", FOUND, heldout={"kept": 1.0, "last": None}).tables()]
    assert titles == ["Held-out loss"]
