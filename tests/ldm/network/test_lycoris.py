"""LyCORIS networks: names, training, CS, loading."""

from argparse import Namespace

import pytest
import quiet_libraries  # noqa: E402, F401
import torch  # noqa: E402
from tiny_sd import tiny_sd  # noqa: E402

from cs_fluctuation import layer_cosine, mean_cosine  # noqa: E402
from network.creation import network_notices  # noqa: E402
from network.lora_file import load_lora, save_lora  # noqa: E402
from network.lycoris_network import DenseUpdateLayer, create_lycoris_network, parse_lycoris_args  # noqa: E402


@pytest.fixture
def model(tmp_path):
    return tiny_sd(tmp_path)


def network_of(model, *arguments, **settings):
    network = create_lycoris_network(model, rank=2, alpha=1, network_args=list(arguments), **settings)
    torch.manual_seed(1)
    for weight in network.parameters():
        weight.data = torch.randn_like(weight) * 0.3
    return network


def noise_of(model):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return model.predict_noise(latents, torch.tensor([100]), model.encode_text(["a cat"]))


def dense_update(module):
    """The update of a module by its published formula, float64."""
    parts = {name: value.detach().double() for name, value in module.named_parameters()}
    if "hada_w1_a" in parts:
        return (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    if "lora_up.weight" in parts:
        return parts["lora_up.weight"].flatten(1) @ parts["lora_down.weight"].flatten(1)
    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    second = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    if second.dim() == 2 and module.org_weight.dim() == 4:
        second = second.reshape(second.shape[0], -1, *module.org_weight.shape[2:])
    if second.dim() == 4:
        first = first[:, :, None, None]
    return torch.kron(first.contiguous(), second.contiguous()).flatten(1)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_cs_equals_the_dense_cosine(model, algorithm):
    network = network_of(model, f"algo={algorithm}")
    dense = {"te": [], "unet": []}
    for layer, module in zip(network.layers(), network.modules):
        weight = module.org_weight.double().flatten(1)
        update = dense_update(module)
        cosine = ((weight * update).sum() / (weight.norm() * update.norm())).item()
        rows = (weight * update).sum(1) / (weight.norm(dim=1) * update.norm(dim=1))
        assert layer_cosine(layer, "matrix") == pytest.approx(cosine, abs=1e-6)
        assert layer_cosine(layer, "row") == pytest.approx(rows.nan_to_num(0).mean().item(), abs=1e-6)
        dense[layer.component].append(cosine)
    measured = mean_cosine(network.layers())
    assert measured["unet"] == pytest.approx(sum(dense["unet"]) / len(dense["unet"]), abs=1e-6)
    assert isinstance(network.layers()[0], DenseUpdateLayer) == (algorithm != "lora")


def test_a_dense_layer_is_live_and_a_zero_update_counts_as_zero(model):
    network = network_of(model, "algo=loha")
    layer, module = network.layers()[0], network.modules[0]
    before = layer_cosine(layer)
    module.hada_w1_a.data.neg_()
    assert layer_cosine(layer) == pytest.approx(-before)
    module.hada_w1_a.data.zero_()
    assert layer_cosine(layer) == 0.0


@pytest.mark.parametrize("algorithm", ["ia3", "diag-oft", "full"])
def test_algorithms_without_such_a_form_say_so(model, algorithm):
    network = create_lycoris_network(model, rank=4, network_args=[f"algo={algorithm}"])
    with pytest.raises(ValueError, match="CS cannot be measured for this LyCORIS algorithm"):
        network.layers()


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_a_file_comes_back_with_kohyas_text_encoder_names(tmp_path, algorithm):
    model = tiny_sd(tmp_path)
    network = network_of(model, f"algo={algorithm}")
    adapted = noise_of(model)
    save_lora(tmp_path / "lycoris.safetensors", network.state_for_file())
    tensors, _ = load_lora(tmp_path / "lycoris.safetensors")
    assert any(name.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj.") for name in tensors)
    assert not any(name.startswith("lora_te_encoder") for name in tensors)

    for settings in ({"rank": 2, "alpha": 1, "network_args": [f"algo={algorithm}"]}, {"dim_from_weights": True}):
        fresh = tiny_sd(tmp_path)
        again = create_lycoris_network(fresh, weights=tmp_path / "lycoris.safetensors", **settings)
        assert set(again.tensors()) == set(network.tensors())
        assert torch.allclose(noise_of(fresh), adapted, atol=1e-5)


def test_a_locon_of_lycoris_equals_networks_lora(tmp_path):
    """Same key names and the same meaning, so that either reads the other's file."""
    from network.lora import create_network

    model = tiny_sd(tmp_path)
    network = network_of(model, "algo=lora", "preset=attn-mlp")
    other = tiny_sd(tmp_path)
    create_network(other, rank=2, weights=network.state_for_file(), dim_from_weights=True)
    assert torch.allclose(noise_of(other), noise_of(model), atol=1e-5)


def test_training_moves_only_the_network(model):
    network = create_lycoris_network(model, rank=2, network_args=["algo=loha"])
    groups = network.parameter_groups(1e-2, None, 1e-3)
    assert {group["name"]: group["lr"] for group in groups} == {"te": 1e-3, "unet": 1e-2}
    before = noise_of(model)
    optimizer = torch.optim.SGD(groups)
    before.square().mean().backward()
    optimizer.step()
    after = noise_of(model)
    assert not torch.equal(after, before)
    network.multiplier = 0
    assert torch.allclose(noise_of(model), noise_of(tiny_sd_like(model)), atol=1e-6)


def tiny_sd_like(model):
    return tiny_sd(model.base_path)


def test_snapshots_of_the_live_tensors_restore_the_network(model):
    network = network_of(model, "algo=lora", "use_scalar=True")
    wanted = noise_of(model)
    snapshot = {name: value.detach().clone() for name, value in network.tensors().items()}
    for weight in network.parameters():
        weight.data.add_(0.1)
    assert not torch.allclose(noise_of(model), wanted)
    later = noise_of(model)
    state = network.state_for_file(tensors=snapshot)
    assert torch.equal(noise_of(model), later)
    network.load_tensors(snapshot)
    assert torch.equal(noise_of(model), wanted)
    assert all(torch.equal(value, network.state_for_file()[name]) for name, value in state.items())


def test_weights_that_do_not_fit_are_refused(model, tmp_path):
    state = network_of(model, "algo=loha").state_for_file()
    with pytest.raises(ValueError, match="instead of"):
        create_lycoris_network(tiny_sd(tmp_path), rank=3, alpha=1, network_args=["algo=loha"], weights=state)
    with pytest.raises(ValueError, match="is not trained here"):
        create_lycoris_network(tiny_sd(tmp_path), rank=2, alpha=1, network_args=["algo=lora"], weights=state)
    with pytest.raises(ValueError, match="alpha is 1 instead of 2"):
        create_lycoris_network(tiny_sd(tmp_path), rank=2, alpha=2, network_args=["algo=loha"], weights=state)


def test_only_the_chosen_part_is_trained(model):
    network = create_lycoris_network(model, rank=2, network_args=["algo=lora"], train_text_encoder=False)
    assert network.components == ["unet"]


def test_scaled_norms_respect_the_limit(model):
    network = network_of(model, "algo=lora")
    scaled, mean, largest = network.scale_weight_norms(0.05)
    assert scaled > 0 and largest < 0.05001 and mean < 0.05001


def test_options_are_checked():
    assert parse_lycoris_args(["algo=loha", "use_tucker=True", "conv_dim=4"]) == {
        "algo": "loha", "use_tucker": True, "conv_dim": "4",
    }  # fmt: skip
    for argument, message in (
        ("alog=loha", "did you mean algo="),
        ("algo=lowha", "allowed are lora, locon"),
        ("use_tucker=maybe", "only True or False"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_lycoris_args([argument])


@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr"])
def test_a_dora_with_magnitudes_of_inputs_is_taken_from_its_file(model, tmp_path, algorithm):
    network = network_of(model, f"algo={algorithm}", "dora_wd=True", "wd_on_output=False")
    save_lora(tmp_path / "dora.safetensors", network.state_for_file())
    adapted = noise_of(model)
    fresh = tiny_sd(tmp_path)
    again = create_lycoris_network(fresh, weights=tmp_path / "dora.safetensors", dim_from_weights=True)
    assert set(again.tensors()) == set(network.tensors())
    assert torch.allclose(noise_of(fresh), adapted, atol=1e-5)


def test_a_dora_that_web_uis_apply_otherwise_is_said():
    def said(*words):
        settings = {"network_module": "lycoris.kohya", "network_args": list(words), "train_full_unet": False}
        return network_notices(Namespace(**settings))

    assert "wd_on_output=False" in said("algo=locon", "dora_wd=True")[0]
    assert said("algo=locon", "dora_wd=True", "wd_on_output=False") == said("algo=loha") == []
