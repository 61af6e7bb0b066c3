"""One run at a time in an output folder, and what a killed one leaves half written."""

import json
import os
import socket
import subprocess
import sys

import pytest

from es_lora.files import refuse_in_the_way, sweep
from es_lora.folder_lock import LOCK_NAME, locked


def owner(**facts):
    known = {"program": "other", "pid": os.getpid(), "started": "noon", "host": socket.gethostname(), "born": None}
    return json.dumps({**known, **facts})


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return process.pid


def test_the_folder_is_held_and_free_again(tmp_path):
    with locked(tmp_path, "mine"):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
        with pytest.raises(ValueError, match=r"is held by mine \(process .*, which is at work"):
            locked(tmp_path, "second").__enter__()
    assert not (tmp_path / LOCK_NAME).exists()


def test_it_is_free_again_after_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "run", "mine"):
        raise KeyError
    assert not (tmp_path / "run").exists()  # it was made for the run, and nothing is in it


def test_a_folder_that_was_there_stays(tmp_path):
    with locked(tmp_path, "mine"):
        pass
    assert tmp_path.is_dir()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 3}'])
def test_a_torn_lock_is_taken_over(tmp_path, text):
    (tmp_path / LOCK_NAME).write_text(text)
    with locked(tmp_path, "mine"):
        pass


def test_a_dead_runs_lock_is_taken_over_and_said(tmp_path):
    said = []
    (tmp_path / LOCK_NAME).write_text(owner(pid=ended_process()))
    with locked(tmp_path, "mine", said.append):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["program"] == "mine"
    assert len(said) == 1 and "other (process" in said[0] and "has died" in said[0]


def test_a_number_that_was_given_again_is_another_process(tmp_path):
    if not os.path.isdir("/proc/self"):
        pytest.skip("processes tell their start in /proc alone")
    (tmp_path / LOCK_NAME).write_text(owner(born="1"))
    with locked(tmp_path, "mine", lambda text: None):
        pass


def test_on_another_host_nobody_can_tell(tmp_path):
    (tmp_path / LOCK_NAME).write_text(owner(host="elsewhere", pid=ended_process()))
    with pytest.raises(ValueError, match=f"on elsewhere, .*if that run is over, delete .*{LOCK_NAME}"):
        locked(tmp_path, "mine").__enter__()


def test_what_was_left_half_written_goes_and_nothing_else(tmp_path):
    gone = [".result.json.17.tmp", ".checkpoint.part/checkpoint-3/x", ".adapter.abcdefgh.part/x", ".x-state.part/y"]
    gone += ["cs_snapshots/.step-00000001.safetensors.5.tmp/.tmp04Fg9o", ".checkpoint-2.old/x"]
    stays = [".notes.old", ".bashrc.12.tmp", "checkpoint-2/x", ".hidden/.result.jsonx", "photo.part"]
    for name in gone + stays:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    sweep(tmp_path)
    assert not any((tmp_path / name).exists() for name in gone) and all((tmp_path / name).exists() for name in stays)


def test_a_folder_that_had_stepped_aside_for_one_that_never_came_gets_its_name_back(tmp_path):
    (tmp_path / ".checkpoint-4.old").mkdir()
    (tmp_path / ".checkpoint-4.old" / "trainer_state.json").write_text("{}")
    sweep(tmp_path)
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").is_file()


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "result.json").mkdir()
    (tmp_path / "adapter").write_text("")
    with pytest.raises(ValueError, match="result.json is a folder and in the way of a file"):
        refuse_in_the_way(tmp_path, ["result.json"])
    with pytest.raises(ValueError, match="adapter is a file and in the way of a folder"):
        refuse_in_the_way(tmp_path, ["report.html"], ["adapter"])
