"""The training objective against slow literal formulas, one picture and one element at a time."""

import math
from types import SimpleNamespace

import pytest
import torch

from training import loss as dl

DEFAULTS = dict(
    noise_offset=None,
    noise_offset_random_strength=False,
    adaptive_noise_scale=None,
    multires_noise_iterations=None,
    multires_noise_discount=0.3,
    ip_noise_gamma=None,
    ip_noise_gamma_random_strength=False,
    min_timestep=None,
    max_timestep=None,
    loss_type="l2",
    huber_schedule="snr",
    huber_c=0.1,
    huber_scale=1.0,
    min_snr_gamma=None,
    scale_v_pred_loss_like_noise_pred=False,
    v_pred_like_loss=None,
    debiased_estimation_loss=False,
)


def settings(**changes):
    return SimpleNamespace(**{**DEFAULTS, **changes})


def stable_diffusion_schedule(prediction_type="epsilon"):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return dl.NoiseSchedule(torch.cumprod(1 - betas, 0).float(), prediction_type)


def generators(n, step=0):
    return [dl.sample_generator(3, step, f"{i}.png", 0) for i in range(n)]


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    latents, prediction = torch.randn(4, 4, 8, 6, generator=draw), torch.randn(4, 4, 8, 6, generator=draw)
    return latents, prediction, torch.tensor([0, 13, 500, 999])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noisy_latents_and_targets(batch, prediction_type):
    latents, noise, timesteps = batch
    schedule = stable_diffusion_schedule(prediction_type)
    noisy, wanted = dl.add_noise(schedule, latents, noise, timesteps), dl.target(schedule, latents, noise, timesteps)
    for b, t in enumerate(timesteps.tolist()):
        share = float(schedule.alphas_cumprod[t])
        x, e = latents[b, 1, 2, 3].item(), noise[b, 1, 2, 3].item()
        assert noisy[b, 1, 2, 3].item() == pytest.approx(math.sqrt(share) * x + math.sqrt(1 - share) * e, abs=1e-5)
        v = math.sqrt(share) * e - math.sqrt(1 - share) * x
        assert wanted[b, 1, 2, 3].item() == pytest.approx(e if prediction_type == "epsilon" else v, abs=1e-5)


def literal_loss(chosen, schedule, prediction, wanted, timesteps, weights, masks):
    """Each picture's loss in plain Python floats."""
    result = []
    for b, t in enumerate(timesteps.tolist()):
        share = float(schedule.alphas_cumprod[t])
        snr = min(share / (1 - share), 1000.0)
        if chosen.huber_schedule == "constant":
            c = chosen.huber_c * chosen.huber_scale
        elif chosen.huber_schedule == "exponential":
            c = chosen.huber_c ** (t / 1000) * chosen.huber_scale
        else:
            c = (1 - chosen.huber_c) / (1 + math.sqrt((1 - share) / share)) ** 2 + chosen.huber_c
        total, count = 0.0, 0
        for channel in range(4):
            for y in range(8):
                for x in range(6):
                    d = prediction[b, channel, y, x].item() - wanted[b, channel, y, x].item()
                    value = {
                        "l1": abs(d),
                        "l2": d * d,
                        "huber": 2 * c * (math.sqrt(d * d + c * c) - c),
                        "smooth_l1": 2 * (math.sqrt(d * d + c * c) - c),
                    }[chosen.loss_type]
                    if masks is not None:  # masks are 8 times as large: the mean of the 8 x 8 block above the latent
                        value *= masks[b, 0, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean().item()
                    total, count = total + value, count + 1
        value, predicts_v = total / count * weights[b].item(), schedule.prediction_type == "v_prediction"
        if chosen.min_snr_gamma:
            value *= min(snr, chosen.min_snr_gamma) / (snr + 1 if predicts_v else snr)
        if chosen.scale_v_pred_loss_like_noise_pred:
            value *= snr / (snr + 1)
        if chosen.v_pred_like_loss:
            value += value / (snr / (snr + 1)) * chosen.v_pred_like_loss
        if chosen.debiased_estimation_loss:
            value *= 1 / (snr + 1) if predicts_v else 1 / math.sqrt(snr)
        result.append(value)
    return result


CASES = [
    dict(),
    dict(loss_type="l1"),
    dict(loss_type="huber"),
    dict(loss_type="huber", huber_schedule="exponential", huber_scale=1.5),
    dict(loss_type="smooth_l1", huber_schedule="constant", huber_c=0.3, huber_scale=2.0),
    dict(loss_type="smooth_l1"),
    dict(min_snr_gamma=5.0),
    dict(v_pred_like_loss=0.3),
    dict(debiased_estimation_loss=True),
    dict(min_snr_gamma=1.0, debiased_estimation_loss=True, loss_type="l1"),
    dict(scale_v_pred_loss_like_noise_pred=True),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_loss_is_the_literal_formula(batch, changes, prediction_type, masked):
    latents, prediction, timesteps = batch
    chosen, schedule = settings(**changes), stable_diffusion_schedule(prediction_type)
    weights = torch.tensor([1.0, 0.5, 1.0, 2.0])
    masks = torch.rand(4, 1, 64, 48, generator=torch.Generator().manual_seed(1)) if masked else None
    got = dl.sample_losses(chosen, schedule, prediction, latents, timesteps, weights, masks)
    assert got.tolist() == pytest.approx(
        literal_loss(chosen, schedule, prediction, latents, timesteps, weights, masks), rel=2e-3
    )


def test_zero_terminal_snr():
    before = stable_diffusion_schedule().alphas_cumprod
    after = dl.rescale_to_zero_terminal_snr(before)
    roots = [math.sqrt(value) for value in before.double().tolist()]
    scale = roots[0] / (roots[0] - roots[-1])
    assert after.tolist() == pytest.approx([((root - roots[-1]) * scale) ** 2 for root in roots], abs=1e-7)
    assert after[-1] == 0 and after[0] == pytest.approx(before[0].item())
    schedule = dl.NoiseSchedule(after, "v_prediction")
    chosen = settings(min_snr_gamma=5.0, debiased_estimation_loss=True, loss_type="huber")
    last = torch.tensor([999])
    loss = dl.sample_losses(chosen, schedule, torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), last, torch.ones(1))
    assert torch.isfinite(loss).all()


def test_timesteps_stay_in_range():
    schedule, chosen = stable_diffusion_schedule(), settings(min_timestep=10, max_timestep=13)
    seen = {dl.draw_timestep(chosen, schedule, dl.sample_generator(0, step, "a", 0)).item() for step in range(100)}
    assert seen == {10, 11, 12}


def test_noise_offset_moves_whole_channels():
    latent = torch.zeros(4, 256, 256)
    plain = dl.draw_noise(settings(), latent, dl.sample_generator(1, 0, "a", 0))
    offset = dl.draw_noise(settings(noise_offset=0.5), latent, dl.sample_generator(1, 0, "a", 0))
    moved = offset - plain  # (4, 256, 256): one value a channel
    assert moved.flatten(1).std(dim=1).max() < 1e-6 and moved.abs().mean() > 0.05
    means = [
        dl.draw_noise(settings(noise_offset=0.5), latent[:, :8, :8], dl.sample_generator(1, step, "a", 0)).mean((1, 2))
        for step in range(400)
    ]
    expected = math.sqrt(0.5**2 + 1 / 64)  # the offset's deviation and that of a mean of 64 white values
    assert torch.cat(means).std().item() == pytest.approx(expected, rel=0.1)


def test_adaptive_and_random_offset_strength():
    latent = torch.stack([torch.full((8, 8), value) for value in (0.0, 1.0, -2.0, 3.0)])
    draw = lambda **changes: dl.draw_noise(settings(**changes), latent, dl.sample_generator(1, 0, "a", 0))  # noqa: E731
    unit = draw(noise_offset=1.0) - draw()
    adaptive = draw(noise_offset=0.1, adaptive_noise_scale=0.2) - draw()
    ratio = (adaptive / unit).mean((1, 2))  # 0.1 + 0.2 * |mean of the channel|
    assert ratio.tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7], abs=1e-4)
    off = draw(noise_offset=0.1, adaptive_noise_scale=-0.2) - draw()
    assert off[3].abs().max() == 0  # never below zero
    weak = dl._offset_strength(
        settings(noise_offset=0.4, noise_offset_random_strength=True), latent, dl.sample_generator(1, 0, "a", 0)
    )
    assert 0 <= weak < 0.4


def test_multires_noise_is_smoother_and_has_unit_deviation():
    latent = torch.zeros(4, 64, 48)
    plain = dl.draw_noise(settings(), latent, dl.sample_generator(1, 0, "a", 0))
    coarse = dl.draw_noise(
        settings(multires_noise_iterations=6, multires_noise_discount=0.9), latent, dl.sample_generator(1, 0, "a", 0)
    )
    assert coarse.shape == plain.shape and coarse.std().item() == pytest.approx(1, abs=1e-4)

    def neighbours(noise):
        return (noise[:, :, 1:] * noise[:, :, :-1]).mean().item()

    assert abs(neighbours(plain)) < 0.05 < neighbours(coarse)


def test_input_perturbation_leaves_the_target_alone():
    latents, schedule = torch.zeros(2, 4, 64, 64), stable_diffusion_schedule()
    noise, seen, timesteps = dl.draw_batch(settings(ip_noise_gamma=0.1), schedule, latents, generators(2))
    assert (seen - noise).std().item() == pytest.approx(0.1, rel=0.05)
    plain, same, _ = dl.draw_batch(settings(), schedule, latents, generators(2))
    assert torch.equal(plain, same) and torch.equal(plain, noise)
    assert timesteps.shape == (2,) and timesteps.dtype == torch.int64


def test_noise_does_not_depend_on_the_batch_it_is_in():
    latents, schedule = torch.zeros(3, 4, 8, 8), stable_diffusion_schedule()
    whole = dl.draw_batch(settings(noise_offset=0.1), schedule, latents, generators(3, step=7))
    for i in range(3):
        alone = dl.draw_batch(settings(noise_offset=0.1), schedule, latents[:1], [generators(3, step=7)[i]])
        assert all(torch.equal(a[i], b[0]) for a, b in zip(whole, alone))
    other = dl.draw_batch(settings(noise_offset=0.1), schedule, latents, generators(3, step=8))
    assert not torch.equal(whole[0], other[0])


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="'sample' is not supported: epsilon or v_prediction"):
        dl.NoiseSchedule(torch.ones(3), "sample")
