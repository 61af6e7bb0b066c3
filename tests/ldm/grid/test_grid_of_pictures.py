"""judge_checkpoints.py --grid on pictures: what the page shows is what the files draw, and the
figures are those of its pictures."""

import base64
import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_checkpoints import main
from ldm_runs import train
from PIL import Image

STEPS = 2  # of a picture


@pytest.fixture(scope="module")
def run(base, images, tmp_path_factory):
    """A run of 9 steps with a LoRA file every 3."""
    out = tmp_path_factory.mktemp("run")
    train(base, images, out, save_every_n_steps=3, learning_rate=3e-2, network_dim=4)
    return out


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text(f"a cat --s {STEPS}\na photo <of> a cat --s {STEPS} --l 1\n")
    return file


@pytest.fixture(scope="module")
def drawn(run, base, prompts, tmp_path_factory):
    """(page, facts) of a grid of two seeds and two strengths."""
    page, said = tmp_path_factory.mktemp("page") / "grid.html", io.StringIO()
    words = ["--grid", str(prompts), "--grid_page", str(page), "--seeds", "4,9", "--strength", "0.5,1"]
    with contextlib.redirect_stdout(said):
        assert main([str(run), "--base", base, "--json", *words]) == 0
    return page.read_text(), json.loads(said.getvalue())["grid"]


def pictures_of(page):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def rows_of(facts):
    return {row["name"]: row for row in facts["rows"]}


def test_the_page_has_every_checkpoint_and_strength_by_seeds_and_the_base(drawn):
    page, facts = drawn
    names = [row["name"] for row in facts["rows"]]
    strengths = [f"lora-step0000000{step}.safetensors x {strength}" for step in (3, 6, 9) for strength in ("0.5", "1")]
    assert names == ["training pictures, each to the others", "no LoRA", *strengths]
    assert len(pictures_of(page)) == 2 * 7 * 2 and "a photo &lt;of&gt; a cat" in page
    assert page.count("<h2>") == 3 and "seed 4" in page and "the latents of the base&#x27;s own VAE" in page


def test_a_picture_of_the_page_is_what_its_file_draws_at_its_seed_and_strength(drawn, run, base):
    from base.sampling import Prompt
    from grid.pictures import PictureMaker

    pictures, maker = pictures_of(drawn[0]), PictureMaker(base)
    prompt = Prompt("a cat", seed=9, sample_steps=STEPS)
    half = maker.picture(prompt, run / "lora.safetensors", 0.5)
    assert np.array_equal(pictures[5 * 2 + 1], np.asarray(half))  # row of the last file at 0.5, second seed
    assert np.array_equal(pictures[1], np.asarray(maker.picture(prompt)))
    assert not np.array_equal(pictures[1], pictures[5 * 2 + 1])


def test_the_figures_are_those_of_the_pictures(drawn, base, images):
    from base.loading import load_base_model
    from grid.features import encode_training_set, training_pictures, vae_encoder

    encoder = vae_encoder(load_base_model(base))
    training, unread = encode_training_set(training_pictures(Path(images)), encoder)
    pictures = pictures_of(drawn[0])
    last = [pictures[place] for prompt in (0, 14) for place in (prompt + 12, prompt + 13)]
    features = encoder.encode([Image.fromarray(picture) for picture in last])
    cosines = features @ training.features.T
    row = rows_of(drawn[1])["lora-step00000009.safetensors x 1"]
    assert unread == [] and row["likeness"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert row["nearest"] == pytest.approx((1 - cosines.max(1).values).mean().item(), abs=1e-5)


def test_drift_grows_from_the_base_with_the_strength(drawn):
    rows = rows_of(drawn[1])
    half, whole = (rows[f"lora-step00000009.safetensors x {strength}"]["drift"] for strength in ("0.5", "1"))
    assert rows["no LoRA"]["drift"] is None and 0 < half < whole


def test_a_copied_picture_is_at_no_distance_and_named(base, images):
    from base.loading import load_base_model
    from grid.features import encode_training_set, training_pictures, vae_encoder

    encoder = vae_encoder(load_base_model(base))
    paths = training_pictures(Path(images))
    training, _ = encode_training_set(paths, encoder)
    ((distance, name),) = training.nearest(encoder.encode([Image.open(paths[2])]))
    assert distance == pytest.approx(0, abs=1e-5) and name == paths[2].name
    likeness, nearest = training.among_themselves()
    assert likeness < 1 and nearest > distance


def test_a_damaged_training_picture_is_told_and_others_are_compared(base, images, tmp_path):
    from base.loading import load_base_model
    from grid.features import encode_training_set, training_pictures, vae_encoder

    folder = Path(shutil.copytree(images, tmp_path / "images"))
    damaged = next(folder.rglob("*.png"))
    damaged.write_bytes(b"no picture")
    training, unread = encode_training_set(training_pictures(folder), vae_encoder(load_base_model(base)))
    assert unread == [damaged.name] and len(training.names) == 5 and damaged.name not in training.names


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_an_image_encoder_of_transformers_takes_the_place_of_the_vae(kind, tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

    from grid.features import loaded_encoder

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    if kind == "dino":
        Dinov2Model(Dinov2Config(**vision)).save_pretrained(tmp_path)
    else:
        text = {**sizes, "vocab_size": 9}
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    encoder = loaded_encoder(str(tmp_path), "cpu")
    features = encoder.encode([Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")])
    assert features.shape == (2, 16 if kind == "dino" else 8) and str(tmp_path) in encoder.about
    assert torch.allclose(features.norm(dim=1), torch.ones(2)) and not torch.allclose(features[0], features[1])


def test_what_is_wrong_is_said_before_anything_is_loaded(run, base, prompts, tmp_path, capsys, monkeypatch):
    import judge_checkpoints

    monkeypatch.setattr(judge_checkpoints, "measure_run", lambda *_: pytest.fail("it measured"))
    there = tmp_path / "there.html"
    there.write_text("mine")
    (tmp_path / "empty").mkdir()
    for words, said in (
        (["--grid", str(tmp_path / "none.txt")], "none.txt cannot be read"),
        (["--grid", str(prompts), "--grid_page", str(there)], "is there already"),
        (["--grid", str(prompts), "--training_data", str(tmp_path / "gone")], "gone is no folder"),
        (["--grid", str(prompts), "--training_data", str(tmp_path / "empty")], "empty holds no pictures"),
        (["--grid", str(prompts), "--unrelated", str(tmp_path / "gone.txt")], "gone.txt cannot be read"),
    ):
        assert main([str(run), "--base", base, *words]) == 2
        assert said in capsys.readouterr().err
    assert there.read_text() == "mine" and not (run / "grid.html").exists()


def test_an_encoder_that_is_none_is_refused_and_leaves_no_page(run, base, prompts, tmp_path, capsys):
    assert main([str(run), "--base", base, "--grid", str(prompts), "--encoder", str(tmp_path)]) == 2
    assert f"--encoder {tmp_path} is no image encoder" in capsys.readouterr().err and not (run / "grid.html").exists()
