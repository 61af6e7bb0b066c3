"""Replaying a recorded run: decisions, torn files, the command line, the picture and the page."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cs_replay import main

from es_lora.history import read_history, redecide
from es_lora.report import draw, write_report

REPLAY = Path(__file__).resolve().parents[2] / "lora-llm" / "cs_replay.py"


@pytest.fixture
def history(tmp_path):
    """A recorded random walk of 90 measurements, two components, an evaluation every tenth."""
    generator = np.random.default_rng(3)
    walks = {"unet": np.cumsum(generator.normal(size=90)) * 1e-3, "te": np.cumsum(generator.normal(size=90)) * 1e-3}
    header = {"format": "cs-history/1", "cs_interval": 2, "window": 5, "steps_per_epoch": 16, "reduction": "matrix"}
    lines = [{**header, "decided_on": "unet", "rule": "nth-valley", "valley": 3}]
    for k in range(90):
        cs = {name: float(walk[k]) for name, walk in walks.items()}
        record = {"step": 2 * k + 2, "epoch": k / 8, "cs": {**cs, "all": 0.5 * sum(cs.values())}, "loss": 3.0 / (k + 1)}
        lines.append({**record, "grad_evidence": 3.0 - k / 20})
        if k % 10 == 9:
            lines.append({"event": "evaluation", "step": 2 * k + 2, "heldout_loss": 2.0 + (k - 40) ** 2 / 1000})
    path = tmp_path / "cs_history.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_default_rule_applies_whatever_the_header_says(history):
    run = read_history(history)
    assert redecide(run)["rule"] == "gradient-agreement"
    assert (redecide(run)["turning_step"], redecide(run)["stop_step"]) == (84, 84)  # the first with an evidence below 1
    assert redecide(run, "recorded")["rule"] == "nth-valley"
    assert redecide(run, "recorded") == redecide(run, "nth-valley", window=5, value=3)
    assert redecide(run, "nth-valley", value=1)["stop_step"] < redecide(run, "recorded")["stop_step"]
    assert redecide(run, window="auto")["window"] == 8
    assert redecide(run, "second-valley", component="te") != redecide(run, "second-valley")


def test_json_has_the_promised_keys_and_nulls_where_nothing_stops(history, capsys):
    assert main([str(history), "--rule", "second-valley", "--window", "5", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert list(verdict) == ["rule", "window", "stopped", "stop_step", "turning_step", "reason"]
    assert verdict["stopped"] and verdict["turning_step"] == verdict["stop_step"] - 2 * (3 * 5 - 2)
    assert main([str(history.parent), "--rule", "second-valley", "--window", "30", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["stopped"], verdict["stop_step"], verdict["turning_step"]) == (False, None, None)


def test_a_torn_last_line_is_passed_over_and_a_damaged_middle_is_not(history):
    whole = read_history(history)
    text = history.read_text()
    history.write_text(text[: -len(text.splitlines()[-1]) // 2])
    assert len(read_history(history).records) + len(read_history(history).events) == 98
    lines = text.splitlines()
    lines[40] = lines[40][:20]
    history.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="line 41"):
        read_history(history)
    assert len(whole.records) == 90


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.jsonl"], "no history at nowhere.jsonl"),
        (["{history}", "--component", "te2"], "'te2' is not recorded"),
        (["{history}", "--window", "0"], "nor auto"),
        (["{history}", "--rule", "third-valley"], "is unknown; choose one of second-valley"),
        (["{history}", "--rule", "cs-fall"], "is a baseline of tests/benchmarks/stop_quality now"),
        (["{history}", "--rule", "second-valley", "--valley", "3"], "use the rule nth-valley"),
        (["{other}"], "no header"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(history, tmp_path, capsys, arguments, message):
    (tmp_path / "other.jsonl").write_text('{"step": 1}\n')
    names = {"history": str(history), "other": str(tmp_path / "other.jsonl")}
    try:
        code = main([argument.format(**names) for argument in arguments])
    except SystemExit as exit_:  # argparse ends so
        code = exit_.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_it_runs_as_a_program_from_any_folder(history, tmp_path):
    command = [sys.executable, str(REPLAY), str(history), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and json.loads(result.stdout)["rule"] == "gradient-agreement"
    assert result.stderr == ""


def test_the_picture_shows_losses_cs_fluctuation_and_the_steps_that_matter(history, tmp_path):
    run = read_history(history)
    figure = draw(run, None, 5, "unet")
    labels = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes]
    assert labels[0][:2] == ["training loss", "held-out loss"]
    assert {"unet (matrix)", "te (matrix)", "all (matrix)"} <= set(labels[1])
    assert "CS-Fluctuation of unet, M = 5" in labels[2] and "valley" in labels[2]
    assert figure.axes[2].get_yscale() == "log"
    assert labels[3][:2] == ["gradient evidence", "what memorising alone leaves"]
    assert main([str(history), "--plot", str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_is_one_self_contained_file_and_escapes_what_it_shows(history, tmp_path):
    page = tmp_path / "report.html"
    table = ("Losses", ["weights", "held-out"], [["kept", 1.5]])
    write_report(page, history, verdict="Kept <step> 12.", settings={"data": "<script>"}, tables=[table])
    text = page.read_text()
    assert "Kept &lt;step&gt; 12." in text and "&lt;script&gt;" in text
    assert "<svg" in text and "kept</td><td>1.5" in text
    assert 'src="http' not in text and "<script" not in text and "<link" not in text
    assert main([str(history), "--html", str(tmp_path / "again.html")]) == 0


def test_a_panel_that_has_no_values_is_left_out(history, tmp_path):
    run = read_history(history)
    for record in run.records:
        record.update(loss=None, grad_evidence=None)
    run.events.clear()
    figure = draw(run, None, 60, "unet")
    titles = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
    assert titles == ["CS (cosine similarity)"]  # no losses, no evidence, and too few measurements for this window


def test_a_rule_that_has_not_decided_says_so_in_the_table_of_other_rules(history, tmp_path):
    page = tmp_path / "report.html"
    text = history.read_text().splitlines()
    history.write_text("\n".join(text[:6]) + "\n")
    write_report(page, history, verdict="Kept.")
    assert "had not decided when the run ended" in page.read_text()
