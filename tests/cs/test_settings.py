"""The one list of early-stop settings: reading, checking, planning, and the parsers made of it."""

import argparse
from dataclasses import fields

import pytest

from es_lora.settings import StopSettings, add_stop_arguments, read_stop_settings, stop_values


def parsed(*words, usual=None, leave_out=()):
    parser = argparse.ArgumentParser()
    add_stop_arguments(parser.add_argument_group("early stopping"), usual or StopSettings(), leave_out)
    return parser.parse_args(words)


def test_a_parser_made_of_the_settings_has_every_flag_and_changes_nothing_that_is_not_given():
    usual = StopSettings(calculate_cs=False, cs_reduction="matrix", window_size=7)
    arguments = parsed(usual=usual)
    assert {entry.name for entry in fields(StopSettings)} | {"valley"} == set(vars(arguments))
    assert read_stop_settings(vars(arguments), usual) == usual
    assert not hasattr(parsed(leave_out=("shadows",)), "shadows")


@pytest.mark.parametrize("value, wanted", [("auto", None), ("7", 7), (7, 7)])
def test_numbers_or_auto_from_a_command_line_a_file_or_python(value, wanted):
    assert read_stop_settings({"cs_interval": value, "window_size": value}, StopSettings()).cs_interval == wanted


def test_a_bare_switch_and_the_older_name_of_the_interval():
    settings = read_stop_settings(vars(parsed("--early_stop", "--cs_steps", "5")), StopSettings(calculate_cs=False))
    assert (settings.early_stop, settings.calculate_cs, settings.cs_interval) == (True, True, 5)
    off = read_stop_settings(vars(parsed("--calculate_cs", "False")), StopSettings())
    assert off.calculate_cs is False


def test_every_problem_is_said_at_once_by_its_flag():
    wrong = dict(early_stop="on?", cs_interval=0, window_size="many", stop_rule="best", cs_reduction="sum", valley=0)
    wrong.update(rule_value="x", shadows=-1, shadow_rank=0, shadow_interval="often", snapshot_disk_gb=0)
    _, problems = StopSettings().given(wrong)
    told = "; ".join(problems)
    for part in (
        "--early_stop on?: give True or False",
        "--cs_interval 0: give a number of 1 or more, or auto",
        "--window_size many: give a number of 1 or more, or auto",
        "--stop_rule best: stop rule 'best' is unknown",
        "--cs_reduction sum: choose row or matrix",
        "--valley 0: must be at least 1",
        "--rule_value x: ",
        "--shadows -1: must be at least 0",
        "--shadow_rank 0: must be at least 1",
        "--shadow_interval often: ",
        "--snapshot_disk_gb 0: must be above 0",
    ):
        assert part in told


def test_valley_is_the_number_of_nth_valley():
    assert read_stop_settings({"stop_rule": "nth-valley", "valley": "3"}, StopSettings()).rule_value == 3
    assert read_stop_settings({"stop_rule": "second-valley", "valley": 2}, StopSettings()).rule_value is None
    with pytest.raises(ValueError, match="--valley 3: the rule second-valley counts no valleys .* nth-valley"):
        read_stop_settings({"stop_rule": "second-valley", "valley": 3}, StopSettings())


def test_shadows_come_with_the_rule_that_needs_them_and_cannot_be_left_out():
    assert StopSettings().shadow_count == 0 and StopSettings(shadows=3).shadow_count == 3
    assert StopSettings(stop_rule="shadow").shadow_count == 1
    assert StopSettings(stop_rule="shadow", calculate_cs=False).shadow_count == 0
    with pytest.raises(ValueError, match="--stop_rule shadow decides on shadows: leave out --shadows 0"):
        read_stop_settings({"stop_rule": "shadow", "shadows": 0}, StopSettings())


@pytest.mark.parametrize(
    "components, asked, decides",
    [
        (["te", "unet"], None, "unet"),
        (["te"], None, "te"),
        (["te1", "te2"], None, "all"),
        (["lm"], None, "lm"),
        (["te", "unet"], "te", "te"),
        (["te", "unet"], "all", "all"),
    ],
)
def test_the_component_that_decides(components, asked, decides):
    plan = StopSettings(cs_component=asked).plan(components, 10, 100)
    assert plan.component == decides and plan.header()["decided_on"] == decides


def test_a_component_that_is_not_trained_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"--cs_component te: trained are unet \(or give all\)"):
        StopSettings(cs_component="te").plan(["unet"], 10, 100)


def test_settings_written_down_are_read_again():
    settings = StopSettings(
        early_stop=True, stop_rule="fixed-epochs", rule_value=3.0, window_size=9, shadow_interval=None
    )
    assert read_stop_settings(settings.as_flags(), StopSettings()) == settings
    assert settings.as_flags()["shadow_interval"] == "auto"


def test_given_flags_are_found_among_all_arguments():
    arguments = argparse.Namespace(early_stop=True, valley=3, rule_value=None, learning_rate=1e-4)
    assert stop_values(arguments) == {"early_stop": True, "valley": 3}
