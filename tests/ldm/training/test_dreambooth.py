"""DreamBooth: class pictures that are generated when they are too few, the trigger word, and
training the whole U-Net."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_runs import make_pictures, result_of, run, train
from PIL import Image
from safetensors.torch import load_file

from base.sd import load_sd_model
from images.captions import process_caption
from images.dataset_settings import SubsetSettings
from network.lora_file import load_lora


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("images"), count=4)


CLASS = dict(num_class_images=3, class_prompt="a photo of a dog", max_train_steps=2)


def pictures_in(folder):
    return {path.name: np.array(Image.open(path)) for path in sorted(Path(folder).rglob("*.png"))}


def test_missing_class_pictures_are_generated_and_trained_on(base, images, tmp_path, capsys):
    reg = str(tmp_path / "reg")
    train(base, images, tmp_path / "a", **CLASS, reg_data_dir=reg)
    first = pictures_in(reg)
    assert len(first) == 3 and all(picture.shape == (32, 32, 3) for picture in first.values())
    assert len({picture.tobytes() for picture in first.values()}) == 3
    assert {path.read_text() for path in Path(reg).rglob("*.txt")} == {"a photo of a dog\n"}
    assert "generating 3 class pictures" in capsys.readouterr().out
    metadata = load_lora(tmp_path / "a" / "lora.safetensors")[1]
    assert (
        metadata["ss_num_train_images"] == "4" and metadata["ss_num_reg_images"] == "4"
    )  # repeated until they are as many
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"1_class": {"n_repeats": 1, "img_count": 3}}

    train(base, images, tmp_path / "b", **CLASS, reg_data_dir=reg)
    assert "generating" not in capsys.readouterr().out
    removed = sorted(Path(reg).rglob("*.png"))[0]
    removed.unlink()
    train(base, images, tmp_path / "c", **CLASS, reg_data_dir=reg)  # as after an interruption
    again = pictures_in(reg)
    assert again.keys() == first.keys() and all(np.array_equal(again[name], first[name]) for name in first)


def test_pictures_of_ones_own_are_kept_and_counted(base, images, tmp_path):
    reg = make_pictures(tmp_path / "reg", count=2, repeats=5, name="animal")
    before = pictures_in(reg)
    train(base, images, tmp_path / "out", **CLASS, reg_data_dir=reg)
    after = pictures_in(reg)
    assert len(after) == 3 and all(np.array_equal(after[name], before[name]) for name in before)
    assert [path.name for path in Path(reg).iterdir()] == ["5_animal"]


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a photo, red", "CUS statue, a photo, red"),
        ("CUS statue on a table", "CUS statue on a table"),
        ("cus statue", "cus statue"),
        ("CUS statues", "CUS statue, CUS statues"),
        ("", "CUS statue"),
    ],
)
def test_trigger_word_comes_first_once(caption, expected):
    subset = SubsetSettings(trigger_word="CUS statue")
    assert process_caption(caption, subset, random.Random(0), epoch=0, step=0) == expected


def test_trigger_word_stays_first_and_out_of_class_captions():
    shuffled = SubsetSettings(trigger_word="<cus>", shuffle_caption=True, caption_tag_dropout_rate=0.5)
    rng = random.Random(0)
    captions = {process_caption("a, b, c, d", shuffled, rng, epoch=0, step=0) for _ in range(20)}
    assert len(captions) > 5 and all(caption.startswith("<cus>") for caption in captions)
    of_class = SubsetSettings(trigger_word="<cus>", is_reg=True)
    assert process_caption("a statue", of_class, rng, epoch=0, step=0) == "a statue"


def test_trigger_word_reaches_captions_and_file(base, images, tmp_path, capsys):
    assert run(base, images, tmp_path / "out", debug_dataset=True, trigger_word="CUS statue") == 0
    assert capsys.readouterr().out.count("| CUS statue, a photo of a cat") == 4
    train(base, images, tmp_path / "out", trigger_word="CUS statue", max_train_steps=1)
    assert load_lora(tmp_path / "out" / "lora.safetensors")[1]["modelspec.trigger_phrase"] == "CUS statue"


FULL = dict(train_full_unet=True, network_alpha=None, learning_rate=1e-4)


def unet_of(folder):
    return load_file(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_whole_unet_is_trained_and_saved_as_a_model(base, images, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 1\n")
    extra = dict(save_every_n_steps=2, save_last_n_steps=1, sample_prompts=str(prompts))
    result = train(base, images, tmp_path / "out", **FULL, **extra, max_train_steps=5)
    assert (
        result["outcome"] == "budget_reached"
        and result["files"]["kept"]["path"] == "lora"
        and len(result["files"]) == 1
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == [
        "lora",
        "lora-step00000004",
        "sample",
    ]
    before, after = unet_of(base), unet_of(tmp_path / "out" / "lora")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) > 0.9 * len(before)  # biases and norms as well
    original, tuned = load_sd_model(base), load_sd_model(tmp_path / "out" / "lora")
    for one, two in zip((original.vae, *original.text_encoders), (tuned.vae, *tuned.text_encoders)):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    shown = capsys.readouterr().out
    assert "extract_lora.py --model_org" in shown and "--lora " not in shown


def test_full_training_resumes_and_keeps_finite_weights(base, images, tmp_path):
    settings = dict(**FULL, save_state=True, save_every_n_steps=2, max_train_steps=4)
    train(base, images, tmp_path / "whole", **settings)
    train(base, images, tmp_path / "again", **settings, resume=str(tmp_path / "whole" / "lora-step00000002-state"))
    one, two = unet_of(tmp_path / "whole" / "lora"), unet_of(tmp_path / "again" / "lora")
    assert all(torch.equal(one[name], two[name]) for name in one)
    diverging = {**FULL, "learning_rate": 1e30, "optimizer_type": "SGDNesterov", "max_grad_norm": 0}
    assert run(base, images, tmp_path / "diverged", **diverging) == 3
    assert result_of(tmp_path / "diverged")["outcome"] == "diverged"
    assert all(torch.isfinite(value).all() for value in unet_of(tmp_path / "diverged" / "lora").values())


def test_full_training_in_half_precision_saves_what_was_asked_for(base, images, tmp_path):
    settings = dict(mixed_precision="bf16", save_precision="fp16", gradient_checkpointing=True, max_train_steps=2)
    train(base, images, tmp_path, **FULL, **settings)
    assert {value.dtype for value in unet_of(tmp_path / "lora").values()} == {torch.float16}
    assert load_sd_model(tmp_path / "lora").unet.dtype == torch.float32


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(**FULL, early_stop=True), "so that there is no similarity to stop by: leave --early_stop out"),
        (dict(**FULL, network_dim=8), "--train_full_unet trains no LoRA: leave --network_dim out"),
        (dict(**FULL, save_model_as="safetensors"), "saves a diffusers folder"),
        (dict(num_class_images=3), "--num_class_images needs --class_prompt"),
        (dict(num_class_images=3, class_prompt="a dog"), "--num_class_images needs --reg_data_dir"),
        (dict(reg_data_dir="nowhere"), "--reg_data_dir nowhere: there is no such folder"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_ends_with_code_2(base, images, tmp_path, capsys, changes, message):
    assert run(base, images, tmp_path / "out", **changes) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
