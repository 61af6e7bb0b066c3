"""A disk that is full or closed ends a run in one message, and the run can be gone on with; what a
run writes and says holds no secret of its command line."""

import shutil
import sys

import pytest
from ldm_runs import history_of, run, train, words
from safetensors.torch import load_file
from small_disk import SmallDisk, kilobytes_of

SECRET = "key_zyxwvutsrqponm"
SAVES = {"early_stop": "True", "stop_rule": "second-valley", "cs_interval": 1, "window_size": 2, "average": 0.25}
SAVES.update(save_state=True, save_every_n_steps=2, max_train_steps=12, train_batch_size=1, learning_rate=5e-3)


def kept(out):
    return {
        p.name: {k: v.tolist() for k, v in load_file(str(p)).items()} for p in sorted(out.glob("lora*.safetensors"))
    }


@pytest.fixture(scope="module")
def undisturbed(base, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(base, images, out, **SAVES)
    return out


@pytest.mark.parametrize("share", [0.02, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9])
def test_a_full_disk_is_one_message_and_the_run_goes_on_to_the_same_end(
    undisturbed, base, images, tmp_path, capsys, monkeypatch, share
):
    disk = SmallDisk(tmp_path / "disk", max(8, int(share * kilobytes_of(undisturbed))))
    try:
        out = disk.folder / "run"
        monkeypatch.setattr(sys, "argv", ["es_lora_ldm.py", *words(base, images, out, **SAVES)])
        assert run(base, images, out, **SAVES) == 1
        said = capsys.readouterr().err
        told = [line for line in said.splitlines() if line.startswith("es_lora_ldm:")]
        assert len(told) == 1 and "the disk is full" in told[0] and "Traceback" not in said
        states = sorted(path for path in out.glob("*-state"))
        assert ("--resume" in told[0]) == bool(states)
        disk.remount("size=64m")
        if not states:
            shutil.rmtree(out)
        train(base, images, out, **SAVES, **({"resume": states[-1]} if states else {}))
        assert kept(out).keys() >= {"lora.safetensors"} and history_of(out) == history_of(undisturbed)
        for name, tensors in kept(undisturbed).items():
            assert kept(out)[name] == tensors
    finally:
        disk.close()


def test_a_disk_that_cannot_be_written_to_is_one_message(base, images, tmp_path, capsys):
    disk = SmallDisk(tmp_path / "disk", 1000)
    try:
        disk.remount("ro")
        assert run(base, images, disk.folder / "run") == 1
        said = capsys.readouterr().err
        assert "nothing can be written there" in said and said.count("es_lora_ldm:") == 1 and "Traceback" not in said
    finally:
        disk.close()


@pytest.mark.parametrize("name", ["wandb_api_key", "huggingface_token"])
def test_no_secret_is_written_or_said(base, images, tmp_path, capsys, monkeypatch, name):
    out = tmp_path / "run"
    settings = {**SAVES, name: SECRET, "log_with": "tensorboard", "logging_dir": out / "logs", "log_config": True}
    monkeypatch.setattr(sys, "argv", ["es_lora_ldm.py", *words(base, images, out, **settings)])
    code = run(base, images, out, **settings)
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err
    assert code == 0 or "is not supported" in captured.err
    files = [path for path in out.rglob("*") if path.is_file()]
    assert (len(files) > 15) == (code == 0)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
