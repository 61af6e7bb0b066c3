"""What is cut or cannot be trained is said before the first step; refusals come before the base."""

import re
import shlex
import sys

import pytest
import sample_images
from ldm_runs import make_pictures, run

from base.loading import load_base_model
from base.text_encoding import what_is_cut
from es_lora.inputs import hub
from training.results import short_prompt


@pytest.fixture
def images(tmp_path):
    return make_pictures(tmp_path / "images", count=3)


def test_captions_and_prompts_beyond_the_length_are_counted_with_the_flag_that_keeps_them(
    base, images, tmp_path, capsys
):
    (tmp_path / "images/1_cat/0.txt").write_text("a " * 90)
    (tmp_path / "images/1_cat/1.txt").write_text("a " * 120 + ", red")
    (tmp_path / "prompts.txt").write_text("a " * 200 + "--s 1\n")
    assert run(base, images, tmp_path / "out", max_train_steps=1, shuffle_caption=True, caption_tag_dropout_rate=1) == 0
    out = capsys.readouterr().out
    assert "2 of 3 captions are cut at 75 tokens, the longest has 122: --max_token_length 150 keeps them whole" in out
    flags = {"max_token_length": 150, "sample_prompts": tmp_path / "prompts.txt", "max_train_steps": 1}
    assert run(base, images, tmp_path / "more", **flags) == 0
    out = capsys.readouterr().out
    assert "captions are cut" not in out and "1 of 1 prompts are cut at 150 tokens, the longest has 200" in out
    assert "--max_token_length 150 --prompt" in out


def test_the_tool_that_samples_says_it_too(base, tmp_path, capsys):
    words = ["--base", base, "--prompt", "a " * 100 + "--s 1", "--out", str(tmp_path), "--device", "cpu"]
    assert sample_images.main(words) == 0
    assert "1 of 1 prompts are cut at 75 tokens, the longest has 100: --max_token_length 150" in capsys.readouterr().err
    assert sample_images.main([*words, "--max_token_length", "150"]) == 0
    assert "cut" not in capsys.readouterr().err


def test_what_no_length_keeps_is_said_too(base):
    model = load_base_model(base)
    assert what_is_cut(model, ["a cat"], None) == []
    assert "--max_token_length 225 keeps more of them" in what_is_cut(model, ["a " * 300], None)[0]
    assert "shorten them" in what_is_cut(model, ["a " * 300], 225)[0]
    assert what_is_cut(model, ["(a:1.2) " * 70], None, weighted=True) == []


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"max_train_steps": 0}, "--max_train_steps 0 is not allowed"),
        ({"max_train_epochs": 0}, "--max_train_epochs 0 is not allowed"),
        ({"learning_rate": 0}, "nothing to train"),
        ({"unet_lr": 0, "network_train_unet_only": True}, "nothing to train"),
        ({"text_encoder_lr": 0, "network_train_text_encoder_only": True}, "nothing to train"),
        ({"unet_lr": 0, "train_full_unet": True, "network_alpha": None}, "nothing to train"),
        ({"initial_step": 20, "skip_until_initial_step": True}, "nothing left to train"),
    ],
)
def test_a_run_that_would_train_nothing_is_refused_before_the_base_is_loaded(images, tmp_path, capsys, flags, words):
    (tmp_path / "base").mkdir()  # no base at all: to load it would be another message
    assert run(str(tmp_path / "base"), images, tmp_path / "out", **flags) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_epoch_without_a_batch_is_refused(base, images, tmp_path, capsys):
    (tmp_path / "images/1_cat").rename(tmp_path / "images/0_cat")
    assert run(base, images, tmp_path / "out") == 2
    assert "0_cat has 0 repeats" in capsys.readouterr().err
    text = (
        f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = '{images}/0_cat'\nvalidation_split = 1.0\n"
    )
    (tmp_path / "data.toml").write_text(text)
    flags = {"dataset_config": tmp_path / "data.toml", "train_data_dir": None, "resolution": None}
    assert run(base, images, tmp_path / "out", **flags) == 2
    assert "there are no training images" in capsys.readouterr().err


def test_the_command_to_try_the_lora_shows_the_beginning_of_a_long_caption(base, images, tmp_path, capsys):
    for file in (tmp_path / "images/1_cat").glob("*.txt"):
        file.write_text(", ".join(f"tag{number}" for number in range(90)))
    assert run(base, images, tmp_path / "out", max_train_steps=1) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "sample_images.py" in line)
    prompt = shlex.split(line[line.index(sys.executable.rpartition("/")[2]) :])[-1]
    assert re.fullmatch(r"tag0(, tag\d+)+", prompt) and len(prompt) <= 120
    assert short_prompt("a cat") == "a cat" and len(short_prompt("x" * 500)) == 120


def test_an_empty_file_of_prompts_makes_no_previews(base, images, tmp_path, caplog):
    (tmp_path / "prompt.txt").write_text("")
    flags = {"sample_prompts": tmp_path / "prompt.txt", "sample_every_n_steps": 1, "max_train_steps": 1}
    assert run(base, images, tmp_path / "out", **flags) == 0
    assert "is empty: no previews are made" in caplog.text and not (tmp_path / "out" / "sample").exists()


def test_a_hub_name_fails_fast_where_the_hub_does_not_answer(images, tmp_path, capsys, monkeypatch):
    import time

    hub.answers.cache_clear()
    monkeypatch.setattr(hub, "ANSWER_SEC", 0.2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_asked", lambda endpoint: time.sleep(30))  # a search for the address that hangs
    started_at = time.monotonic()
    assert run("nobody/no-such-base", images, tmp_path / "out") == 2
    assert "give a local path" in capsys.readouterr().err and time.monotonic() - started_at < 20
    hub.answers.cache_clear()
