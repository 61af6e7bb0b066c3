"""A run of the diffusion trainer with each rule of the registry: it stops, or says why it did
not."""

import pytest
from ldm_runs import history_of, make_pictures, run, train

from es_lora.rules import RULES

COLUMNS = {"heldout_loss", "shadow_loss", "grad_evidence"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("images"), count=10)


@pytest.mark.parametrize("rule", list(RULES))
def test_it_stops_or_says_why_it_did_not(rule, base, images, tmp_path, capsys):
    more = {"validation_split": 0.2} if "heldout_loss" in RULES[rule].needs else {}
    result = train(
        base, images, tmp_path, early_stop=True, stop_rule=rule, max_train_steps=24, learning_rate=5e-2, **more
    )
    for column in COLUMNS.intersection(RULES[rule].needs):
        assert any(value is not None for value in history_of(tmp_path, column)), column
    if result["outcome"] == "stopped_early":
        assert result["keep_step"] <= result["detected_step"] == result["last_step"] <= 24
        assert (tmp_path / "lora-last.safetensors").is_file()
    else:
        assert result["outcome"] == "no_turning_point" and result["last_step"] == 24
        assert "No evidence of overfitting yet" in capsys.readouterr().out or result["keep_step"] is None


def test_a_rule_on_held_out_pictures_without_any_says_what_to_add(base, images, tmp_path, capsys):
    assert run(base, images, tmp_path / "run", early_stop=True, stop_rule="validation-patience") == 2
    assert "add --validation_split" in capsys.readouterr().err
    assert not (tmp_path / "run" / "cs_history.jsonl").exists()


def test_the_number_of_a_rule_reaches_it(base, images, tmp_path, capsys):
    result = train(
        base, images, tmp_path / "a", early_stop=True, stop_rule="fixed-epochs", rule_value=1.4, max_train_steps=24
    )
    assert result["last_step"] == 7  # of 5 steps an epoch
    assert run(base, images, tmp_path / "b", early_stop=True, stop_rule="second-valley", rule_value=2) == 2
    assert "has no number to set" in capsys.readouterr().err
