"""What every program says when it ends: whose fault it was, without the secrets of its command."""

import errno
import sys

import pytest

from es_lora.command_line import (
    HIDDEN,
    MachineFault,
    command_line,
    fault_of_machine,
    last_state_named,
    reported,
    without_secret_flags,
    without_secrets,
)

SECRET = "hf_abcdef123456"


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/x"),
        OSError(getattr(errno, "EDQUOT", errno.ENOSPC), "Disk quota exceeded"),
        OSError(errno.EROFS, "Read-only file system", "/x"),
        PermissionError(errno.EACCES, "Permission denied", "/nowhere/at/all"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/3"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"),
    ],
)
def test_a_fault_of_the_machine_is_one_message_and_code_1(error, capsys):
    assert reported("program", raising(error)) == 1
    said = capsys.readouterr().err
    assert said.startswith("program: ") and said.count("\n") == 1 and "Traceback" not in said


def test_a_file_that_may_not_be_read_is_a_fault_of_the_input(tmp_path, capsys, monkeypatch):
    file = tmp_path / "data"
    file.write_text("x")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert reported("program", raising(PermissionError(errno.EACCES, "Permission denied", str(file)))) == 2


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes differ"), ZeroDivisionError("x")])
def test_a_fault_of_ours_shows_its_traceback(error, capsys):
    assert reported("program", raising(error)) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "this is a fault of ES-LoRA" in said


def test_the_last_whole_state_is_named_once(capsys):
    def run():
        with last_state_named(lambda: "The last whole state is checkpoint-4."):
            raise OSError(errno.ENOSPC, "No space left on device")

    assert reported("program", run) == 1
    said = capsys.readouterr().err
    assert "the disk is full" in said and said.count("checkpoint-4") == 1 and "Traceback" not in said
    with pytest.raises(KeyError), last_state_named(lambda: "never"):
        raise KeyError
    assert fault_of_machine(MachineFault("as it is")) == "as it is"


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", SECRET],
        [f"--hub_token={SECRET}"],
        ["--hub-token", SECRET],
        ["--use_auth_token", SECRET],
        ["--wandb_api_key", SECRET, "--bits", "4"],
        [f"--huggingface_token={SECRET}"],
    ],
)
def test_a_secret_is_not_in_the_command_to_go_on_with_nor_in_a_message(words, monkeypatch, capsys):
    assert SECRET not in command_line("python", "x.py", words) and HIDDEN in command_line("python", "x.py", words)
    assert without_secrets(f"bad token {SECRET}!", words) == f"bad token {HIDDEN}!"
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    for error in (ValueError(f"no such repository ({SECRET})"), KeyError(SECRET)):
        reported("program", raising(error))
    told = capsys.readouterr()
    assert SECRET not in told.err + told.out and HIDDEN in told.err


def test_a_flag_whose_value_is_two_dashes_has_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--rank=--"])
    assert reported("program", lambda: 0) == 2
    assert "--rank has no value" in capsys.readouterr().err


def test_what_is_no_secret_stays():
    words = ["--use_auth_token", "True", "--hub_token", "--bits", "4"]
    assert command_line("python", "x.py", words).endswith("x.py --use_auth_token True --hub_token --bits 4")
    assert without_secret_flags({"hub_token": SECRET, "use_auth_token": True, "bits": 4}) == {
        "use_auth_token": True,
        "bits": 4,
    }
