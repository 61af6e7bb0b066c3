"""The embedded diffusion base: it loads offline, is small, keeps pictures, and its captions
matter."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
BASE = ROOT / "lora-ldm/tiny_base"
sys.path.insert(0, str(BASE))

from evaluate_tiny_base import caption_gaps, encode, generate, load_pipeline, read_folder, read_heldout  # noqa: E402
from tiny_models import LATENT_SCALE, learn_bpe, tokenize  # noqa: E402
from train_networks import psnr_db, shuffled_positions  # noqa: E402


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(BASE)


def test_folder_is_complete_and_small():
    index = json.loads((BASE / "model_index.json").read_text("utf8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (BASE / "tokenizer" / name).is_file()
    parts = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
    total = sum(path.stat().st_size for part in parts for path in (BASE / part).rglob("*"))
    assert total <= 25_000_000


def test_shapes_are_those_of_stable_diffusion(pipeline):
    picture = torch.zeros(2, 3, 64, 64)
    with torch.no_grad():
        latents = pipeline.vae.encode(picture).latent_dist.mean
        assert latents.shape == (2, 4, 8, 8)
        assert pipeline.vae.decode(latents).sample.shape == picture.shape
    assert pipeline.vae.config.scaling_factor == LATENT_SCALE
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    blocks = [module for module in pipeline.unet.modules() if type(module).__name__ == "Transformer2DModel"]
    names = {name.rsplit(".", 1)[-1] for block in blocks for name, _ in block.named_modules()}
    assert len(blocks) == 7 and {"to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out", "ff"} <= names


@torch.no_grad()
def test_latents_have_unit_spread(pipeline):
    latents = encode(pipeline.vae, read_heldout(BASE)[1][:64])
    assert abs(float(latents.mean())) < 0.2 and 0.8 < float(latents.std()) < 1.2


@pytest.mark.parametrize("name", ["portraits", "stills", "landscape", "architecture"])
def test_autoencoder_keeps_styles_it_never_saw(pipeline, name):
    assert psnr_db(pipeline.vae, read_folder(ROOT / "dataset" / name)[::3]) >= 20


def test_right_captions_fit_heldout_pictures_better(pipeline):
    rows, rgb = read_heldout(BASE)
    rows, rgb = rows[::3], rgb[::3]
    gap = caption_gaps(pipeline, encode(pipeline.vae, rgb), rows, draws=2)["all"]
    assert gap["pictures"] >= 50
    assert gap["gap_percent"] >= 15, gap


def test_picture_is_seeded_and_follows_the_prompt(pipeline):
    first, again, other = (
        generate(pipeline, prompt, seed=1).tobytes() for prompt in ("red heart", "red heart", "frog")
    )
    assert first == again != other


def test_tokenizer_round_trip_and_unknown_text(pipeline):
    tokenizer = pipeline.tokenizer
    assert len(tokenizer) == 3200 == pipeline.text_encoder.config.vocab_size
    for text in ("grinning face with big eyes", "castle", "snow - capped mountain"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text
    # Every byte is in the vocabulary, so text that no caption had survives too.
    assert tokenizer.decode(tokenizer("żółw 🐢").input_ids, skip_special_tokens=True).strip() == "żółw 🐢"
    ids = tokenize(tokenizer, ["castle", " ".join(["castle"] * 100)])
    assert ids.shape == (2, 77) and int(ids[1, -1]) == tokenizer.eos_token_id


def test_learn_bpe_refuses_too_little_text():
    with pytest.raises(ValueError, match="fewer than the"):
        learn_bpe(["cat", "dog"])


def test_shuffling_changes_every_concept():
    concepts, styles = ["a", "a", "b", "b", "c", "c"], ["x", "y"] * 3
    order = shuffled_positions(concepts, 3, styles).tolist()
    assert sorted(order) == list(range(6))
    assert all(concepts[i] != concepts[j] and styles[i] == styles[j] for i, j in enumerate(order))
    with pytest.raises(ValueError, match="no permutation"):
        shuffled_positions(["a", "a"])


def test_prompt_file_is_in_the_line_format():
    lines = (BASE / "prompts.txt").read_text("utf8").splitlines()
    prompts = [line for line in lines if line.strip() and not line.startswith("#")]
    assert len(prompts) >= 4
    assert all("--w 64 --h 64" in line and "--d " in line for line in prompts)
