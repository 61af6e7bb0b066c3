"""Training loops of the autoencoder and of the denoiser with text encoder. Both end by the clock.

The learning rate follows the share of the time that is used, so a run of any length ends annealed.
"""

import copy
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from augmentation import on_white, placed_on_white, strongly_varied
from tiny_models import LATENT_SCALE
from tqdm import tqdm


class Clock:
    """Share of a time budget that is used, and the learning rate that belongs to it."""

    def __init__(self, max_minutes: float, peak_rate: float, warmup: float = 0.03):
        self.seconds, self.peak_rate, self.warmup = max_minutes * 60, peak_rate, warmup
        self.restart()

    def restart(self) -> None:
        """Count the budget from now."""
        self.start = time.monotonic()

    def share(self) -> float:
        """Elapsed share of the budget, 0 to 1."""
        return min(1.0, (time.monotonic() - self.start) / self.seconds)

    def rate(self) -> float:
        """Linear warm-up, then half a cosine down to 2% of the peak."""
        share = self.share()
        if share < self.warmup:
            return self.peak_rate * max(share / self.warmup, 0.01)
        done = (share - self.warmup) / (1 - self.warmup)
        return self.peak_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


class MovingAverage:
    """Exponential moving average of the weights of several modules."""

    def __init__(self, modules: Iterable[torch.nn.Module], decay: float):
        self.modules, self.live = modules, [p for module in modules for p in module.parameters()]
        self.shadow = [p.detach().clone() for p in self.live]
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the live weights; the average is short while training is young."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the live weights; a second call undoes it."""
        for shadow, live in zip(self.shadow, self.live):
            kept = live.detach().clone()
            live.copy_(shadow)
            shadow.copy_(kept)


def _autocast(device):
    """bfloat16 on a GPU only: processors without its units are tens of times slower with it."""
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.device(device).type == "cuda")


def _optimizer(parameters, clock, weight_decay):
    on_gpu = parameters[0].is_cuda
    return torch.optim.AdamW(parameters, lr=clock.peak_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=on_gpu)


def _apply(optimizer, loss, parameters, clock, average):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = clock.rate()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    average.update()


# --- autoencoder ----------------------------------------------------------------------------------

_TO_CHROMA = ((-0.1687, -0.3313, 0.5), (0.5, -0.4187, -0.0813))  # BT.601 Cb and Cr


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error, edges, and chroma.

    Without the chroma term a small autoencoder settles on the mean hue before it learns colour.

    output, target: (B, 3, H, W) in [-1, 1]."""
    error = output - target
    to_chroma = torch.tensor(_TO_CHROMA, dtype=error.dtype, device=error.device)
    chroma = torch.einsum("kc,bchw->bkhw", to_chroma, error).abs().mean()
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + error.square().mean() + chroma + 0.5 * edges


def train_vae(
    vae: torch.nn.Module,
    pictures: torch.Tensor,
    *,
    batch_size: int,
    max_minutes: float,
    max_steps: int | None = None,
    peak_rate: float = 1e-3,
    kl_weight: float = 5e-5,
    compiled: bool = False,
) -> dict:
    """Train the autoencoder in place; it ends with the averaged weights and unit-scaled latents.

    pictures: uint8 (N, 64, 64, 4) RGBA on the device of `vae`.
    Returns dict with steps, seconds and the last smoothed loss."""
    device = pictures.device
    encoder, decoder = vae.encoder, vae.decoder
    if compiled:
        encoder, decoder = torch.compile(vae.encoder), torch.compile(vae.decoder)
    parameters = list(vae.parameters())
    clock = Clock(max_minutes, peak_rate)
    average = MovingAverage([vae], 0.998)
    optimizer = _optimizer(parameters, clock, 1e-3)
    smoothed, step, started = None, 0, time.monotonic()
    progress = tqdm(total=max_steps, desc="autoencoder", mininterval=5)
    while clock.share() < 1 and (max_steps is None or step < max_steps):
        chosen = torch.randint(len(pictures), (batch_size,), device=device)
        target = strongly_varied(pictures[chosen])  # (B, 3, 64, 64)
        with _autocast(device):
            mean, log_variance = vae.quant_conv(encoder(target)).float().chunk(2, 1)  # (B, 4, 8, 8) each
            log_variance = log_variance.clamp(-30, 20)
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            output = decoder(vae.post_quant_conv(latents)).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = reconstruction_loss(output, target) + kl_weight * kl
        _apply(optimizer, loss, parameters, clock, average)
        step += 1
        if step == 1:
            clock.restart()  # the first step compiles and warms up
        if step % 20 == 0:
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(f"the autoencoder's loss is {value} at step {step}; use a lower rate than {peak_rate}")
            smoothed = value if smoothed is None else 0.9 * smoothed + 0.1 * value
            progress.set_postfix(loss=f"{smoothed:.4f}")
        progress.update()
    progress.close()
    average.swap()
    normalise_latents(vae, pictures)
    return {"steps": step, "seconds": round(time.monotonic() - started, 1), "loss": smoothed, "batch_size": batch_size}


@torch.no_grad()
def normalise_latents(vae: torch.nn.Module, pictures: torch.Tensor, sample: int = 1024) -> None:
    """Fold mean and spread of the latents into the two 1x1 convolutions around them.
    Afterwards latents * 0.18215 have mean 0 and standard deviation 1 in every channel."""
    chosen = torch.randperm(len(pictures), device=pictures.device)[:sample]
    means = torch.cat([vae.encode(on_white(pictures[part])).latent_dist.mean for part in chosen.split(128)])
    mean = means.mean((0, 2, 3))  # (4,)
    scale = means.std((0, 2, 3)) * LATENT_SCALE  # old units in one new unit
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += torch.einsum("oikl,i->o", post.weight, mean)
    post.weight *= scale.view(1, -1, 1, 1)
    quant.bias[:4] = (quant.bias[:4] - mean) / scale
    quant.weight[:4] /= scale.view(-1, 1, 1, 1)
    quant.bias[4:] -= 2 * torch.log(scale)


@torch.no_grad()
def encode_variations(
    vae: torch.nn.Module, pictures: torch.Tensor, can_flip: torch.Tensor, variations: int
) -> torch.Tensor:
    """Latents of several slightly moved copies: float16 (variations, N, 4, 8, 8), unit spread."""
    sets = []
    for _ in tqdm(range(variations), desc="latents", mininterval=5):
        parts = []
        for part in torch.arange(len(pictures), device=pictures.device).split(512):
            with _autocast(pictures.device):
                posterior = vae.encode(placed_on_white(pictures[part], can_flip[part])).latent_dist
            parts.append((posterior.sample().float() * LATENT_SCALE).half())
        sets.append(torch.cat(parts))
    return torch.stack(sets)


# --- denoiser -------------------------------------------------------------------------------------


def denoising_loss(
    unet: torch.nn.Module,
    text_encoder: torch.nn.Module,
    scheduler: Any,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    weighted: bool = False,
) -> torch.Tensor:
    """Mean squared error of the predicted noise, one value a picture (B,).

    latents, noise: (B, 4, 8, 8); tokens: int64 (B, 77); timesteps: int64 (B,).
    weighted: weigh by min(SNR, 5) / SNR, as in min-SNR training, instead of equally."""
    states = text_encoder(tokens)[0]  # (B, 77, 128)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    error = (unet(noisy, timesteps, states).sample.float() - noise).square().mean((1, 2, 3))  # (B,)
    if weighted:
        alphas = scheduler.alphas_cumprod.to(error.device)[timesteps]
        snr = alphas / (1 - alphas)
        error = error * snr.clamp(max=5) / snr
    return error


def drawn_examples(
    latents: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents (B, 4, 8, 8), token ids (B, 77)): by weight, each a random variation, caption."""
    chosen = torch.multinomial(weights, batch_size, replacement=True)
    variation = torch.randint(len(latents), chosen.shape, device=latents.device)
    caption = torch.randint(tokens.shape[1], chosen.shape, device=latents.device)
    return latents[variation, chosen].float(), tokens[chosen, caption].long()


def scored_average(
    average: MovingAverage, validation: Callable[[], float], curve: list, step: int, best: tuple | None
) -> tuple | None:
    """Append (step, validation loss of the averages) to the curve; -> their states, or best."""
    average.swap()
    curve.append((step, round(validation(), 5)))
    if curve[-1][1] == min(loss for _, loss in curve):
        best = tuple(copy.deepcopy(module.state_dict()) for module in average.modules)
    average.swap()
    return best


def train_unet(
    unet: torch.nn.Module,
    text_encoder: torch.nn.Module,
    scheduler: Any,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    weights: torch.Tensor,
    empty_tokens: torch.Tensor,
    validation: Callable[[], float],
    *,
    batch_size: int,
    max_minutes: float,
    max_steps: int | None = None,
    peak_rate: float = 1e-3,
    text_dropout: float = 0.1,
    validations: int = 24,
) -> tuple[dict, dict]:
    """Train U-Net and text encoder together in place.

    latents: float16 (variations, N, 4, 8, 8). tokens: int16 (N, captions, 77). weights: (N,), how
    often each is drawn. empty_tokens: int64 (77,). validation: gives the loss on held-out pictures.
    Returns the figures (steps, seconds, losses, curve of the validation loss) and the averaged
    states (U-Net, text encoder) at its lowest point. The modules end with the last average."""
    device = latents.device
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    clock = Clock(max_minutes, peak_rate)
    average = MovingAverage([unet, text_encoder], 0.999)
    optimizer = _optimizer(parameters, clock, 0.03)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    curve, best, smoothed, step, started = [], None, None, 0, time.monotonic()
    progress = tqdm(total=max_steps, desc="denoiser", mininterval=5)
    while clock.share() < 1 and (max_steps is None or step < max_steps):
        clean, ids = drawn_examples(latents, tokens, weights, batch_size)
        dropped = torch.rand(batch_size, 1, device=device) < text_dropout
        ids = torch.where(dropped, empty_tokens, ids)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), device=device)
        with _autocast(device):
            loss = denoising_loss(unet, text_encoder, scheduler, clean, ids, noise, timesteps, weighted=True).mean()
        _apply(optimizer, loss, parameters, clock, average)
        step += 1
        if step == 1:
            clock.restart()  # the first step compiles and warms up
        if step % 20 == 0:
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(f"the denoiser's loss is {value} at step {step}; use a lower rate than {peak_rate}")
            smoothed = value if smoothed is None else 0.95 * smoothed + 0.05 * value
            progress.set_postfix(loss=f"{smoothed:.4f}")
            if clock.share() * validations > len(curve) + 1:
                best = scored_average(average, validation, curve, step, best)
        progress.update()
    progress.close()
    best = scored_average(average, validation, curve, step, best)
    average.swap()
    figures = {"steps": step, "seconds": round(time.monotonic() - started, 1), "batch_size": batch_size}
    figures.update(loss=smoothed, validation_curve=curve)
    return figures, best


@torch.no_grad()
def caption_losses(
    unet: torch.nn.Module,
    text_encoder: torch.nn.Module,
    scheduler: Any,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    other_tokens: torch.Tensor,
    draws: int = 4,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Denoising loss with the right captions and with others' captions, on the same noise.

    latents: (N, 4, 8, 8) scaled; tokens, other_tokens: int64 (N, 77).
    Returns (right, other): tensors (N,), means over `draws` noises at evenly spread timesteps."""
    generator = torch.Generator().manual_seed(seed)
    count, device = len(latents), latents.device
    sums = torch.zeros(2, count, device=device)
    for _ in range(draws):
        noise = torch.randn(latents.shape, generator=generator).to(device)
        timesteps = torch.randperm(count, generator=generator) * scheduler.config.num_train_timesteps // count
        for index, ids in enumerate((tokens, other_tokens)):
            sums[index] += (
                denoising_loss(unet, text_encoder, scheduler, latents.float(), ids, noise, timesteps.to(device)) / draws
            )
    return sums[0], sums[1]


@torch.no_grad()
def psnr_db(vae: torch.nn.Module, pictures_rgb: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of the autoencoder in dB, from each picture's mean squared error.
    pictures_rgb: float (N, 3, 64, 64) in [-1, 1]."""
    ratios = []
    for part in pictures_rgb.split(64):
        output = vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
        mse = ((output.float() - part) / 2).square().mean((1, 2, 3))
        ratios.append(-10 * torch.log10(mse))
    return float(torch.cat(ratios).mean())


def shuffled_positions(concepts: Sequence, seed: int = 0, groups: Sequence | None = None) -> torch.Tensor:
    """A seeded permutation that gives every picture the caption of another concept.

    concepts: list of hashables, one a picture.
    groups: optional list; captions then stay within their group (the style, for example).
    Returns int64 tensor (N,)."""
    rng = random.Random(seed)
    positions = list(range(len(concepts)))
    for group in sorted(set(groups or [None])):
        members = [i for i in positions if groups is None or groups[i] == group]
        for _ in range(10_000):
            order = rng.sample(members, len(members))
            if all(concepts[i] != concepts[j] for i, j in zip(members, order)):
                break
        else:
            raise ValueError(f"no permutation found that changes every concept among {len(members)} pictures")
        for member, taken in zip(members, order):
            positions[member] = taken
    return torch.tensor(positions)
