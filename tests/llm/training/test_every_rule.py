"""A run of the text trainer with each rule of the registry: it stops, or says why it did not."""

import json

import pytest
from es_lora_llm import main

from es_lora.rules import RULES

COLUMNS = {"heldout_loss", "shadow_loss", "grad_evidence"}


def run(base, files, output, *more):
    """Eight epochs of four steps, measured after every step; the exit code."""
    words = [
        "--model_name_or_path",
        base,
        "--dataset",
        files["train"],
        "--output_dir",
        output,
        "--bits",
        32,
        "--lora_r",
        4,
    ]
    words += [
        "--learning_rate",
        2e-2,
        "--per_device_train_batch_size",
        4,
        "--gradient_accumulation_steps",
        1,
        "--use_cpu",
    ]
    words += [
        "--gradient_checkpointing",
        "False",
        "--num_train_epochs",
        8,
        "--save_strategy",
        "no",
        "--early_stop",
        *more,
    ]
    return main([str(word) for word in words])


@pytest.mark.parametrize("rule", list(RULES))
def test_it_stops_or_says_why_it_did_not(rule, random_base, text_files, tmp_path, capsys):
    needs_heldout = "heldout_loss" in RULES[rule].needs
    more = ["--do_eval", "--eval_dataset", text_files["heldout"]] if needs_heldout else []
    assert run(random_base, text_files, tmp_path / "run", "--stop_rule", rule, *more) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    header, *lines = map(json.loads, (tmp_path / "run" / "cs_history.jsonl").read_text().splitlines())
    records = [line for line in lines if "event" not in line]
    assert header["rule"] == rule
    for column in COLUMNS.intersection(RULES[rule].needs):
        assert any(record[column] is not None for record in records), column
    if result["outcome"] == "stopped_early":
        assert (
            result["files"]["kept"]["step"] <= result["detected_step"] == result["last_step"] <= result["total_steps"]
        )
        assert result["reason"] and (tmp_path / "run" / "adapter-last").is_dir()
    else:
        assert result["outcome"] == "no_turning_point" or result["last_step"] == result["total_steps"]
        assert "No evidence of overfitting yet" in result["verdict"]
    said = capsys.readouterr().out
    assert result["verdict"] in said


def test_a_rule_on_held_out_examples_without_any_says_what_to_add(random_base, text_files, tmp_path, capsys):
    assert run(random_base, text_files, tmp_path / "run", "--stop_rule", "validation-patience") == 2
    assert "add --do_eval with --eval_dataset" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rule", "value", "message"),
    [
        ("second-valley", 2, "has no number to set"),
        ("fixed-epochs", 0, "must be above 0"),
        ("fixed-epochs", "nan", "must be above 0"),
    ],
)
def test_a_number_that_does_not_fit_the_rule(rule, value, message, random_base, text_files, tmp_path, capsys):
    assert run(random_base, text_files, tmp_path / "run", "--stop_rule", rule, "--rule_value", value) == 2
    assert message in capsys.readouterr().err


def test_the_number_of_a_rule_reaches_it(random_base, text_files, tmp_path):
    assert run(random_base, text_files, tmp_path / "run", "--stop_rule", "fixed-epochs", "--rule_value", 1.5) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["files"]["kept"]["step"], result["last_step"]) == (6, 6)
