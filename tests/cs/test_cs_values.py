"""The factorised cosines against the published values and against B A formed in float64."""

import json

import numpy as np
import published_method
import pytest
import torch

from cs_fluctuation import DenseWeight, LoraLayer, NonFiniteWeightsError, layer_cosine, mean_cosine, measure_layers

GOLDEN_LAYERS = range(7)


def golden_layer(golden, index):
    return json.loads((golden / "cs_values.json").read_text())["layers"][index]


def test_every_golden_layer_is_tested(golden):
    assert len(json.loads((golden / "cs_values.json").read_text())["layers"]) == len(GOLDEN_LAYERS)


@pytest.mark.parametrize("index", GOLDEN_LAYERS)
@pytest.mark.parametrize("reduction", ["matrix", "row"])
def test_golden_cosine(golden, index, reduction):
    entry = golden_layer(golden, index)
    weight, down, up = (torch.tensor(entry[key], dtype=torch.float64) for key in ("weight", "lora_down", "lora_up"))
    layer = LoraLayer(entry["name"], "lm", weight, down, up)
    expected = entry[f"{reduction}_cosine"]
    if expected is None:
        expected = published_method.row_cosine(weight.numpy(), down.numpy(), up.numpy())
    assert layer_cosine(layer, reduction) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_random_linear_against_literal(dtype, tolerance, rank):
    torch.manual_seed(rank)
    weight, down, up = torch.randn(96, 80).to(dtype), torch.randn(rank, 80).to(dtype), torch.randn(96, rank).to(dtype)
    literal = [tensor.double().numpy() for tensor in (weight, down, up)]
    layer = LoraLayer("x", "lm", weight, down, up)
    for reduction in ("matrix", "row"):
        expected = getattr(published_method, f"{reduction}_cosine")(*literal)
        assert layer_cosine(layer, reduction) == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_is_flattened(kernel):
    torch.manual_seed(kernel)
    weight, down = torch.randn(12, 8, kernel, kernel), torch.randn(4, 8, kernel, kernel)
    up = torch.randn(12, 4, 1, 1)
    layer = LoraLayer("conv", "unet", weight, down, up)
    expected = published_method.matrix_cosine(weight.numpy(), down.numpy(), up.numpy())
    assert layer_cosine(layer) == pytest.approx(expected, rel=1e-5)


def test_blocks_of_rows_give_the_whole(monkeypatch):
    weight, down = torch.randn(50, 30), torch.randn(4, 30)
    whole = DenseWeight(weight)
    expected = whole.project(down), whole.row_norms()
    monkeypatch.setattr("cs_fluctuation.BLOCK_VALUES", 30 * 7)
    assert torch.allclose(whole.project(down), expected[0], atol=1e-6)
    assert torch.allclose(whole.row_norms(), expected[1], atol=1e-6)


def test_zero_update_zero_weight_and_zero_rows_count_as_zero():
    weight, down, up = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    for layer in (
        LoraLayer("zero up", "lm", weight, down, torch.zeros(6, 2)),
        LoraLayer("zero weight", "lm", torch.zeros(6, 5), down, up),
    ):
        assert layer_cosine(layer, "matrix") == 0.0
        assert layer_cosine(layer, "row") == 0.0
    half = up.clone()
    half[:3] = 0
    expected = published_method.row_cosine(weight.numpy(), down.numpy(), half.numpy())
    assert layer_cosine(LoraLayer("half", "lm", weight, down, half), "row") == pytest.approx(expected, rel=1e-5)


def test_a_positive_scale_changes_nothing():
    weight, down, up = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    one = layer_cosine(LoraLayer("x", "lm", weight, down, up))
    assert layer_cosine(LoraLayer("x", "lm", weight, down, up * 1e-4)) == pytest.approx(one, rel=1e-5)


def test_components_are_means_over_their_layers_and_all_over_every_layer():
    torch.manual_seed(0)
    layers = [
        LoraLayer(f"{component}{i}", component, torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2))
        for component, count in (("unet", 3), ("te", 1))
        for i in range(count)
    ]
    each = [layer_cosine(layer) for layer in layers]
    means = mean_cosine(layers, "matrix")
    assert means == pytest.approx({"unet": np.mean(each[:3]), "te": each[3], "all": np.mean(each)}, rel=1e-5)
    norm = measure_layers(layers)["delta_norm"]["all"]
    expected = np.sqrt(sum(((layer.up @ layer.down) ** 2).sum().item() for layer in layers))
    assert norm == pytest.approx(expected, rel=1e-5)


def test_weight_norms_are_computed_once():
    class Counting(DenseWeight):
        calls = 0

        def row_norms(self):
            self.calls += 1
            return super().row_norms()

    weight = Counting(torch.randn(6, 5))
    layer = LoraLayer("x", "lm", weight, torch.randn(2, 5), torch.randn(6, 2))
    layer_cosine(layer), layer_cosine(layer)
    assert weight.calls == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_diverged_weights_are_an_error_that_names_the_layer(bad):
    up = torch.randn(6, 2)
    up[0, 0] = bad
    with pytest.raises(NonFiniteWeightsError, match="q_proj"):
        measure_layers([LoraLayer("q_proj", "lm", torch.randn(6, 5), torch.randn(2, 5), up)])


def test_unknown_reduction_is_an_error():
    layer = LoraLayer("x", "lm", torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2))
    with pytest.raises(ValueError, match="'matrix'"):
        layer_cosine(layer, "column")
