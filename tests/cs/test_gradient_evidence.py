"""Gradient evidence against a slow float64 version, against pure noise and a pure signal, and over
a save and a load."""

import math

import pytest
import torch

from es_lora.gradient_evidence import GradientEvidence


def parameters(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def feed(parameters, gradients):
    """One backward pass whose gradients are exactly these."""
    sum((parameter * gradient).sum() for parameter, gradient in zip(parameters, gradients)).backward()


def slow_evidence(series, horizon):
    """The definition, written out: weights of the running mean, float64. series: list of gradients,
    equal shapes."""
    decay = 1 - 1 / horizon
    weights = [(1 - decay) * decay ** (len(series) - 1 - k) for k in range(len(series))]
    total = math.fsum(weights)
    mean = sum(w * g.double() for w, g in zip(weights, series)) / total
    square = sum(w * g.double() ** 2 for w, g in zip(weights, series)) / total
    noise = math.fsum(w * w for w in weights) / total**2
    return ((mean**2 / square)[square > 0].mean() / noise).item()


def test_equals_the_definition_at_every_step():
    [weight] = parameters((6, 7))
    evidence, generator, series = GradientEvidence([weight], 10), torch.Generator().manual_seed(1), []
    for step in range(40):
        gradient = torch.randn(6, 7, generator=generator) + 0.3
        gradient[0] = 0  # a row that never learns is no evidence of anything
        series.append(gradient)
        feed([weight], [gradient])
        if step:
            assert evidence.value() == pytest.approx(slow_evidence(series, 10), rel=1e-5)


def test_noise_gives_one_and_a_constant_gradient_the_most_there_can_be():
    [weight] = parameters((200, 200))
    noise, generator = GradientEvidence([weight], 20), torch.Generator().manual_seed(2)
    for _ in range(200):
        feed([weight], [torch.randn(200, 200, generator=generator)])
    assert noise.value() == pytest.approx(1, abs=0.02)
    signal = GradientEvidence([weight], 20)
    for _ in range(200):
        feed([weight], [torch.ones(200, 200)])
    assert signal.value() == pytest.approx(2 * 20 - 1, rel=1e-3)


def test_scale_of_the_gradient_does_not_matter():
    values = []
    for scale in (1e-6, 1.0, 1e6):
        [weight] = parameters((30, 30))
        evidence, generator = GradientEvidence([weight], 8), torch.Generator().manual_seed(3)
        for _ in range(30):
            feed([weight], [scale * (torch.randn(30, 30, generator=generator) + 0.5)])
        values.append(evidence.value())
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)


def test_accumulation_counts_every_micro_batch():
    """Two backward passes into one .grad are two gradients, not one that has doubled."""
    [weight] = parameters((5, 5))
    evidence = GradientEvidence([weight], 6)
    first, second = torch.randn(5, 5), torch.randn(5, 5)
    feed([weight], [first])
    feed([weight], [second])
    assert evidence.value() == pytest.approx(slow_evidence([first, second], 6), rel=1e-5)
    assert torch.equal(weight.grad, first + second)  # and training sees what it always sees


def test_a_sample_of_many_parameters_is_enough():
    watched = parameters((300, 200), (200, 300))
    whole, sample = GradientEvidence(watched, 10), GradientEvidence(watched, 10, max_values=20_000)
    generator = torch.Generator().manual_seed(4)
    for _ in range(50):
        feed(watched, [torch.randn(p.shape, generator=generator) + 0.2 for p in watched])
    assert sample.state_tensors()["means"].numel() < 30_000
    assert sample.value() == pytest.approx(whole.value(), rel=0.03)


def test_save_and_load_go_on_bit_for_bit():
    [weight] = parameters((9, 4))
    evidence, generator = GradientEvidence([weight], 7), torch.Generator().manual_seed(5)
    gradients = [torch.randn(9, 4, generator=generator) + 0.1 for _ in range(12)]
    for gradient in gradients[:6]:
        feed([weight], [gradient])
    [other] = parameters((9, 4))
    resumed = GradientEvidence([other], 7)
    resumed.load_state_tensors(evidence.state_tensors())
    for gradient in gradients[6:]:
        feed([weight], [gradient])
        feed([other], [gradient])
    assert resumed.value() == evidence.value()
    with pytest.raises(ValueError, match="another LoRA"):
        GradientEvidence(parameters((3, 4)), 7).load_state_tensors(evidence.state_tensors())


def test_infinite_gradients_do_no_harm_and_closing_ends_the_watch():
    [weight] = parameters((4, 4))
    evidence = GradientEvidence([weight], 5)
    assert evidence.value() is None
    for gradient in (torch.ones(4, 4), torch.full((4, 4), math.inf), torch.ones(4, 4)):
        feed([weight], [gradient])
    value = evidence.value()
    assert math.isfinite(value)
    evidence.close()
    feed([weight], [torch.zeros(4, 4)])
    assert evidence.value() == value
