"""LoRA layers: which modules, what they compute, how they load, drop out and are measured."""

import pytest
import quiet_libraries  # noqa: E402, F401
import torch  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from tiny_sd import tiny_sd  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

from base.sd import SDModel  # noqa: E402
from base.single_file import CONFIG_ROOT  # noqa: E402
from cs_fluctuation import mean_cosine  # noqa: E402
from network.lora import create_network, find_modules  # noqa: E402
from network.lora_file import load_lora, save_lora  # noqa: E402


@pytest.fixture
def model(tmp_path):
    return tiny_sd(tmp_path)


def randomize(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    return network


def noise_of(model):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return model.predict_noise(latents, torch.tensor([10, 900]), model.encode_text(["a cat", "a red dog"]))


def real_size_model(name):
    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(CONFIG_ROOT / name / "unet")
        unet = UNet2DConditionModel.from_config(config)
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIG_ROOT / name / "text_encoder"))
    return SDModel(unet, None, [text_encoder], [None], {}, "x")


def kohya_names_sd1():
    """The module names of a LoRA for SD 1.x, from the structure of the model: 192 of the U-Net, 72
    of CLIP."""
    blocks = [f"down_blocks_{b}_attentions_{a}" for b in range(3) for a in range(2)]
    blocks += [f"up_blocks_{b}_attentions_{a}" for b in range(1, 4) for a in range(3)]
    blocks += ["mid_block_attentions_0"]
    inner = [f"attn{n}_to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
    names = [f"lora_unet_{block}_proj_{side}" for block in blocks for side in ("in", "out")]
    names += [f"lora_unet_{block}_transformer_blocks_0_{part}" for block in blocks for part in inner]
    parts = [f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    return names + [f"lora_te_text_model_encoder_layers_{layer}_{part}" for layer in range(12) for part in parts]


def test_names_on_the_real_sd1_shape_are_kohyas_264():
    network = create_network(real_size_model("sd1"), rank=8, alpha=4)
    names = kohya_names_sd1()
    assert len(names) == 264
    expected = {f"{name}.lora_{side}.weight" for name in names for side in ("down", "up")}
    assert set(network.tensors()) == expected
    by_name = {module.name: module for module in network.modules}
    proj_in = by_name["lora_unet_down_blocks_0_attentions_0_proj_in"]
    assert (tuple(proj_in.down.shape), tuple(proj_in.up.shape)) == ((8, 320, 1, 1), (320, 8, 1, 1))
    ff = by_name["lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"]
    assert (tuple(ff.down.shape), tuple(ff.up.shape)) == ((8, 1280), (10240, 8))


def test_sd2_has_linear_projections_and_23_text_layers():
    found = find_modules(real_size_model("sd2"))
    assert sum(component == "te" for component, *_ in found) == 23 * 6
    assert sum(component == "unet" for component, *_ in found) == 192
    assert all(isinstance(layer, torch.nn.Linear) for *_, layer in found)


def test_convolution_rank_adds_the_residual_and_sampling_blocks():
    found = find_modules(real_size_model("sd1"), train_text_encoder=False, with_convolutions=True)
    # 22 residual blocks of two 3x3 convolutions and a linear layer, 14 of them with a 1x1 shortcut,
    # 3 + 3 samplers.
    assert len(found) == 192 + 22 * 3 + 14 + 6
    network = create_network(real_size_model("sd1"), rank=8, conv_rank=2, conv_alpha=1, train_text_encoder=False)
    by_name = {module.name: module for module in network.modules}
    conv = by_name["lora_unet_down_blocks_0_resnets_0_conv1"]
    assert (tuple(conv.down.shape), tuple(conv.up.shape), conv.alpha) == ((2, 320, 3, 3), (320, 2, 1, 1), 1.0)
    shortcut = by_name["lora_unet_down_blocks_1_resnets_0_conv_shortcut"]
    assert shortcut.down.shape[0] == 8  # a 1x1 convolution has the linear layers' rank


def test_a_new_network_changes_nothing_and_up_starts_at_zero(model):
    before = noise_of(model)
    network = create_network(model, rank=4)
    assert torch.equal(noise_of(model), before)
    assert all(not module.up.any() and module.down.any() for module in network.modules)
    bound = (1 / network.modules[0].down.shape[1]) ** 0.5  # Kaiming, a = sqrt 5
    assert network.modules[0].down.abs().max() <= bound
    trainable = [w for part in (model.unet, model.text_encoders[0]) for w in part.parameters() if w.requires_grad]
    assert {id(w) for w in trainable} == {id(w) for w in network.parameters()}


@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3"])
def test_forward_is_the_definition(model, kind):
    network = randomize(create_network(model, rank=4, alpha=2, conv_rank=3, conv_alpha=6))
    wanted = {
        "linear": lambda m: m.weight.dim() == 2 and m.component == "unet",
        "1x1": lambda m: m.weight.shape[2:] == (1, 1),
        "3x3": lambda m: m.weight.shape[2:] == (3, 3),
    }[kind]
    module = next(module for module in network.modules if wanted(module))
    base, x = module.layer.get_base_layer(), torch.randn(2, module.weight.shape[1], 6, 6)
    dense = (module.up.flatten(1) @ module.down.flatten(1)).view(module.weight.shape)
    scaled = module.weight + {"linear": 2 / 4, "1x1": 2 / 4, "3x3": 6 / 3}[kind] * dense
    if kind == "linear":
        x = x[:, :, 0, 0]
        expected = torch.nn.functional.linear(x, scaled, base.bias)
    else:
        expected = torch.nn.functional.conv2d(x, scaled, base.bias, base.stride, base.padding)
    assert torch.allclose(module.layer(x), expected, atol=1e-5)


def test_multiplier_zero_is_the_base_and_one_comes_back(model):
    base = noise_of(model)
    network = randomize(create_network(model, rank=4))
    adapted = noise_of(model)
    assert not torch.allclose(adapted, base)
    network.multiplier = 0
    assert torch.equal(noise_of(model), base)
    network.multiplier = 1
    assert torch.equal(noise_of(model), adapted)


def test_a_handmade_kohya_file_loads_with_its_alpha(model, tmp_path):
    """A LoRA written by another program: own alpha, half precision, one linear layer and one 1x1
    convolution."""
    torch.manual_seed(3)
    linear = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    pointwise = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {
        f"{linear}.lora_down.weight": torch.randn(2, 16).half(),
        f"{linear}.lora_up.weight": torch.randn(16, 2).half(),
        f"{linear}.alpha": torch.tensor(8.0),
        f"{pointwise}.lora_down.weight": torch.randn(2, 16, 1, 1).half(),
        f"{pointwise}.lora_up.weight": torch.randn(16, 2, 1, 1).half(),
        f"{pointwise}.alpha": torch.tensor(1.0),
    }
    path = tmp_path / "made_elsewhere.safetensors"
    save_lora(path, tensors)
    network = create_network(model, rank=2, alpha=1)
    network.load_tensors(load_lora(path)[0])
    for module in network.modules:
        if module.name == linear:
            update = module.alpha / module.rank * module.up @ module.down
            up, down = tensors[f"{linear}.lora_up.weight"].float(), tensors[f"{linear}.lora_down.weight"].float()
            assert torch.allclose(update, 8 / 2 * up @ down, atol=1e-5)
            assert module.alpha == 1.0
        elif module.name == pointwise:
            assert torch.equal(module.up, tensors[f"{pointwise}.lora_up.weight"].float())
        else:
            assert not module.up.any()


def test_dim_from_weights_takes_modules_ranks_and_alphas(tmp_path):
    first = randomize(create_network(tiny_sd(tmp_path), rank=3, alpha=2, conv_rank=5, conv_alpha=4))
    path = tmp_path / "lora.safetensors"
    save_lora(path, first.state_for_file())
    model = tiny_sd(tmp_path)
    second = create_network(model, rank=99, weights=path, dim_from_weights=True)
    sizes = [(m.name, m.rank, m.alpha) for m in first.modules]
    assert sorted((m.name, m.rank, m.alpha) for m in second.modules) == sorted(sizes)
    assert all(torch.equal(second.tensors()[name], value) for name, value in first.tensors().items())
    with pytest.raises(ValueError, match="needs --network_weights"):
        create_network(tiny_sd(tmp_path), dim_from_weights=True)


def test_weights_of_another_rank_are_refused_by_name(model, tmp_path):
    other = create_network(tiny_sd(tmp_path), rank=8)
    with pytest.raises(ValueError, match=r"lora_down.weight is \(8, 32\) instead of \(4, 32\)"):
        create_network(model, rank=4, weights=other.state_for_file())
    with pytest.raises(ValueError, match="no module lora_unet_nowhere"):
        create_network(tiny_sd(tmp_path), rank=4).load_tensors({"lora_unet_nowhere.lora_down.weight": torch.ones(4, 4)})


def test_a_snapshot_becomes_a_file_without_touching_the_live_weights(model):
    network = randomize(create_network(model, rank=4, alpha=2))
    snapshot = {name: value.detach() + 1 for name, value in network.tensors().items()}
    live = network.state_for_file()
    state = network.state_for_file(torch.float16, tensors=snapshot)
    assert state.keys() == live.keys() and len(state) == 3 * len(network.modules)
    assert all(torch.equal(state[name], value.half()) for name, value in snapshot.items())
    assert all(torch.equal(network.state_for_file()[name], value) for name, value in live.items())


def test_a_file_with_te1_prefix_loads_into_a_single_text_encoder(model, tmp_path):
    other = randomize(create_network(tiny_sd(tmp_path), rank=4))
    renamed = {name.replace("lora_te_", "lora_te1_"): value for name, value in other.state_for_file().items()}
    network = create_network(model, rank=4, weights=renamed)
    assert all(torch.equal(network.tensors()[name], value) for name, value in other.tensors().items())


def test_nothing_to_train_is_an_error(model):
    with pytest.raises(ValueError, match="no layer to train"):
        create_network(model, train_unet=False, train_text_encoder=False)


def test_parameter_groups_have_their_own_rates(model):
    network = create_network(model, rank=2)
    rates = {group["name"]: group["lr"] for group in network.parameter_groups(1e-3, None, 5e-5)}
    assert rates == {"te": 5e-5, "unet": 1e-3}
    only_unet = network.parameter_groups(1e-3, 1e-4, 0)
    assert [group["name"] for group in only_unet] == ["unet"]
    count = sum(len(group["params"]) for group in network.parameter_groups(1e-3))
    assert count == len(network.parameters()) == 2 * len(network.modules)


def test_cosines_of_the_live_layers_equal_the_dense_ones(model):
    network = randomize(create_network(model, rank=3, conv_rank=2))
    dense = {"te": [], "unet": []}
    for module in network.modules:
        weight = module.weight.double().flatten()
        update = (module.up.flatten(1).double() @ module.down.flatten(1).double()).flatten()
        dense[module.component].append((weight @ update / (weight.norm() * update.norm())).item())
    measured = mean_cosine(network.layers(), reduction="matrix")
    for component, values in dense.items():
        assert measured[component] == pytest.approx(sum(values) / len(values), abs=1e-6)
    layer, module = network.layers()[0], network.modules[0]
    assert layer.weight.weight is module.weight and layer.down is module.down and layer.up is module.up  # no copies
    module.up.data.neg_()
    flipped = mean_cosine(network.layers()[:1], reduction="matrix")["te"]
    assert flipped == pytest.approx(-dense["te"][0], abs=1e-6)


def test_scale_weight_norms_shrinks_only_what_exceeds(model):
    network = randomize(create_network(model, rank=4, alpha=2))

    def norms():
        return [(m.alpha / m.rank * m.up.flatten(1) @ m.down.flatten(1)).norm().item() for m in network.modules]

    before = norms()
    limit = sorted(before)[len(before) // 2]
    scaled, mean, largest = network.scale_weight_norms(limit)
    assert norms() == pytest.approx([min(norm, limit) for norm in before], rel=1e-5)
    assert scaled == sum(norm > limit * (1 + 1e-6) for norm in before)
    assert (mean, largest) == pytest.approx((sum(norms()) / len(before), limit), rel=1e-5)


def one_layer(model, **dropouts):
    network = randomize(create_network(model, rank=8, alpha=8, train_text_encoder=False, **dropouts))
    module = next(m for m in network.modules if m.weight.dim() == 2)
    base = module.layer.get_base_layer()
    return network, module, lambda x: module.layer(x) - base(x)


def test_rank_dropout_switches_whole_ranks_of_a_sample(model):
    network, module, update = one_layer(model, rank_dropout=0.5)
    x = torch.randn(4, 10, module.weight.shape[1])
    torch.manual_seed(0)
    kept = (torch.rand(4, 1, 8) >= 0.5).float()
    torch.manual_seed(0)
    expected = (x @ module.down.T * kept / 0.5) @ module.up.T
    assert torch.allclose(update(x), expected, atol=1e-5)
    network.eval()
    assert torch.allclose(update(x), x @ module.down.T @ module.up.T, atol=1e-5)


def test_module_dropout_switches_the_layer(model):
    network, module, update = one_layer(model, module_dropout=0.5)
    x = torch.randn(2, 3, module.weight.shape[1])
    full = x @ module.down.T @ module.up.T
    torch.manual_seed(0)
    outcomes = [update(x) for _ in range(40)]
    off = sum(not outcome.any() for outcome in outcomes)
    assert 8 < off < 32
    assert all(torch.allclose(outcome, full, atol=1e-5) for outcome in outcomes if outcome.any())


def test_network_dropout_drops_values_between_down_and_up(model):
    network, module, update = one_layer(model, dropout=0.25)
    x = torch.randn(2, 3, module.weight.shape[1])
    torch.manual_seed(0)
    expected = torch.nn.functional.dropout(x @ module.down.T, 0.25) @ module.up.T
    torch.manual_seed(0)
    assert torch.allclose(update(x), expected, atol=1e-5)


def test_half_precision_base_trains_float32_layers(tmp_path):
    model = tiny_sd(tmp_path)
    model.unet.to(torch.bfloat16)
    network = create_network(model, rank=2, train_text_encoder=False)
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    states = torch.randn(1, 77, 32, dtype=torch.bfloat16)
    output = model.predict_noise(torch.randn(1, 4, 8, 8, dtype=torch.bfloat16), torch.tensor([5]), states)
    output.float().square().mean().backward()
    assert all(torch.isfinite(module.up.grad).all() for module in network.modules)
    references = network.tensors()
    network.to(dtype=torch.float16)
    assert all(weight.dtype == torch.float16 for weight in references.values())


def test_saved_lora_loads_in_diffusers_and_changes_the_picture(tmp_path):
    trained = tiny_sd(tmp_path)
    network = randomize(create_network(trained, rank=4, alpha=2))
    save_lora(tmp_path / "lora.safetensors", network.state_for_file())

    def picture(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipeline("a red cat", num_inference_steps=2, height=64, width=64, output_type="np", generator=generator)

    ours = picture(trained.to_pipeline()).images
    pipeline = tiny_sd(tmp_path).to_pipeline()
    without = picture(pipeline).images
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    theirs = picture(pipeline).images
    assert abs(theirs - without).max() > 1e-3
    assert abs(theirs - ours).max() < 1e-4
