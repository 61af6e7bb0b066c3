"""LoRA files in the spellings of other programs give the same update in every tool."""

import json

import pytest
import torch
from safetensors.torch import save_file

from base.loading import load_base_model
from network.folding import fold_lora
from network.lora import create_network
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
    from network.lora import find_modules

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
