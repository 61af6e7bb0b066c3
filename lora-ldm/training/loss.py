"""The training objective: noise, noisy latents, targets, and the weighting of the loss.

Everything is a pure function of tensors, a generator and a NoiseSchedule. Names and defaults of the
settings are those of sd-scripts; formulas: Ho et al. 2020 (epsilon), Salimans & Ho 2022 (v), Hang
et al. 2023 (min-SNR), Lin et al. 2024 (zero terminal SNR), Ning et al. 2023 (input perturbation),
the published notes on noise offset and pyramid noise."""

import hashlib
import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

SNR_CEILING = 1000.0  # the first timesteps have almost no noise: their ratio would dominate every weight


@dataclass
class NoiseSchedule:
    """alphas_cumprod (T,) float32 on the CPU, and the prediction: "epsilon" or "v_prediction"."""

    alphas_cumprod: torch.Tensor
    prediction_type: str = "epsilon"

    def __post_init__(self):
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type '{self.prediction_type}' is not supported: epsilon or v_prediction")

    def __len__(self):
        return len(self.alphas_cumprod)

    def alpha_sigma(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Square roots of signal's and noise's share, (B, 1, 1, 1), dtype and place of `like`."""
        share = self.alphas_cumprod[timesteps.cpu()].view(-1, 1, 1, 1)
        return share.sqrt().to(like), (1 - share).sqrt().to(like)

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio (B,), at most SNR_CEILING."""
        share = self.alphas_cumprod[timesteps.cpu()]
        return (share / (1 - share)).clamp(max=SNR_CEILING).to(timesteps.device)


def rescale_to_zero_terminal_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """alphas_cumprod (T,), the last 0, the first unchanged (Lin et al. 2024, algorithm 1)."""
    root = alphas_cumprod.double().sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)).square().to(alphas_cumprod.dtype)


def sample_generator(seed: int, step: int | str, key: str, occurrence: Any) -> torch.Generator:
    """The random stream of one picture in one step, on the CPU.

    A stream of its own for each picture makes the noise independent of how a step is divided into
    micro-batches and processes; a resumed run draws what the uninterrupted one would have drawn."""
    digest = hashlib.sha256(f"{seed}/{step}/{key}/{occurrence}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw_timestep(settings: Namespace, schedule: NoiseSchedule, generator: torch.Generator) -> torch.Tensor:
    """A timestep as (1,) int64, uniform in [min_timestep, max_timestep)."""
    low = settings.min_timestep or 0
    high = len(schedule) if settings.max_timestep is None else min(settings.max_timestep, len(schedule))
    return torch.randint(low, high, (1,), generator=generator)


def draw_noise(settings: Namespace, latent: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise for one latent (C, h, w): white, then offset and multi-resolution noise if asked."""
    noise = torch.randn(latent.shape, generator=generator)  # (C, h, w)
    if settings.noise_offset:
        strength = _offset_strength(settings, latent, generator)
        noise = noise + strength * torch.randn((len(latent), 1, 1), generator=generator)
    if settings.multires_noise_iterations:
        noise = _multires(noise, settings.multires_noise_iterations, settings.multires_noise_discount, generator)
    return noise


def _offset_strength(settings, latent, generator):
    strength = settings.noise_offset
    if settings.noise_offset_random_strength:
        strength = strength * torch.rand(1, generator=generator).item()
    if settings.adaptive_noise_scale:
        mean = latent.float().cpu().mean(dim=(1, 2), keepdim=True).abs()  # (C, 1, 1)
        strength = (strength + settings.adaptive_noise_scale * mean).clamp(min=0)
    return strength


def _multires(noise, iterations, discount, generator):
    """Add noise of ever coarser grids, each `discount` times the last; back to unit deviation."""
    channels, height, width = noise.shape
    for level in range(iterations):
        coarser = (torch.rand(1, generator=generator).item() * 2 + 2) ** level
        size = max(1, int(height / coarser)), max(1, int(width / coarser))
        grid = torch.randn((1, channels, *size), generator=generator)
        noise = noise + functional.interpolate(grid, size=(height, width), mode="bilinear")[0] * discount**level
        if 1 in size:
            break
    return noise / noise.std()


def draw_input_noise(settings: Namespace, noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The noise the model sees (C, h, w), by ip_noise_gamma; not the target (Ning et al. 2023)."""
    if not settings.ip_noise_gamma:
        return noise
    strength = settings.ip_noise_gamma
    if settings.ip_noise_gamma_random_strength:
        strength = strength * torch.rand(1, generator=generator).item()
    return noise + strength * torch.randn(noise.shape, generator=generator)


def draw_batch(
    settings: Namespace, schedule: NoiseSchedule, latents: torch.Tensor, generators: list[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise, input noise (as latents) and timesteps (B,) for a batch, a generator a picture."""
    noise, input_noise, timesteps = [], [], []
    for latent, generator in zip(latents, generators):
        noise.append(draw_noise(settings, latent, generator))
        input_noise.append(draw_input_noise(settings, noise[-1], generator))
        timesteps.append(draw_timestep(settings, schedule, generator))
    device = latents.device
    noise, input_noise = torch.stack(noise).to(latents), torch.stack(input_noise).to(latents)  # (B, C, h, w)
    return noise, input_noise, torch.cat(timesteps).to(device)


def add_noise(
    schedule: NoiseSchedule, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """alpha * latents + sigma * noise, (B, C, h, w)."""
    alpha, sigma = schedule.alpha_sigma(timesteps, latents)
    return alpha * latents + sigma * noise


def target(
    schedule: NoiseSchedule, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the model should predict: the noise, or v = alpha * noise - sigma * latents."""
    if schedule.prediction_type == "epsilon":
        return noise
    alpha, sigma = schedule.alpha_sigma(timesteps, latents)
    return alpha * noise - sigma * latents


def huber_threshold(settings: Namespace, schedule: NoiseSchedule, timesteps: torch.Tensor) -> torch.Tensor:
    """The huber loss's transition from squared to linear, (B,)."""
    if settings.huber_schedule == "constant":
        return torch.full(timesteps.shape, settings.huber_c * settings.huber_scale, device=timesteps.device)
    if settings.huber_schedule == "exponential":
        rate = -math.log(settings.huber_c) / len(schedule)
        return torch.exp(-rate * timesteps) * settings.huber_scale
    share = schedule.alphas_cumprod[timesteps.cpu()].to(timesteps.device)
    noise_to_signal = ((1 - share) / share.clamp(min=1e-12)).sqrt()
    return (1 - settings.huber_c) / (1 + noise_to_signal) ** 2 + settings.huber_c


def elementwise_loss(
    settings: Namespace,
    schedule: NoiseSchedule,
    prediction: torch.Tensor,
    wanted: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """The loss of each element, (B, C, h, w)."""
    difference = prediction - wanted
    if settings.loss_type == "l1":
        return difference.abs()
    if settings.loss_type == "l2":
        return difference.square()
    threshold = huber_threshold(settings, schedule, timesteps).view(-1, 1, 1, 1)
    root = (difference.square() + threshold.square()).sqrt() - threshold
    return 2 * threshold * root if settings.loss_type == "huber" else 2 * root


def snr_weights(settings: Namespace, schedule: NoiseSchedule, timesteps: torch.Tensor) -> torch.Tensor:
    """Product of the timestep weights that are switched on, (B,)."""
    snr = schedule.snr(timesteps)
    predicts_v = schedule.prediction_type == "v_prediction"
    weights = torch.ones_like(snr)
    if settings.min_snr_gamma:
        weights = weights * snr.clamp(max=settings.min_snr_gamma) / (snr + 1 if predicts_v else snr)
    if settings.scale_v_pred_loss_like_noise_pred:
        weights = weights * snr / (snr + 1)
    if settings.v_pred_like_loss:
        weights = weights * (1 + settings.v_pred_like_loss * (snr + 1) / snr)
    if settings.debiased_estimation_loss:
        weights = weights / (snr + 1 if predicts_v else snr.sqrt())
    return weights


def sample_losses(
    settings: Namespace,
    schedule: NoiseSchedule,
    prediction: torch.Tensor,
    wanted: torch.Tensor,
    timesteps: torch.Tensor,
    loss_weights: torch.Tensor,
    masks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted loss of each picture, (B,); the loss of the batch is its mean.
    loss_weights (B,): prior-preservation weights. masks (B, 1, H, W) in [0, 1] or None."""
    loss = elementwise_loss(settings, schedule, prediction.float(), wanted.float(), timesteps)  # (B, C, h, w)
    if masks is not None:
        loss = loss * functional.interpolate(masks.to(loss), size=loss.shape[2:], mode="area")
    return loss.mean(dim=(1, 2, 3)) * loss_weights.to(loss) * snr_weights(settings, schedule, timesteps).to(loss)
