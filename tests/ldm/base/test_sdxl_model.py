"""The SDXL model: both layouts, its conditions, kohya's names, and LoRAs of other programs."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from merge_lora import main  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny_sd import tiny_sd  # noqa: E402
from tiny_sdxl import WIDTHS, original_layout, tiny_sdxl  # noqa: E402
from transformers import CLIPTextConfig  # noqa: E402

from base.loading import load_base_model  # noqa: E402
from base.sd import load_sd_model  # noqa: E402
from base.sdxl import TEXT_ENCODERS, SDXLModel, load_sdxl_model  # noqa: E402
from base.single_file import CONFIG_ROOT  # noqa: E402
from network.folding import fold_lora  # noqa: E402
from network.lora import create_network, find_modules  # noqa: E402
from network.lora_file import load_lora, save_lora  # noqa: E402

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "sd_scripts_sdxl_lora_modules_48d368fa.json"
CAPTIONS = ["a cat", "red dog, tree (photo)"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The same random model as a folder ``base`` and as a file ``base.safetensors``, and a LoRA of
    it."""
    path = tmp_path_factory.mktemp("sdxl")
    model = tiny_sdxl(path)
    model.save_pipeline(path / "base")
    save_file(original_layout(model), path / "base.safetensors")
    shutil.copytree(path / "base", path / "base.config", ignore=shutil.ignore_patterns("*.safetensors"))
    save_lora(path / "lora.safetensors", random_lora(model).state_for_file())
    return path


def random_lora(model):
    network = create_network(model, rank=2, alpha=1, conv_rank=2, conv_alpha=1)
    generator = torch.Generator().manual_seed(2)
    for weight in network.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    return network


def noise_of(model, **sizes):
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return model.predict_noise(latents, torch.tensor([100, 700]), model.encode_text(CAPTIONS), **sizes)


def full_shape():
    """SDXL's published sizes without weights."""
    config = CONFIG_ROOT / "sdxl"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config / "unet"))
        encoders = [kind(CLIPTextConfig.from_pretrained(config / name)) for name, kind in TEXT_ENCODERS.items()]
    return SDXLModel(unet, None, encoders, [], {}, base_path="sdxl")


def test_module_names_are_kohyas():
    model, golden = full_shape(), json.loads(GOLDEN.read_text())
    sizes = [sum(weight.numel() for weight in part.parameters()) for part in (model.unet, *model.text_encoders)]
    assert sizes == [2_567_463_684, 123_060_480, 694_659_840]
    for kind, with_convolutions in (("default", False), ("conv_dim", True)):
        found = [(part, name) for part, _, name, _ in find_modules(model, with_convolutions=with_convolutions)]
        for part, facts in golden[kind].items():
            names = sorted(name for component, name in found if component == part)
            assert (len(names), names[0], names[-1]) == (facts["modules"], facts["first"], facts["last"])
            assert hashlib.sha256("\n".join(names).encode()).hexdigest() == facts["sha256"]
        assert {part for part, _ in found} == set(golden[kind])


@pytest.mark.parametrize("name", ["base", "base.safetensors"])
def test_folder_and_original_file_give_the_same_model(place, name):
    model, loaded = tiny_sdxl(place), load_base_model(place / name)
    assert isinstance(loaded, SDXLModel) and loaded.latent_scaling == pytest.approx(0.13025)
    assert torch.allclose(noise_of(loaded), noise_of(model), atol=1e-6)
    assert loaded.tokenizers[1].pad_token_id == 0 != loaded.tokenizers[0].pad_token_id
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = [m.encode_images(pixels, torch.Generator().manual_seed(0)) for m in (loaded, model)]
    assert torch.equal(*latents)


def test_text_is_the_penultimate_layer_of_both_and_the_second_ones_pooled_output(place):
    model = tiny_sdxl(place)
    states, pooled = model.encode_text(CAPTIONS)
    assert states.shape == (2, 77, sum(WIDTHS)) and pooled.shape == (2, WIDTHS[1])
    start = 0
    for encoder, tokenizer, width in zip(model.text_encoders, model.tokenizers, WIDTHS):
        ids = tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        assert torch.allclose(states[..., start : start + width], output.hidden_states[-2], atol=1e-6)
        start += width
    assert torch.allclose(pooled, output.text_embeds, atol=1e-6)
    long = model.encode_text(["a cat " * 60], max_token_length=225)
    assert long.states.shape == (1, 227, sum(WIDTHS)) and torch.isfinite(long.states).all()
    with pytest.raises(ValueError, match="leave --clip_skip out"):
        model.encode_text(CAPTIONS, clip_skip=2)


def test_sizes_and_crops_reach_the_unet(place):
    model = tiny_sdxl(place)
    whole = torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)
    assert torch.equal(noise_of(model), noise_of(model, sizes_px=whole))
    for column in range(6):
        other = whole.clone()
        other[1, column] += 8
        difference = (noise_of(model, sizes_px=other) - noise_of(model)).abs().amax(dim=(1, 2, 3))
        assert difference[0] == 0 < difference[1]


def test_diffusers_pipeline_reads_the_lora_and_draws_something_else(place):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(place / "base")
    pipeline.set_progress_bar_config(disable=True)

    def latents():
        words = {"num_inference_steps": 2, "width": 32, "height": 32, "output_type": "latent"}
        return pipeline("a cat", generator=torch.Generator().manual_seed(0), **words).images

    before = latents()
    pipeline.load_lora_weights(place, weight_name="lora.safetensors")
    after = latents()
    pipeline.unload_lora_weights()
    assert (after - before).abs().max() > 0.01 and torch.allclose(latents(), before)
    folded = load_sdxl_model(place / "base")
    fold_lora(folded, load_lora(place / "lora.safetensors")[0])
    pipeline = folded.to_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    assert torch.allclose(latents(), after, atol=1e-3)  # the same update, whoever applies it


def test_a_lora_of_diffusers_names_is_read(place, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    layers = ["down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q", "up_blocks.0.attentions.2.proj_in"]
    model, base, tensors = tiny_sdxl(place), tiny_sdxl(place), {}
    for layer in layers:
        size = base.unet.get_submodule(layer).weight.shape
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = (
            torch.randn(2, size[1]),
            torch.randn(size[0], 2),
        )
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=tensors)
    fold_lora(model, load_lora(tmp_path / "pytorch_lora_weights.safetensors")[0])
    for layer in layers:
        change = model.unet.get_submodule(layer).weight - base.unet.get_submodule(layer).weight
        assert torch.allclose(change, tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"], atol=1e-5)


def test_merged_file_and_folder_equal_the_live_network(place, tmp_path):
    live = tiny_sdxl(place)
    create_network(live, weights=place / "lora.safetensors", dim_from_weights=True).multiplier = 0.7
    words = ["--models", str(place / "lora.safetensors"), "--ratios", "0.7", "--save_to"]
    assert main(["--sd_model", str(place / "base"), *words, str(tmp_path / "merged")]) == 0
    assert main(["--sd_model", str(place / "base.safetensors"), *words, str(tmp_path / "merged.safetensors")]) == 0
    shutil.copytree(place / "base.config", tmp_path / "merged.config")
    assert not torch.allclose(noise_of(live), noise_of(tiny_sdxl(place)), atol=1e-3)
    for name in ("merged", "merged.safetensors"):
        assert torch.allclose(noise_of(load_sdxl_model(tmp_path / name)), noise_of(live), atol=1e-5)


def test_lycoris_takes_kohyas_names_too(place):
    from network.lycoris_network import create_lycoris_network

    model = tiny_sdxl(place)
    network = create_lycoris_network(model, rank=2, alpha=1)
    names = {name for _, _, name, _ in find_modules(tiny_sdxl(place), everywhere=True)}
    saved = {key.partition(".")[0] for key in network.state_for_file()}
    assert saved <= names and {name.split("_")[1] for name in saved} == {"unet", "te1", "te2"}
    for weight in network.parameters():
        weight.data = torch.randn_like(weight) * 0.1
    again = tiny_sdxl(place)
    create_lycoris_network(again, weights=network.state_for_file(), dim_from_weights=True)
    assert torch.allclose(noise_of(again), noise_of(model), atol=1e-5)


def test_the_wrong_family_is_named(place, tmp_path):
    with pytest.raises(ValueError, match="as SDXL has; train it with es_lora_sdxl.py"):
        load_sd_model(place / "base")
    tiny_sd(tmp_path).save_pipeline(tmp_path / "sd")
    with pytest.raises(ValueError, match="it is not SDXL; train it with es_lora_ldm.py"):
        load_sdxl_model(tmp_path / "sd")
    with pytest.raises(ValueError, match="leave --v2 out"):
        load_base_model(place / "base", v2=True)
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not an SDXL checkpoint"):
        load_sdxl_model(tmp_path / "other.safetensors")
