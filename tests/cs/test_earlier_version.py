"""What the version before the rooms recorded and saved is read, decided again and judged as that
version did."""

import json
from pathlib import Path

import pytest
from cs_replay import main as replay_main
from judge_checkpoints import main as judge_main

from es_lora.history import read_history, redecide

ROOT = Path(__file__).resolve().parents[2]
EARLIER = ROOT / "tests" / "golden" / "earlier_version"


def facts(kind):
    return json.loads((EARLIER / kind / "command.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["llm", "ldm"])
def test_a_history_is_decided_again_as_before(kind):
    history, expected = read_history(EARLIER / kind), facts(kind)["replay"]
    assert redecide(history, "recorded") == expected["recorded"]
    assert redecide(history) == expected["default"]
    if kind == "ldm":
        assert redecide(history, "recorded", component="te") == expected["recorded, te"]
    else:
        assert redecide(history, "second-valley") == expected["second-valley"]


def test_a_history_under_a_rule_that_has_moved_is_one_message_and_other_rules_decide_it(capsys):
    assert replay_main([str(EARLIER / "cs-fall"), "--rule", "recorded"]) == 2
    told = capsys.readouterr().err
    assert "'cs-fall' is a baseline of tests/benchmarks/stop_quality now" in told and told.count("\n") == 1
    assert replay_main([str(EARLIER / "cs-fall")]) == 0


VERDICTS = json.loads((EARLIER / "judge" / "verdicts.json").read_text(encoding="utf-8"))["verdicts"]


@pytest.mark.parametrize("name", [name for name in VERDICTS if "without" not in name])
def test_saved_adapters_are_judged_as_before(name, capsys):
    flags, expected = VERDICTS[name]["flags"], VERDICTS[name]["says"]
    folder = str(EARLIER / "judge" / "run")
    assert judge_main([folder, "--base", str(ROOT / "lora-llm" / "tiny_base"), "--json", *flags]) == 0
    verdict = json.loads(capsys.readouterr().out)
    same = ("rule", "window", "stopped", "stop_step", "turning_step", "reason", "keep", "usable", "certainty")
    assert {key: verdict[key] for key in same} == {key: expected[key] for key in same}
    assert [row["step"] for row in verdict["checkpoints"]] == [row["step"] for row in expected["checkpoints"]]
    assert verdict["not_judged"] == expected["not_judged"]


def test_the_monitor_can_be_had_where_it_once_was():
    import cs_fluctuation
    from es_lora.monitor import EarlyStopMonitor

    assert cs_fluctuation.EarlyStopMonitor is EarlyStopMonitor
    assert not hasattr(cs_fluctuation, "SnapshotStore")
