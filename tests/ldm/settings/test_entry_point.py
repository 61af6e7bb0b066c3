"""Every program ends in one way: one message for a fault of input, a traceback for one of ours."""

import json

import pytest
import torch

from settings.entry_point import ended


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    "error, code, words",
    [
        (ValueError("two\nlines"), 2, "tool: two\ntool: lines\n"),
        (FileNotFoundError("x.txt does not exist"), 2, "tool: x.txt does not exist\n"),
        (PermissionError(13, "Permission denied", "out"), 1, "Permission denied: 'out'"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (json.JSONDecodeError("no", "{", 0), 2, "no: line 1"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "out of memory: lower --train_batch_size"),
        (RuntimeError("DefaultCPUAllocator: out of memory"), 2, "out of memory: lower --train_batch_size"),
        (MemoryError(), 2, "out of memory: lower --train_batch_size"),
        (ModuleNotFoundError("no", name="wandb.sdk"), 2, "wandb is not installed: pip install wandb"),
        (ModuleNotFoundError("no", name="streamlit"), 2, "pip install -r lora-ldm/requirements-extras.txt"),
        (ModuleNotFoundError("no", name="lycoris_lora"), 2, "pip install -r requirements-ldm.txt"),
        (KeyboardInterrupt(), 130, "tool: interrupted"),
    ],
)
def test_faults_of_input_and_of_the_machine_are_one_message(capsys, error, code, words):
    assert ended("tool", raising(error)) == code
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("x"), RuntimeError("shapes"), ModuleNotFoundError("no", name="images.none")]
)
def test_a_fault_of_ours_keeps_its_traceback_and_says_so(capsys, error):
    assert ended("tool", raising(error)) == 1
    message = capsys.readouterr().err
    assert "Traceback" in message and message.endswith("please report the lines above\n")


def test_what_the_work_gives_is_the_exit_code():
    assert [ended("tool", lambda code=code: code) for code in (0, 3)] == [0, 3]


def test_a_logger_that_is_not_installed_is_said_with_its_command(tmp_path, monkeypatch):
    from settings.parsing import parse_arguments

    monkeypatch.setattr("settings.checks.find_spec", lambda name: None)
    words = ["--pretrained_model_name_or_path", "owner/base", "--train_data_dir", str(tmp_path), "--resolution", "64"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError) as caught:
        parse_arguments([*words, "--output_dir", str(tmp_path / "file"), "--log_with", "wandb"])
    assert "--log_with wandb: the package wandb is not installed: pip install wandb" in str(caught.value)
    assert "is a file: name a folder" in str(caught.value)
