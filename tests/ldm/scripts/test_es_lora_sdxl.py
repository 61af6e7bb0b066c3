"""Whole runs of the SDXL trainer on a tiny random model of SDXL's structure."""

import json
import shutil

import pytest
import torch
from es_lora_ldm import main
from ldm_runs import history_of, make_pictures, reset_accelerate, result_of, words
from safetensors.torch import load_file
from tiny_sdxl import tiny_sdxl

from base.families import StableDiffusionXL
from network.lora_file import load_lora


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_sdxl(folder).save_pipeline(folder / "sdxl")
    return str(folder / "sdxl")


def run(base, images, out, **flags):
    reset_accelerate()
    return main(words(base, images, out, **{"max_train_steps": 3, **flags}), StableDiffusionXL)


def train(base, images, out, **flags):
    assert run(base, images, out, **flags) == 0
    return result_of(out)


MEASURED = dict(calculate_cs=True, cs_interval=1)


@pytest.fixture(scope="module")
def stopped(base, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    (out / "prompts.txt").write_text("a cat --s 2 --d 7 --w 32 --h 32\n")
    early = dict(early_stop=True, stop_rule="second-valley", window_size=2, cs_interval=1, max_train_steps=30)
    early["text_encoder_lr"] = ["1e-3", "5e-4"]
    return out, train(base, images, out, **early, sample_prompts=str(out / "prompts.txt"))


def test_early_stop_with_both_text_encoders(stopped):
    out, result = stopped
    assert result["outcome"] == "stopped_early"
    assert result["files"]["kept"]["step"] == result["keep_step"] < result["last_step"] < 30
    assert set(result["parts"]) == {"unet", "te1", "te2"}
    assert set(history_of(out, "cs")[-1]) == {"unet", "te1", "te2", "all"}
    assert len(list((out / "sample").glob("*.png"))) == 3  # without LoRA, turning point, last
    pictures = {path.read_bytes() for path in (out / "sample").glob("*.png")}
    assert len(pictures) == 3


def test_the_file_is_an_sdxl_lora(stopped):
    state, metadata = load_lora(stopped[0] / "lora.safetensors")
    assert {name.split("_")[1] for name in state} == {"unet", "te1", "te2"}
    assert any(name.startswith("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.") for name in state)
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0" and metadata["ss_v2"] == "False"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    trained = {name.split("_")[1] for name, value in state.items() if "lora_up" in name and value.abs().max() > 0}
    assert trained == {"unet", "te1", "te2"}


def test_the_trained_file_works_in_diffusers_pipeline(stopped, base):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        drawn.append(
            pipeline("a cat", num_inference_steps=2, width=32, height=32, generator=generator, output_type="np").images
        )
        pipeline.load_lora_weights(str(stopped[0]), weight_name="lora.safetensors")
    assert abs(drawn[0] - drawn[1]).max() > 1e-3


def test_cached_text_gives_the_losses_of_live_text(base, images, tmp_path):
    copy = str(tmp_path / "images")
    shutil.copytree(images, copy)
    (tmp_path / "prompts.txt").write_text("a dog --s 1\n")
    text = dict(network_train_unet_only=True, max_token_length=150, weighted_captions=True)
    common = dict(**MEASURED, **text, validation_split=0.34, sample_prompts=str(tmp_path / "prompts.txt"))
    caches = {"live": None, "memory": "cache_text_encoder_outputs", "disk": "cache_text_encoder_outputs_to_disk"}
    for name, flag in caches.items():
        train(base, copy, tmp_path / name, **common, **({flag: True} if flag else {}))
    losses = {name: history_of(tmp_path / name, "loss") for name in caches}
    assert losses["memory"] == losses["disk"] == pytest.approx(losses["live"], rel=1e-6)
    assert len(list((tmp_path / "images").rglob("*_te_outputs.safetensors"))) == 6
    pictures = [(tmp_path / name / "sample" / "lora-last_00_1.png").read_bytes() for name in caches]
    assert pictures[1] == pictures[2]


def test_a_cached_caption_is_encoded_anew_when_it_changes(base, images, tmp_path):
    copy = str(tmp_path / "images")
    shutil.copytree(images, copy)
    cached = dict(network_train_unet_only=True, cache_text_encoder_outputs_to_disk=True, max_train_steps=1)
    train(base, copy, tmp_path / "a", **cached)
    files = sorted((tmp_path / "images").rglob("*_te_outputs.safetensors"))

    def contents():
        return [(file.stat().st_mtime_ns, load_file(file)["states"].clone()) for file in files]

    before = contents()
    assert before[0][1].shape == (77, 40)
    (tmp_path / "images" / "1_cat" / "0.txt").write_text("a blue tree")
    files[1].write_bytes(b"damaged")
    train(base, copy, tmp_path / "b", **cached)
    after = contents()
    assert [one[0] == two[0] for one, two in zip(before, after)] == [False, False, True, True, True, True]
    assert not torch.equal(before[0][1], after[0][1]) and torch.equal(before[1][1], after[1][1])


@pytest.mark.parametrize(
    "changes",
    [
        dict(mixed_precision="bf16", no_half_vae=True, gradient_checkpointing=True, max_token_length=225),
        dict(network_args=["conv_dim=2", "conv_alpha=1"], cache_latents=False, flip_aug=True, random_crop=True),
        dict(shadows=2, shadow_rank=2),
        dict(network_module="lycoris.kohya", network_args=["algo=loha"], network_train_unet_only=True),
    ],
    ids=lambda changes: ",".join(changes),
)
def test_settings_train(base, images, tmp_path, changes):
    result = train(base, images, tmp_path, **{**MEASURED, **changes}, max_train_steps=2)
    assert result["last_step"] == 2 and 0 < abs(history_of(tmp_path)[-1]["cs"]["unet"]) < 1
    assert all(torch.isfinite(value).all() for value in load_lora(tmp_path / "lora.safetensors")[0].values())


def test_sizes_and_crops_come_from_the_pictures(base, tmp_path):
    """Two pictures of 48 x 32 px in buckets of 32 px: what is cut off is told to the U-Net."""
    images = make_pictures(tmp_path / "images", count=2)
    for picture in (tmp_path / "images").rglob("*.png"):
        from PIL import Image

        Image.open(picture).resize((48, 32)).save(picture)
    seen = []

    class Watching(StableDiffusionXL):
        def _load(self, dtype):
            model = super()._load(dtype)
            predict = model.predict_noise
            model.predict_noise = lambda *words: (seen.append(words[3]), predict(*words))[1]
            return model

    reset_accelerate()
    assert main(words(base, images, tmp_path / "out", max_train_steps=1), Watching) == 0
    assert seen[0].tolist() == [[32, 48, 0, 8, 32, 32]] * 2


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(v2=True), "--v2: the base is SDXL"),
        (dict(clip_skip=2), "--clip_skip: SDXL always takes the penultimate layer"),
        (dict(cache_text_encoder_outputs=True), "needs --network_train_unet_only"),
        (dict(text_encoder_lr=["1", "2", "3"]), "these models have 2 text encoder(s)"),
        (dict(resolution=40), "--resolution 40,40: this base needs multiples of 32 px"),
        (
            dict(enable_bucket=True, bucket_reso_steps=8, min_bucket_reso=32),
            "--bucket_reso_steps 8: this base needs multiples of 32 px",
        ),
        (
            dict(
                cache_text_encoder_outputs=True,
                network_train_unet_only=True,
                shuffle_caption=True,
                caption_dropout_rate=0.1,
            ),
            "shuffle_caption, caption_dropout_rate varies it",
        ),
        (dict(cache_text_encoder_output=True), "did you mean --cache_text_encoder_outputs"),
        (dict(cs_component="te"), "--cs_component te: trained are"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_ends_with_code_2(base, images, tmp_path, capsys, changes, message):
    assert run(base, images, tmp_path / "out", **MEASURED, **changes) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert message in last_line and last_line.startswith("es_lora_sdxl: ")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_sd_trainer_is_told_of_the_other_one(base, images, tmp_path, capsys):
    reset_accelerate()
    assert main(words(base, images, tmp_path / "out")) == 2
    assert "train it with es_lora_sdxl.py" in capsys.readouterr().err


def test_resumed_equals_uninterrupted(base, images, tmp_path):
    settings = dict(**MEASURED, max_train_steps=4, network_dropout=0.1, save_every_n_steps=2, save_state=True)
    train(base, images, tmp_path / "whole", **settings)
    state = str(tmp_path / "whole" / "lora-step00000002-state")
    shutil.copytree(state, tmp_path / "state")
    train(base, images, tmp_path / "again", **settings, resume=str(tmp_path / "state"))
    one, two = (load_lora(tmp_path / name / "lora.safetensors")[0] for name in ("whole", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert json.loads((tmp_path / "again" / "result.json").read_text())["last_step"] == 4
