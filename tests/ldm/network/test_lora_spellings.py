"""LoRA files in the spellings of other programs give the same update in every tool."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from tiny_sdxl import original_layout, tiny_sdxl

from base.loading import load_base_model
from base.sdxl import original_unet_name
from network.folding import fold_into_tensors, fold_lora
from network.lora import create_network, find_modules
from network.lora_file import load_lora, save_lora
from network.lycoris_network import create_lycoris_network


@pytest.fixture(scope="module")
def lora(base):
    network = create_network(load_base_model(base), rank=2, alpha=2)
    generator = torch.Generator().manual_seed(0)
    for _, weight in sorted(network.tensors().items()):
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    return network


def folded(base, tensors, weight=1.0):
    model = load_base_model(base)
    fold_lora(model, tensors, weight)
    return [value for part in (model.unet, *model.text_encoders) for _, value in sorted(part.state_dict().items())]


def peft_tensors(lora, component, prefix):
    """PEFT's keys of a part: the module's path, lora_A and lora_B."""
    names = {"unet": "lora_unet_", "te": "lora_te_"}
    tensors = {}
    for module in lora.modules:
        if module.component == component:
            assert module.name.startswith(names[component])
            path = PATHS[module.name]
            tensors[f"{prefix}{path}.lora_A.weight"] = module.down.detach().clone()
            tensors[f"{prefix}{path}.lora_B.weight"] = module.up.detach().clone()
    return tensors


PATHS = {}


@pytest.fixture(autouse=True)
def paths(base):
    """{kohya's name: the path of the module}."""
    PATHS.update({name: path for _, path, name, _ in find_modules(load_base_model(base), everywhere=True)})


@pytest.mark.parametrize("prefix", ["base_model.model.", "unet.", "unet.base_model.model.", ""])
def test_a_unet_lora_in_pefts_naming_equals_kohyas(base, lora, tmp_path, prefix):
    save_file(peft_tensors(lora, "unet", prefix), tmp_path / "peft.safetensors")
    mine = {key: value for key, value in lora.state_for_file().items() if key.startswith("lora_unet")}
    theirs = load_lora(tmp_path / "peft.safetensors")[0]
    assert all(map(torch.equal, folded(base, theirs), folded(base, mine)))
    again = create_network(load_base_model(base), weights=tmp_path / "peft.safetensors", dim_from_weights=True)
    assert again.components == ["unet"]


@pytest.mark.parametrize("rslora", [False, True])
def test_the_alpha_beside_pefts_file_counts(base, lora, tmp_path, rslora):
    save_file(peft_tensors(lora, "unet", "base_model.model."), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 2, "use_rslora": rslora}))
    mine = {key: value for key, value in lora.state_for_file().items() if key.startswith("lora_unet")}
    expected = folded(base, mine, 8 / 2**0.5 if rslora else 4.0)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        found = folded(base, load_lora(path)[0])
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected))


@pytest.mark.parametrize("spelling", ["lora_te_", "lora_te1_", "lora_te_text_model_", "lora_te1_text_model_"])
def test_text_encoder_modules_are_known_with_and_without_their_level(base, lora, tmp_path, spelling):
    mine = lora.state_for_file()
    tensors = {key.replace("lora_te_text_model_", spelling): value for key, value in mine.items()}
    save_lora(tmp_path / "spelt.safetensors", tensors)
    theirs = load_lora(tmp_path / "spelt.safetensors")[0]
    assert all(map(torch.equal, folded(base, theirs), folded(base, mine)))
    again = create_network(load_base_model(base), rank=2, alpha=2, weights=tmp_path / "spelt.safetensors")
    assert all(torch.equal(value, mine[key]) for key, value in again.tensors().items())


def test_another_rank_names_the_flag_that_takes_it(base, lora, tmp_path):
    save_lora(tmp_path / "lora.safetensors", lora.state_for_file())
    with pytest.raises(ValueError, match="--dim_from_weights takes the ranks"):
        create_network(load_base_model(base), rank=4, weights=tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="--dim_from_weights takes the ranks"):
        create_lycoris_network(load_base_model(base), rank=4, weights=tmp_path / "lora.safetensors")


def part_names(lora):
    """{kohya's name: (component, path)}."""
    return {module.name: (module.component, PATHS[module.name]) for module in lora.modules}


def test_one_trainers_names_with_dots_equal_kohyas(base, lora, tmp_path):
    config = load_base_model(base).unet.config
    mine, dotted = lora.state_for_file(), {"bundle_emb.mycat.clip_l": torch.ones(1, 16)}
    for key, value in mine.items():
        name, _, part = key.partition(".")
        component, path = part_names(lora)[name]
        if component == "unet":
            path = f"unet.{original_unet_name(path, config.layers_per_block, config.up_block_types)}"
        else:
            path = f"clip_l.text_model.{path.removeprefix('text_model.')}"
        dotted[f"{path}.{part}"] = value
    assert any(".input_blocks." in key for key in dotted)
    save_file(dotted, tmp_path / "omi.safetensors")
    assert all(map(torch.equal, folded(base, load_lora(tmp_path / "omi.safetensors")[0]), folded(base, mine)))
    again = create_network(load_base_model(base), rank=2, alpha=2, weights=tmp_path / "omi.safetensors")
    assert all(torch.equal(value, mine[key]) for key, value in again.tensors().items())
    lycoris = create_lycoris_network(load_base_model(base), weights=tmp_path / "omi.safetensors", dim_from_weights=True)
    assert len(lycoris.modules) == len(lora.modules)


def test_pefts_folders_of_the_parts_are_one_lora(base, lora, tmp_path):
    for component, part in (("unet", "unet"), ("te", "text_encoder")):
        (tmp_path / part).mkdir()
        tensors = peft_tensors(lora, component, "base_model.model.")
        save_file(tensors, tmp_path / part / "adapter_model.safetensors")
        settings = {"lora_alpha": 4, "r": 2, "peft_type": "LORA"}
        (tmp_path / part / "adapter_config.json").write_text(json.dumps(settings))
    expected = folded(base, lora.state_for_file(), 2.0)
    found = folded(base, load_lora(tmp_path)[0])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected))


def test_the_folder_that_diffusers_saves_is_read(base, lora, tmp_path):
    tensors = {**peft_tensors(lora, "unet", "unet."), **peft_tensors(lora, "te", "text_encoder.")}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    assert all(map(torch.equal, folded(base, load_lora(tmp_path)[0]), folded(base, lora.state_for_file())))


def test_an_sdxl_lora_named_as_diffusers_names_the_unet_folds_into_a_model_and_a_file(tmp_path):
    model = tiny_sdxl(tmp_path)
    lora = create_network(tiny_sdxl(tmp_path), rank=2, alpha=2, conv_rank=2, train_text_encoder=False)
    for weight in lora.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    mine = lora.state_for_file()
    paths = {name: path for _, path, name, _ in find_modules(model, everywhere=True)}
    theirs = {}
    for key, value in mine.items():
        name, _, part = key.partition(".")
        theirs[f"lora_unet_{paths[name].replace('.', '_')}.{part}"] = value
    assert theirs.keys() != mine.keys()
    tensors = original_layout(model)
    expected, found = ({key: value.clone() for key, value in tensors.items()} for _ in range(2))
    fold_into_tensors(expected, mine)
    fold_into_tensors(found, theirs)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert any(not torch.equal(value, expected[key]) for key, value in tensors.items())
    fold_lora(model, theirs)
    assert torch.equal(original_layout(model)["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"],
                       expected["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"])  # fmt: skip


def test_a_dora_of_pefts_is_taken_as_lycoris_has_it(base, tmp_path):
    model = load_base_model(base)
    targets = ["to_q", "to_out.0", "conv1"]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=targets, use_dora=True), model.unet)
    for name, value in model.unet.named_parameters():
        if ".lora_" in name:
            value.data += 0.1 * torch.randn(value.shape)
    tensors = get_peft_model_state_dict(model.unet)
    assert any("lora_magnitude_vector" in key for key in tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "r": 2, "use_dora": True}))
    plain = load_base_model(base)
    create_lycoris_network(plain, weights=tmp_path, dim_from_weights=True, train_text_encoder=False)
    latents, text = torch.randn(1, 4, 8, 8), model.encode_text(["a cat"])
    with torch.no_grad():
        mine, theirs, without = (
            some.predict_noise(latents, torch.tensor([100]), text) for some in (plain, model, load_base_model(base))
        )
    assert torch.allclose(mine, theirs, atol=1e-4) and not torch.allclose(theirs, without, atol=1e-2)


def test_a_file_of_another_part_than_is_trained_is_refused(base, lora):
    text_only = {key: value for key, value in lora.state_for_file().items() if key.startswith("lora_te_")}
    with pytest.raises(ValueError, match="none of the parts that are switched on"):
        create_network(load_base_model(base), weights=text_only, dim_from_weights=True, train_text_encoder=False)
