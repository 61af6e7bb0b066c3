"""The loss over held-out pictures, with the same noise and the same timesteps every time."""

import torch

from images.folders import picture_name
from training.loss import add_noise, draw_noise, sample_generator, sample_losses, target
from training.schedule_free import averaged_weights

TIMESTEPS = 4  # evenly spaced between --min_timestep and --max_timestep


@torch.no_grad()
def validation_loss(trainer, batches=None):
    """Mean over batches, by default the validation ones (at most --max_validation_steps of them), and TIMESTEPS timesteps.

    Draws nothing from the random state of training, and switches the network's dropouts off meanwhile.
    """
    batches = trainer.validation_batches if batches is None else batches
    trainer.network.eval()
    with averaged_weights(trainer.raw_optimizer):
        losses = fixed_losses(trainer, batches, min(len(batches), trainer.args.max_validation_steps or len(batches)))
    trainer.network.train()
    return sum(losses) / len(losses)


@torch.no_grad()
def fixed_losses(trainer, batches, count):
    """The losses of the pictures of the first `count` batches at TIMESTEPS timesteps, a flat list."""
    low, high = trainer.args.min_timestep or 0, trainer.args.max_timestep or len(trainer.schedule)
    timesteps = torch.linspace(low, high, TIMESTEPS + 2)[1:-1].long().tolist()
    return [loss for index in range(count) for loss in _picture_losses(trainer, batches[index], timesteps)]


def _picture_losses(trainer, batch, timesteps):
    """The loss of each picture of a batch at each of the timesteps, a flat list."""
    args, schedule, device = trainer.args, trainer.schedule, trainer.accelerator.device
    seed = trainer.seed if args.validation_seed is None else args.validation_seed
    generators = [sample_generator(seed, "validation", picture_name(key), 0) for key in batch["image_keys"]]
    latents = trainer.latents_of(batch, generators)  # (B, 4, h, w)
    noise = torch.stack([draw_noise(args, *pair) for pair in zip(latents, generators)]).to(latents)
    weights = batch["loss_weights"].to(device)
    with trainer.accelerator.autocast():
        states = trainer.encode_text(batch["captions"])
    losses = []
    for timestep in timesteps:
        times = torch.full((len(latents),), timestep, device=device)  # (B,)
        noisy = add_noise(schedule, latents, noise, times)
        with trainer.accelerator.autocast():
            prediction = trainer.predict_noise(noisy, times, states, batch)
        wanted = target(schedule, latents, noise, times)
        losses += sample_losses(args, schedule, prediction, wanted, times, weights).tolist()
    return losses
