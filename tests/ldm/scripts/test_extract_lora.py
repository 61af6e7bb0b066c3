"""LoRAs out of the difference of two models: exact at full rank, the best at every other, the
layers asked for."""

import pytest
import torch  # noqa: E402
from extract_lora import Selection, changed_layers, extract, factorise, main  # noqa: E402
from ldm_runs import make_base, make_pictures, train  # noqa: E402

from base.sd import load_sd_model  # noqa: E402
from network.folding import fold_lora  # noqa: E402
from network.lora import find_modules  # noqa: E402
from network.lora_file import group_modules, load_lora  # noqa: E402

FULL_RANK = 10_000


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(base folder, folder of the model after a few steps of --train_full_unet)."""
    place = tmp_path_factory.mktemp("extract")
    base, images = make_base(place / "base"), make_pictures(place / "images")
    train(
        base, images, place / "tuned", train_full_unet=True, network_alpha=None, max_train_steps=4, learning_rate=1e-2
    )
    return base, str(place / "tuned" / "lora")


def noise_of(model):
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return model.predict_noise(latents, torch.tensor([100]), model.encode_text(["a cat"]))


def without_other_changes(base, tuned):
    """The tuned model with the base's biases, norms and embeddings: all that a LoRA can
    reproduce."""
    original, tuned = load_sd_model(base), load_sd_model(tuned)
    kept = {f"{path}.weight" for part, path, _, _ in find_modules(tuned, with_convolutions=True) if part == "unet"}
    state = {name: value for name, value in original.unet.state_dict().items() if name not in kept}
    tuned.unet.load_state_dict(state, strict=False)
    return tuned


def test_full_rank_reproduces_the_tuned_unet(models, tmp_path, capsys):
    base, tuned = models
    words = ["--model_org", base, "--model_tuned", tuned, "--select", "all", "--rank", str(FULL_RANK)]
    assert main([*words, "--save_to", str(tmp_path / "lora.safetensors")]) == 0
    folded, expected = load_sd_model(base), noise_of(without_other_changes(base, tuned))
    before = (noise_of(folded) - expected).abs().max()
    fold_lora(folded, load_lora(tmp_path / "lora.safetensors")[0])
    assert before > 0.05 and torch.allclose(noise_of(folded), expected, atol=1e-5)
    shown = capsys.readouterr().out
    assert "of the change is in biases, norms and embeddings" in shown and "--dim_from_weights" in shown


def test_layers_are_ranked_and_chosen(models, tmp_path, capsys):
    base, tuned = models
    layers = changed_layers(load_sd_model(base), load_sd_model(tuned))
    importances = [(layer.change().norm() / layer.base.norm()).item() for layer in layers]
    assert importances == sorted(importances, reverse=True) and len(layers) > 20
    assert [layer.name for layer in Selection.parse("top:3").choose(layers)] == [layer.name for layer in layers[:3]]
    total = sum(layer.energy for layer in layers)
    kept = Selection.parse("energy:0.5").choose(layers)
    assert sum(layer.energy for layer in kept) >= total / 2 > sum(layer.energy for layer in kept[:-1])
    assert len(Selection.parse("energy:1").choose(layers)) == len(layers) == len(Selection.parse("all").choose(layers))

    words = ["--model_org", base, "--model_tuned", tuned, "--save_to", str(tmp_path / "lora.safetensors")]
    assert main([*words, "--select", "top:3", "--rank", "2", "--save_precision", "fp16"]) == 0
    tensors, metadata = load_lora(tmp_path / "lora.safetensors")
    modules = group_modules(tensors)
    assert set(modules) == {layer.name for layer in layers[:3]} and metadata["ss_network_dim"] == "2"
    assert {len(parts["lora_down.weight"]) for parts in modules.values()} == {2}
    rows = [line for line in capsys.readouterr().out.splitlines() if "lora_unet_" in line]
    assert len(rows) == len(layers) and sum("*" in row for row in rows) == 3


@pytest.mark.parametrize("shape", [(6, 4), (5, 7, 1, 1), (6, 4, 3, 3)])
def test_factors_are_the_best_of_their_rank(shape):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(change.flatten(1))
    for rank in (1, 3, len(values), 100):
        down, up, share = factorise(change, rank)
        product = up.flatten(1) @ down.flatten(1)
        error = (product - change.flatten(1)).norm().item()
        assert error == pytest.approx(values[rank:].norm().item(), abs=1e-5)
        assert share == pytest.approx(1 - (error / change.norm().item()) ** 2, abs=1e-5)
    assert down.shape == (len(values), *shape[1:]) and up.shape[1] == len(values)


def test_stage_two_trains_exactly_the_extracted_layers(models, tmp_path):
    base, tuned = models
    file = str(tmp_path / "lora.safetensors")
    assert (
        main(["--model_org", base, "--model_tuned", tuned, "--save_to", file, "--select", "top:4", "--rank", "3"]) == 0
    )
    start = load_lora(file)[0]
    settings = dict(network_weights=file, dim_from_weights=True, early_stop=True, window_size=3, cs_interval=1)
    result = train(base, make_pictures(tmp_path / "images"), tmp_path / "out", **settings, max_train_steps=40)
    assert result["outcome"] == "stopped_early" and set(result["parts"]) == {"unet"}
    end = load_lora(tmp_path / "out" / "lora.safetensors")[0]
    assert end.keys() == start.keys()
    changes = [(end[name] - start[name]).norm() / start[name].norm() for name in start if "alpha" not in name]
    assert all(0 < change < 2 for change in changes)  # trained on from where stage one left them


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--select": "half"}, "--select half: give all, top:N"),
        ({"--select": "energy:1.5"}, "--select energy:1.5"),
        ({"--select": "top:0"}, "--select top:0"),
        ({"--rank": "0"}, "--rank 0 is not allowed"),
        ({"--model_tuned": "nowhere"}, "nowhere does not exist"),
        ({"--model_tuned": None}, "nothing to extract"),
    ],
)
def test_bad_arguments_end_with_code_2_and_one_line(models, tmp_path, capsys, changes, message):
    base, tuned = models
    words = {"--model_org": base, "--model_tuned": tuned, "--save_to": str(tmp_path / "lora.safetensors"), **changes}
    assert main([word for flag, value in words.items() for word in (flag, value or base)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and not list(tmp_path.iterdir())


def test_models_of_another_kind_are_refused(models, tmp_path):
    from tiny_sd import tiny_sd

    with pytest.raises(ValueError, match="not of one kind"):
        changed_layers(load_sd_model(models[0]), tiny_sd(tmp_path))


def test_a_lower_rank_is_further_off(models):
    base, tuned = models
    layers = changed_layers(load_sd_model(base), load_sd_model(tuned))
    expected, errors = noise_of(without_other_changes(base, tuned)), []
    for rank in (1, 4, FULL_RANK):
        folded = load_sd_model(base)
        fold_lora(folded, extract(layers, rank)[0])
        errors.append((noise_of(folded) - expected).norm().item())
    assert errors[0] > errors[1] > 100 * errors[2]
