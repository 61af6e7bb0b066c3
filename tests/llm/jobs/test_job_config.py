"""The jobs file: three notations, defaults, grids, and what is said of mistakes."""

import json
from pathlib import Path

import pytest
import yaml

from jobs.config import Job, read_jobs

CONTENT = {
    "defaults": {"dataset": "notes.jsonl", "rank": 8, "learning_rate": 2e-4},
    "jobs": [{"name": "plain", "rank": 2}, {"name": "own", "grid": {"alpha": [8, 16.5]}}],
    "grid": {"learning_rate": [1e-4, 3e-4]},
}
TOML = """
[defaults]
dataset = "notes.jsonl"
rank = 8
learning_rate = 2e-4
[[jobs]]
name = "plain"
rank = 2
[[jobs]]
name = "own"
grid = {alpha = [8, 16.5]}
[grid]
learning_rate = [1e-4, 3e-4]
"""
YAML = yaml.safe_dump(CONTENT).replace("0.0001", "1e-4")


@pytest.mark.parametrize("name, text", [("jobs.toml", TOML), ("jobs.yaml", YAML), ("jobs.json", json.dumps(CONTENT))])
def test_defaults_jobs_and_grids_in_every_notation(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    jobs = read_jobs(tmp_path / name)
    assert [(job.name, job.group, job.rank, job.learning_rate, job.alpha) for job in jobs] == [
        ("plain-learning_rate0.0001", "plain", 2, 1e-4, 16),
        ("plain-learning_rate0.0003", "plain", 2, 3e-4, 16),
        ("own-learning_rate0.0001-alpha8", "own", 8, 1e-4, 8),
        ("own-learning_rate0.0001-alpha16.5", "own", 8, 1e-4, 16.5),
        ("own-learning_rate0.0003-alpha8", "own", 8, 3e-4, 8),
        ("own-learning_rate0.0003-alpha16.5", "own", 8, 3e-4, 16.5),
    ]


def test_a_data_file_is_looked_for_here_and_beside_the_jobs_file(tmp_path, monkeypatch):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "near.jsonl").write_text("{}")
    (tmp_path / "here.jsonl").write_text("{}")
    entries = [{"name": name, "dataset": f"{name}.jsonl"} for name in ("near", "here", "nowhere")]
    (tmp_path / "jobs" / "jobs.json").write_text(json.dumps({"jobs": entries}))
    monkeypatch.chdir(tmp_path)
    found = [job.dataset for job in read_jobs("jobs/jobs.json")]
    assert found == [str(Path("jobs/near.jsonl")), "here.jsonl", "nowhere.jsonl"]


WRONG = {
    "a misspelt key of a job": (
        {"jobs": [{"name": "a", "dataset": "a.jsonl", "lerning_rate": 1}]},
        "did you mean learning_rate?",
    ),
    "a misspelt default": (
        {"defaults": {"rnak": 3}, "jobs": [{"name": "a"}]},
        r"\[defaults\]: rnak is unknown; did you",
    ),
    "a misspelt section": (
        {"job": [], "jobs": [{"name": "a", "dataset": "a.jsonl"}]},
        "job is unknown; did you mean jobs",
    ),
    "a misspelt key of the grid": (
        {"jobs": [{"name": "a", "dataset": "x"}], "grid": {"ranks": [1]}},
        "did you mean rank",
    ),
    "a grid without a list": ({"jobs": [{"name": "a", "dataset": "x"}], "grid": {"rank": 8}}, "rank = 8: give a list"),
    "no name": ({"jobs": [{"dataset": "a.jsonl"}]}, "job 1: give it a name"),
    "no jobs": ({"defaults": {"rank": 8}}, r"give a list of \[\[jobs\]\]"),
    "a name that is no folder": ({"jobs": [{"name": "../a", "dataset": "x"}]}, "it names a folder"),
    "no data": ({"jobs": [{"name": "a"}]}, "dataset is missing"),
    "a text for a number": ({"jobs": [{"name": "a", "dataset": "x", "rank": "8"}]}, "rank = '8': give a whole number"),
    "a number out of range": ({"jobs": [{"name": "a", "dataset": "x", "rank": 0}]}, "rank = 0: must be at least 1"),
    "NaN": (
        {"jobs": [{"name": "a", "dataset": "x", "learning_rate": float("nan")}]},
        "learning_rate = nan: must be above 0",
    ),
    "an unknown rule": (
        {"jobs": [{"name": "a", "dataset": "x", "stop_rule": "guess"}]},
        "stop_rule guess: stop rule 'guess' is unknown; choose one of",
    ),
    "a wrong word": (
        {"jobs": [{"name": "a", "dataset": "x", "window_size": "big"}]},
        "window_size big: give a number of 1 or more, or auto",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_named_with_what_to_do(tmp_path, mistake):
    content, message = WRONG[mistake]
    (tmp_path / "jobs.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_jobs(tmp_path / "jobs.json")


def test_all_mistakes_are_told_at_once(tmp_path):
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": [{"name": "a", "rnak": 1}, {"name": "b", "alhpa": 1}]}))
    with pytest.raises(ValueError, match="rnak is unknown.*alhpa is unknown"):
        read_jobs(tmp_path / "jobs.json")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "jobs.toml").write_text("[[jobs]\n")
    with pytest.raises(ValueError, match="is not valid TOML"):
        read_jobs(tmp_path / "jobs.toml")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_jobs(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="unknown kind of file '.ini'"):
        read_jobs(tmp_path / "jobs.ini")


def test_a_job_made_in_python_has_the_same_checks():
    assert Job("a", dataset="a.jsonl").problems() == []
    assert Job("a", dataset="a.jsonl", dropout=1.0).problems() == ["dropout = 1.0: must be at least 0 and below 1"]
