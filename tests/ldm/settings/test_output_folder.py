"""What lies in the output folder: an earlier run is not written over, what is in the way is seen
before training, and no name leads out of the folder."""

import hashlib
from argparse import Namespace

import pytest
from ldm_runs import run, train

from settings.output_folder import LONGEST_NAME_BYTES, output_problems


def digests(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts)
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}


def settings(folder, **changes):
    usual = dict(output_name=None, resume=None, use_safetensors=False, save_model_as=None, train_full_unet=False)
    return Namespace(output_dir=str(folder), **{**usual, **changes})


@pytest.mark.parametrize("more", [{}, dict(calculate_cs=True), dict(output_name="other"), dict(save_state=True)])
def test_an_earlier_run_stays_as_it_was(base, images, tmp_path, capsys, more):
    train(base, images, tmp_path / "out", max_train_steps=2, calculate_cs=True, cs_interval=1)
    before = digests(tmp_path)
    assert {"lora.safetensors", "result.json", "report.html", "cs_history.jsonl"} <= {path.name for path in before}
    assert run(base, images, tmp_path / "out", max_train_steps=2, seed=2, **more) == 2
    message = capsys.readouterr().err
    assert "of another run; choose another output folder" in message and "result.json" in message
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["x.safetensors", "x-last.safetensors", "x-turning-point.safetensors", "x-000003.safetensors",
             "x-step00000004.safetensors", "result.json", "report.html", "cs_history.jsonl"],
)  # fmt: skip
def test_every_file_that_would_be_written_over_is_seen(tmp_path, name):
    assert output_problems(settings(tmp_path, output_name="x")) == []
    (tmp_path / name).write_text("earlier")
    (line,) = output_problems(settings(tmp_path, output_name="x"))
    assert f"holds {name} of another run; choose another output folder" in line


def test_files_of_other_names_and_kinds_are_no_earlier_run(tmp_path):
    for name in ("xy.safetensors", "x.txt", "x-final.safetensors", "train.log", "x.ckpt"):
        (tmp_path / name).write_text("")
    assert output_problems(settings(tmp_path, output_name="x")) == []
    assert output_problems(settings(tmp_path, output_name="x", save_model_as="ckpt"))
    assert output_problems(settings(tmp_path, output_name="x.")) == []  # a name is no pattern


def test_a_run_is_resumed_in_its_own_folder_and_not_over_another(base, images, tmp_path, capsys):
    for name in ("a", "b"):
        train(base, images, tmp_path / name, max_train_steps=2, save_state=True)
    state, before = str(tmp_path / "a/lora-state"), digests(tmp_path / "b")
    train(base, images, tmp_path / "a", max_train_steps=3, resume=state)
    assert run(base, images, tmp_path / "b", max_train_steps=3, resume=state) == 2
    assert f"or go on with --resume {tmp_path}/b/lora-state" in capsys.readouterr().err
    assert digests(tmp_path / "b") == before
    train(base, images, tmp_path / "c", max_train_steps=3, resume=state)


@pytest.mark.parametrize(
    "name, words",
    [
        ("", "names no file"),
        (".", "names no file"),
        ("..", "names no file"),
        ("../x", "leaves the output folder"),
        ("a/b", "leaves the output folder"),
        ("a\\b", "leaves the output folder"),
        ("/tmp/x", "leaves the output folder"),
        ("a\nb", "leaves the output folder"),
        ("x" * (LONGEST_NAME_BYTES + 1), "is too long"),
        ("ä" * (LONGEST_NAME_BYTES // 2 + 1), "is too long"),
    ],
)
def test_a_name_stays_in_the_output_folder(base, images, tmp_path, capsys, name, words):
    assert run(base, images, tmp_path / "out", output_name=name) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_longest_name_can_be_written(base, images, tmp_path):
    name = "x" * LONGEST_NAME_BYTES
    train(base, images, tmp_path, output_name=name, max_train_steps=1, save_state=True)
    assert (tmp_path / f"{name}.safetensors").is_file() and (tmp_path / f"{name}-state").is_dir()


@pytest.mark.parametrize("resume", [None, "x-state"])
@pytest.mark.parametrize(
    "name", ["result.json", "report.html", "cs_history.jsonl", "x.safetensors", "x-last.safetensors"]
)
def test_a_folder_with_the_name_of_a_file_is_seen(tmp_path, name, resume):
    (tmp_path / name).mkdir()
    resume = resume and str(tmp_path / resume)
    (line,) = output_problems(settings(tmp_path, output_name="x", resume=resume))
    assert f"{name} is a folder, a file is to be written there" in line


@pytest.mark.parametrize("name", ["cs_snapshots", "sample", "x-step00000003-state", "x-state"])
def test_a_file_with_the_name_of_a_folder_is_seen(tmp_path, name):
    (tmp_path / name).write_text("")
    (line,) = output_problems(settings(tmp_path, output_name="x"))
    assert f"{name} is a file, a folder is to be made there" in line


def test_an_output_folder_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file: name a folder" in output_problems(settings(tmp_path / "file"))[0]
    assert f"lies below {tmp_path}/file, which is a file" in output_problems(settings(tmp_path / "file/a/b"))[0]
    assert "name too long" in output_problems(settings(tmp_path / ("x" * 300)))[0]
    assert output_problems(settings(tmp_path / "new/er")) == []


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_equal_runs_give_equal_files_but_for_the_times(tmp_path, kind):
    import torch

    from network.lora_file import load_lora, save_lora

    tensors = {f"lora_unet_{n}.lora_{part}.weight": torch.full((2, 2), n) for n in range(9) for part in ("up", "down")}
    metadata = {f"ss_key_{n}": f'"ü"\t\x01/ {n}\u2028🙂' for n in range(40)}
    for name in ("a", "b"):
        save_lora(tmp_path / f"{name}.{kind}", dict(tensors), dict(metadata))
    first, second = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("a", "b"))
    assert first == second
    if kind == "safetensors":
        assert load_lora(tmp_path / "a.safetensors")[1].items() >= metadata.items()
        header = first[8 : 8 + int.from_bytes(first[:8], "little")].decode()
        assert [header.index(f"ss_key_{n}") for n in range(10, 40)] == sorted(
            header.index(f"ss_key_{n}") for n in range(10, 40)
        )


TIMES = {"ss_training_started_at", "ss_training_finished_at", "modelspec.date"}


def test_the_files_of_equal_runs_differ_in_their_times_only(base, images, tmp_path):
    import json

    headers, bodies = [], []
    for name in ("a", "b"):
        train(base, images, tmp_path / name, max_train_steps=2, calculate_cs=True)
        content = (tmp_path / name / "lora.safetensors").read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        assert set(header["__metadata__"]) >= TIMES
        header["__metadata__"] = {k: v for k, v in header["__metadata__"].items() if k not in TIMES}
        headers.append(json.dumps(header))  # in the order of the file
        bodies.append(content[end:])
    assert headers[0] == headers[1] and bodies[0] == bodies[1]
