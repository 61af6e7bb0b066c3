"""A run's objective: pictures to latents, noise, the model's prediction, each picture's loss."""

from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch

from base.families import StableDiffusion
from images.batches import ImageBatches
from images.folders import picture_name
from training.loss import (
    NoiseSchedule,
    add_noise,
    draw_batch,
    draw_noise,
    rescale_to_zero_terminal_snr,
    sample_generator,
    sample_losses,
    target,
)
from training.optimizers import Optimization
from training.processes import Processes

TIMESTEPS = 4  # of the held-out loss, evenly spaced between --min_timestep and --max_timestep


class Noised(NamedTuple):
    """A micro-batch as it is trained on: (B, 4, h, w) each, and timesteps (B,)."""

    latents: torch.Tensor
    noise: torch.Tensor
    noisy: torch.Tensor
    timesteps: torch.Tensor


class Objective:
    """The loss of pictures on a base. args: settings of noise and loss; args.seed draws all.
    trains_text: gradients flow into the text encoders."""

    def __init__(self, args: Namespace, base: StableDiffusion, processes: Processes, trains_text: bool):
        self.args, self.base, self.processes, self.trains_text = args, base, processes, trains_text
        alphas = base.model.alphas_cumprod
        alphas = rescale_to_zero_terminal_snr(alphas) if args.zero_terminal_snr else alphas
        self.schedule = NoiseSchedule(alphas, base.model.prediction_type)

    def encode_text(self, captions: list[str]) -> Any:
        """What the base takes of B captions; with gradients where the text encoder is trained."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_text):
            return self.base.encode_text(captions)

    def latents_of(self, batch: dict, generators: list[torch.Generator]) -> torch.Tensor:
        """Scaled latents (B, 4, h, w) on the device: cached ones, or encoded now."""
        if batch["latents"] is not None:
            return batch["latents"].to(self.processes.device)
        return self.base.encode_images(batch["images"], generators[0]).to(self.processes.device)

    def noised(self, batch: dict, step: int, seen: Counter) -> Noised:
        """A micro-batch with its noise. seen: how often each picture came in this step, so far.
        Each picture has a random stream: of seed, step, picture, its count, and process."""
        generators = []
        for key in map(picture_name, batch["image_keys"]):
            generators.append(sample_generator(self.args.seed, step, key, (seen[key], self.processes.rank)))
            seen[key] += 1
        latents = self.latents_of(batch, generators)
        noise, input_noise, timesteps = draw_batch(self.args, self.schedule, latents, generators)
        return Noised(latents, noise, add_noise(self.schedule, latents, input_noise, timesteps), timesteps)

    def picture_losses(self, batch: dict, noised: Noised) -> torch.Tensor:
        """The weighted loss of each picture of a micro-batch, (B,) with gradients."""
        latents, noise, noisy, timesteps = noised
        device = self.processes.device
        with self.processes.accelerator.autocast():
            text = self.encode_text(batch["captions"])
            prediction = self.base.predict_noise(noisy, timesteps, text, batch)
        wanted = target(self.schedule, latents, noise, timesteps)
        masks = None if batch["alpha_masks"] is None else batch["alpha_masks"].to(device)
        weights = batch["loss_weights"].to(device)
        return sample_losses(self.args, self.schedule, prediction, wanted, timesteps, weights, masks)

    @torch.no_grad()
    def fixed_losses(self, batches: ImageBatches, count: int) -> list[float]:
        """The picture losses of the first `count` batches at TIMESTEPS timesteps, same noise."""
        low, high = self.args.min_timestep or 0, self.args.max_timestep or len(self.schedule)
        timesteps = torch.linspace(low, high, TIMESTEPS + 2)[1:-1].long().tolist()
        return [loss for index in range(count) for loss in self._fixed_losses(batches[index], timesteps)]

    def _fixed_losses(self, batch, timesteps):
        args, schedule, device = self.args, self.schedule, self.processes.device
        seed = args.seed if args.validation_seed is None else args.validation_seed
        generators = [sample_generator(seed, "validation", picture_name(key), 0) for key in batch["image_keys"]]
        latents = self.latents_of(batch, generators)  # (B, 4, h, w)
        noise = torch.stack([draw_noise(args, *pair) for pair in zip(latents, generators)]).to(latents)
        weights = batch["loss_weights"].to(device)
        with self.processes.accelerator.autocast():
            text = self.encode_text(batch["captions"])
        losses = []
        for timestep in timesteps:
            times = torch.full((len(latents),), timestep, device=device)  # (B,)
            noisy = add_noise(schedule, latents, noise, times)
            with self.processes.accelerator.autocast():
                prediction = self.base.predict_noise(noisy, times, text, batch)
            wanted = target(schedule, latents, noise, times)
            losses += sample_losses(args, schedule, prediction, wanted, times, weights).tolist()
        return losses


@dataclass(frozen=True)
class HeldOut:
    """Pictures that are not trained on. most_batches: how many are scored, None: all."""

    objective: Objective
    network: Any
    optimization: Optimization
    batches: ImageBatches
    most_batches: Optional[int] = None

    def loss(self) -> float:
        """The mean loss with the same noise and timesteps every time. Draws nothing from the random
        state of training, and switches the network's dropouts off meanwhile."""
        count = min(len(self.batches), self.most_batches or len(self.batches))
        self.network.eval()
        with self.optimization.weights_to_use():
            losses = self.objective.fixed_losses(self.batches, count)
        self.network.train()
        return sum(losses) / len(losses)
