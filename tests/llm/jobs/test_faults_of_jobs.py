"""Kills, full disks and names: every job ends as in a run that nothing had disturbed."""

import errno
import json

import multi_lora
import pytest
from multi_lora import train_jobs

import jobs.run
from es_lora.history import read_history
from jobs.config import MOST_JOBS, Job, read_jobs
from jobs.loop import FusedTraining

OPTIONS = {"bits": 32, "use_cpu": True, "max_jobs": 2, "say": lambda text: None}


def job(name, text_files, **values):
    usual = {"rank": 4, "batch_size": 4, "accumulation": 1, "cs_interval": 1, "window_size": 2, "learning_rate": 1e-3}
    return Job(name, dataset=str(text_files["train"]), **{**usual, **values})


def adapter_bytes(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("adapter*/adapter_*"))}


class Killed(BaseException):
    """What a kill is to the code that it ends: nothing after it runs."""


@pytest.fixture(scope="module")
def jobs_of_three(text_files):
    """Two slots, so that the third begins when another ends."""
    return [
        job("first", text_files, max_steps=5, dropout=0.1),
        job("second", text_files, max_steps=9, batch_size=2, early_stop=False),
        job("third", text_files, max_steps=4, rank=2),
    ]


@pytest.fixture(scope="module")
def undisturbed(random_base, jobs_of_three, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train_jobs(jobs_of_three, random_base, folder, **OPTIONS)
    return facts(folder)


def facts(folder, names=("first", "second", "third")):
    found = {}
    for name in names:
        result = json.loads((folder / name / "result.json").read_text())
        left = [path.name for path in (folder / name).iterdir() if path.name.startswith((".", "state", "cs_snap"))]
        found[name] = [result["last_step"], read_history(folder / name).records, adapter_bytes(folder / name), left]
        assert (folder / name / "report.html").is_file()
    return found


def resumed(given, base, folder):
    train_jobs(given, base, folder, resume=True, save_minutes=0.0, **OPTIONS)
    return facts(folder)


KILLS = [("write_run_report", 1), ("write", 2), ("close", 2), ("forget_states", 2), ("forget_older", 9)]
KILLS += [("write_round", 3), ("save", 8)]


@pytest.mark.parametrize(("place", "nth"), KILLS)
def test_a_kill_at_any_moment_of_an_end_or_a_save_changes_nothing(
    random_base, jobs_of_three, undisturbed, tmp_path, monkeypatch, place, nth
):
    owner, name = {
        "write_run_report": (jobs.run, "write_run_report"),
        "write": (jobs.run.Outcome, "write"),
        "close": (jobs.run.EarlyStopMonitor, "close"),
        "forget_states": (jobs.loop, "forget_states"),
        "forget_older": (jobs.run.JobRun, "forget_older"),
        "write_round": (jobs.loop.SavedRound, "write"),
        "save": (jobs.run.JobRun, "save"),
    }[place]
    usual, calls = getattr(owner, name), []

    def killed(*words, **more):
        calls.append(1)
        if len(calls) == nth:
            raise Killed
        return usual(*words, **more)

    monkeypatch.setattr(owner, name, killed)
    with pytest.raises(Killed):
        train_jobs(jobs_of_three, random_base, tmp_path / "parts", save_minutes=0.0, **OPTIONS)
    monkeypatch.setattr(owner, name, usual)
    assert resumed(jobs_of_three, random_base, tmp_path / "parts") == undisturbed


def test_other_bounds_of_a_pass_are_said_before_a_resumed_run_goes_on(
    random_base, jobs_of_three, tmp_path, monkeypatch
):
    usual = FusedTraining._round

    def killed(training):
        usual(training)
        training._save_all()
        raise Killed

    monkeypatch.setattr(FusedTraining, "_round", killed)
    with pytest.raises(Killed):
        train_jobs(jobs_of_three, random_base, tmp_path / "out", **OPTIONS)
    monkeypatch.setattr(FusedTraining, "_round", usual)
    said = []
    more = {**OPTIONS, "say": said.append, "max_rows": 8}
    train_jobs(jobs_of_three, random_base, tmp_path / "out", resume=True, **more)
    assert "rows of other jobs may share a pass" in said[0] and "goes on from step" in said[1]


def test_a_full_disk_is_one_message_that_names_the_state_and_the_command(
    random_base, text_files, tmp_path, monkeypatch, capsys
):
    entry = {"dataset": str(text_files["train"]), "rank": 2, "batch_size": 4, "accumulation": 1, "max_steps": 6}
    config = tmp_path / "jobs.json"
    config.write_text(json.dumps({"defaults": entry, "jobs": [{"name": "first"}, {"name": "second"}]}))
    words = ["--base_model", str(random_base), "--config", str(config), "--bits", "32", "--use_cpu"]
    words += ["--save_minutes", "0", "--output_dir"]
    assert multi_lora.main([*words, str(tmp_path / "whole")]) == 0
    usual, calls = jobs.run.save_file, []

    def full(tensors, path):
        calls.append(1)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        usual(tensors, path)

    monkeypatch.setattr(jobs.run, "save_file", full)
    capsys.readouterr()
    assert multi_lora.main([*words, str(tmp_path / "parts")]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("multi_lora: ")]
    assert len(told) == 1 and "the disk is full" in told[0] and "state-2" in told[0] and "--resume true" in told[0]
    monkeypatch.setattr(jobs.run, "save_file", usual)
    assert multi_lora.main([*words, str(tmp_path / "parts"), "--resume", "true"]) == 0
    names = ("first", "second")
    assert facts(tmp_path / "parts", names) == facts(tmp_path / "whole", names)


# --------------------------------------------------------------------------------- names and bounds

OWN = ["overview", "overview.html", "overview.json", "Overview", "states", "states.json", "1-states.json"]
OWN += ["random_state.safetensors", "con", "nul.txt"]
NO_FOLDERS = [
    "",
    ".",
    "..",
    "a/b",
    "../a",
    "a\\b",
    "a\nb",
    ".hidden",
    "-a",
    "a b",
    "a:",
    "a\0b",
    "x" * 201,
    "\u00e9" * 120,
    "a.",
]


def write_jobs(folder, *names, **more):
    file = folder / "jobs.json"
    file.write_text(json.dumps({"jobs": [{"name": name, "dataset": "x.jsonl"} for name in names], **more}))
    return file


@pytest.mark.parametrize("name", [*OWN, *NO_FOLDERS])
def test_a_name_that_is_no_folder_or_the_runs_own_is_refused_before_anything_is_read(tmp_path, name):
    with pytest.raises(ValueError, match="name = ") as refused:
        read_jobs(write_jobs(tmp_path, name))
    assert len(str(refused.value)) < 500


def test_names_that_differ_by_case_alone_are_one_folder(random_base, text_files, tmp_path):
    said = []
    given = [job(name, text_files, max_steps=1) for name in ("a", "A")]
    overview = train_jobs(given, random_base, tmp_path / "out", **{**OPTIONS, "say": said.append})
    assert [entry["outcome"] == "refused" for entry in overview["jobs"]] == [False, True]
    assert any("another job has this name already" in text for text in said)


@pytest.mark.parametrize(
    ("names", "grid", "count"),
    [
        (["a"], {key: list(range(1, 60)) for key in ("rank", "seed", "batch_size", "accumulation")}, 59**4),
        (["a", "b"], {"seed": list(range(501))}, 1002),
        ([f"a{number}" for number in range(MOST_JOBS + 1)], {}, MOST_JOBS + 1),
    ],
)
def test_a_grid_beyond_the_limit_is_counted_and_not_expanded(tmp_path, names, grid, count):
    with pytest.raises(ValueError, match=f"its grids make {count} jobs, and a run takes {MOST_JOBS} at most"):
        read_jobs(write_jobs(tmp_path, *names, grid=grid))
    assert len(read_jobs(write_jobs(tmp_path, "a", grid={"seed": list(range(MOST_JOBS))}))) == MOST_JOBS


NUMBERS = ["rank", "batch_size", "accumulation", "max_steps", "epochs", "learning_rate", "alpha", "dropout", "seed"]
NUMBERS += ["weight_decay", "max_grad_norm", "warmup_ratio", "eval_dataset_size", "source_max_len", "priority"]
NUMBERS += ["max_train_samples", "rule_value", "window_size", "cs_interval", "snapshot_disk_gb", "average", "valley"]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "-1e9", "1e400", "1" * 30])
def test_no_number_without_end_is_taken(tmp_path, key, text):
    file = tmp_path / "jobs.toml"
    file.write_text(f'[[jobs]]\nname = "a"\ndataset = "x.jsonl"\n{key} = {text}\n')
    if text.isdigit() and key in ("learning_rate", "alpha", "weight_decay", "max_grad_norm"):
        assert read_jobs(file)  # large and finite: it may diverge, which is told
        return
    with pytest.raises(ValueError, match=key if key != "rule_value" else "was given"):
        read_jobs(file)


FLAGS = ("--max_rows", "--max_jobs", "--memory_gb", "--save_minutes")


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("text", ["nan", "inf", "1e999", "-1", "9" * 5000, "x", ""])
def test_flags_that_are_no_numbers_are_refused_by_the_parser(flag, text, capsys):
    with pytest.raises(SystemExit) as ended:
        multi_lora.main(["--base_model", "b", "--config", "c", f"{flag}={text}"])
    assert ended.value.code == 2 and flag in capsys.readouterr().err
