"""Folding LoRAs into checkpoints, against the live network's output."""

import shutil

import pytest
import quiet_libraries  # noqa: E402, F401
import torch  # noqa: E402
from merge_lora import main  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_sd import original_layout, tiny_sd  # noqa: E402

from base.sd import load_sd_model  # noqa: E402
from network.folding import fold_lora, original_weights  # noqa: E402
from network.lora import create_network  # noqa: E402
from network.lora_file import load_lora, save_lora  # noqa: E402
from network.lycoris_network import create_lycoris_network  # noqa: E402


def noise_of(model):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return model.predict_noise(latents, torch.tensor([100]), model.encode_text(["a cat"]))


def randomized(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    return network


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base as folder and as file, and two LoRAs (one with convolutions); the live outputs at
    0.7."""
    path = tmp_path_factory.mktemp("merge")
    tiny_sd(path).save_pipeline(path / "base")
    save_file(original_layout(tiny_sd(path)), path / "base.safetensors", {"modelspec.title": "tiny"})
    shutil.copytree(path / "base", path / "base.config", ignore=shutil.ignore_patterns("*.safetensors"))
    first = randomized(create_network(tiny_sd(path), rank=4, alpha=2), 1)
    save_lora(path / "first.safetensors", first.state_for_file())
    second = randomized(create_network(tiny_sd(path), rank=2, alpha=1, conv_rank=3, conv_alpha=2), 2)
    save_lora(path / "second.safetensors", second.state_for_file())
    return path


def live_output(place, name, ratio):
    model = tiny_sd(place)
    network = create_network(model, weights=place / name, dim_from_weights=True)
    network.multiplier = ratio
    return noise_of(model)


@pytest.mark.parametrize("name", ["first.safetensors", "second.safetensors"])
def test_a_folded_model_equals_the_live_network(place, name):
    model = tiny_sd(place)
    fold_lora(model, load_lora(place / name)[0], 0.7)
    assert not torch.allclose(noise_of(model), noise_of(tiny_sd(place)), atol=1e-4)
    assert torch.allclose(noise_of(model), live_output(place, name, 0.7), atol=1e-5)
    fold_lora(model, load_lora(place / name)[0], -0.7)
    assert torch.allclose(noise_of(model), noise_of(tiny_sd(place)), atol=1e-5)


@pytest.mark.parametrize("arguments", [["algo=loha"], ["algo=lokr", "factor=4"], ["algo=lora", "use_tucker=True"]])
def test_lycoris_kinds_fold_like_their_live_layers(place, arguments):
    model = tiny_sd(place)
    network = create_lycoris_network(model, rank=2, alpha=1, network_args=arguments)
    torch.manual_seed(3)
    for weight in network.parameters():
        weight.data = torch.randn_like(weight) * 0.2
    folded = tiny_sd(place)
    fold_lora(folded, network.state_for_file())
    assert not torch.allclose(noise_of(folded), noise_of(tiny_sd(place)), atol=1e-4)
    assert torch.allclose(noise_of(folded), noise_of(model), atol=1e-5)


def test_two_weighted_loras_on_the_command_line_file_and_folder_agree(place, tmp_path):
    loras = ["--models", str(place / "first.safetensors"), str(place / "second.safetensors"), "--ratios", "0.7", "0.4"]
    assert main(["--sd_model", str(place / "base"), *loras, "--save_to", str(tmp_path / "merged")]) == 0
    file = tmp_path / "merged.safetensors"
    assert main(["--sd_model", str(place / "base.safetensors"), *loras, "--save_to", str(file)]) == 0

    expected = tiny_sd(place)
    fold_lora(expected, load_lora(place / "first.safetensors")[0], 0.7)
    fold_lora(expected, load_lora(place / "second.safetensors")[0], 0.4)
    assert torch.allclose(noise_of(load_sd_model(tmp_path / "merged")), noise_of(expected), atol=1e-5)
    shutil.copytree(place / "base.config", tmp_path / "merged.config")
    assert torch.allclose(noise_of(load_sd_model(file)), noise_of(expected), atol=1e-5)

    before, after = load_file(place / "base.safetensors"), load_file(file)
    assert before.keys() == after.keys()
    untouched = [name for name in before if name.startswith("first_stage_model.") or "norm" in name]
    assert untouched and all(torch.equal(before[name], after[name]) for name in untouched)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"modelspec.title": "tiny", "modelspec.merged_from": "base, first, second"}


def test_precision_of_the_result(place, tmp_path):
    arguments = ["--models", str(place / "first.safetensors"), "--precision", "fp16"]
    assert main(["--sd_model", str(place / "base"), *arguments, "--save_to", str(tmp_path / "half")]) == 0
    weights = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_a_diffusers_lora_folds_in(place, tmp_path):
    from diffusers import StableDiffusionPipeline

    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    torch.manual_seed(0)
    tensors = {f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(32, 2)}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=tensors)
    model, base = tiny_sd(place), tiny_sd(place)
    fold_lora(model, load_lora(tmp_path / "pytorch_lora_weights.safetensors")[0], 0.5)
    change = model.unet.get_submodule(layer).weight - base.unet.get_submodule(layer).weight
    expected = 0.5 * tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
    assert torch.allclose(change, expected, atol=1e-5)


def test_open_clip_names_point_at_the_right_rows():
    """SD 2.x keeps query, key and value of the text encoder in one tensor."""
    joined = torch.arange(12.0).reshape(6, 2)
    stem = "cond_stage_model.model.transformer.resblocks.3."
    checkpoint = {f"{stem}attn.in_proj_weight": joined, f"{stem}mlp.c_fc.weight": torch.ones(8, 2)}
    weights = original_weights(checkpoint)
    prefix = "lora_te_text_model_encoder_layers_3_"
    assert set(weights) == {f"{prefix}self_attn_{part}_proj" for part in "qkv"} | {f"{prefix}mlp_fc1"}
    weights[f"{prefix}self_attn_k_proj"].zero_()
    assert joined.tolist() == [[0, 1], [2, 3], [0, 0], [0, 0], [8, 9], [10, 11]]  # a view of the checkpoint


def test_what_does_not_fit_is_named_and_nothing_is_changed(place):
    model = tiny_sd(place)
    good = load_lora(place / "first.safetensors")[0]
    with pytest.raises(ValueError, match="lora_unet_nowhere is not in the model"):
        fold_lora(model, {**good, "lora_unet_nowhere.lora_down.weight": torch.ones(2, 2)})
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    with pytest.raises(ValueError, match=f"{name} is .32, 5., the model's layer .32, 32."):
        fold_lora(model, {**good, f"{name}.lora_down.weight": torch.ones(4, 5)})
    assert torch.equal(noise_of(model), noise_of(tiny_sd(place)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--ratios": ["1", "2"]}, "has 2 numbers for 1 LoRAs"),
        ({"--models": ["missing.safetensors"]}, "missing.safetensors does not exist"),
        ({"--sd_model": ["nowhere"]}, "nowhere does not exist"),
        ({"--save_to": ["merged.safetensors"]}, "--sd_model is a folder, so --save_to must be one"),
        ({"--save_to": ["merged.ckpt"]}, "--save_to ends in .ckpt"),
    ],
)
def test_bad_arguments_end_with_code_2_and_one_line(place, tmp_path, capsys, changes, message):
    arguments = {
        "--sd_model": [str(place / "base")],
        "--models": [str(place / "first.safetensors")],
        "--save_to": [str(tmp_path / "out")],
    }
    words = [word for flag, values in {**arguments, **changes}.items() for word in (flag, *values)]
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_lora_of_another_model_ends_with_code_2(place, tmp_path, capsys):
    name = "lora_unet_input_blocks_4_1_proj_in"
    other = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}
    save_lora(tmp_path / "sdxl.safetensors", other)
    for base, target in (("base", "out"), ("base.safetensors", "out.safetensors")):
        words = ["--sd_model", str(place / base), "--models", str(tmp_path / "sdxl.safetensors")]
        assert main([*words, "--save_to", str(tmp_path / target)]) == 2
        assert f"{name} is not in the model" in capsys.readouterr().err
        assert not (tmp_path / target).exists()


def test_the_base_itself_is_never_overwritten(place, capsys):
    before = (place / "base.safetensors").read_bytes()
    words = ["--sd_model", str(place / "base.safetensors"), "--models", str(place / "first.safetensors")]
    assert main([*words, "--save_to", str(place / "base.safetensors")]) == 2
    assert "the base model itself" in capsys.readouterr().err
    assert (place / "base.safetensors").read_bytes() == before
