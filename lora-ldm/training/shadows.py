"""Shadow adapters of a diffusion model: further LoRA networks in the layers of the main one; see es_lora/shadows.py.

Every micro-batch goes through the model a second time, its rows repeated for the shadows that train on them, each row
through its own shadow's layers: one pass for all shadows. The noise and the timesteps of a picture are those that the
main network has just trained on.
"""

import contextlib

import torch

from es_lora.shadows import ShadowTraining, auto_interval, make_folds, seed_of
from images.folders import picture_name
from network.lora import create_network_beside
from training.previews import untouched_random_state
from training.validation import TIMESTEPS, fixed_losses


class ShadowNetworks:
    """The shadows of a run, made after the trainer's network and caches.

    trainer: a NetworkTrainer; args.shadows networks of rank args.shadow_rank are put into its model. A fold is a set of
    pictures: all repeats, sizes and flips of a picture are in the same fold, regularisation pictures are in none.
    Raises ValueError where there are too few pictures.
    """

    def __init__(self, trainer):
        self.trainer, args = trainer, trainer.args
        self._parts = []  # while a pass of the shadows runs: (adapter, number of rows) in the rows' order
        images = [image for dataset in trainer.batches.datasets for image in dataset.images]
        pictures = [picture_name(image.record.path) for image in images if not image.record.is_reg]
        folds = make_folds(pictures, args.shadows, trainer.seed)
        self.networks = [self._create(number) for number in range(args.shadows)]
        for module in trainer.network.modules:
            module.layer.register_forward_pre_hook(self._base_alone, with_kwargs=True)
            module.layer.register_forward_hook(self._add_shadows)
        accelerator = trainer.accelerator
        rates = args.learning_rate, args.unet_lr, args.text_encoder_lr
        self.training = ShadowTraining(
            folds,
            [network.parameter_groups(*rates) for network in self.networks],
            max_norm=args.max_grad_norm,
            interval=None if args.shadow_interval == "auto" else args.shadow_interval,
            seed=f"{trainer.seed}/{accelerator.process_index}",
            sum_over_processes=accelerator.reduce if accelerator.num_processes > 1 else None,
        )
        self.fold_batches = [self._batches_of_fold(folds, number) for number in range(args.shadows)]

    def _create(self, number):
        trainer = self.trainer
        with untouched_random_state():
            torch.manual_seed(seed_of(trainer.seed, "shadow", number))
            network = create_network_beside(trainer.model, trainer.network, _name(number), trainer.args.shadow_rank)
        weight = trainer.network.parameters()[0]
        return network.to(weight.device, weight.dtype)

    def _batches_of_fold(self, folds, number):
        return self.trainer.batches.held_out(lambda image: folds.get(picture_name(image.record.path)) == number)

    @contextlib.contextmanager
    def _rows_through(self, rows_of_each):
        """Within it, gradients included, so many rows of every batch go through each shadow in turn, and none elsewhere."""
        self._parts = [(_name(number), count) for number, count in enumerate(rows_of_each) if count]
        try:
            yield
        finally:
            self._parts = []

    def _base_alone(self, _layer, args, kwargs):
        return (args, {**kwargs, "adapter_names": ["__base__"] * len(args[0])}) if self._parts else None

    def _add_shadows(self, layer, args, output):
        if not self._parts:
            return None
        inputs = args[0]
        repeats = len(inputs) // sum(count for _, count in self._parts)  # a long caption is several rows of the text encoder
        updates = []
        for (name, _), part in zip(self._parts, inputs.split([count * repeats for _, count in self._parts])):
            down, up = layer.lora_A[name], layer.lora_B[name]
            updates.append(up(down(part.to(down.weight.dtype))) * layer.scaling[name])
        return output + torch.cat(updates).to(output.dtype)

    def measured_every(self, steps):
        """Say how many optimizer steps lie between two measurements; --shadow_interval auto follows from it."""
        if self.training.interval is None:
            batches, trainer = self.trainer.batches, self.trainer
            pictures = sum(len(indices) for _, indices in batches.plan(0))
            between = pictures / trainer.progress.steps_per_epoch * steps
            fold = sum(len(indices) for _, indices in self.fold_batches[0].plan(0))
            self.training.interval = auto_interval(fold * TIMESTEPS, between, pictures)

    def backward(self, batch, noised):
        """Add each shadow's gradients of a micro-batch. noised: the trainer's, as the main network was trained on it."""
        rows = self.training.trained_rows([picture_name(key) for key in batch["image_keys"]])
        every = [row for own in rows for row in own]
        if not every:
            return
        counts = [len(own) for own in rows]
        with self.training.apart(), self._rows_through(counts):
            losses = self.trainer.picture_losses(chosen(batch, every), *chosen(noised, every))  # (rows,)
            self.training.backward(losses.sum(), counts)

    def step(self):
        """The optimizer step of every shadow, at the main optimizer's present learning rates."""
        self.training.step(self.trainer.raw_optimizer)
        if self.trainer.args.scale_weight_norms:
            for network in self.networks:
                network.scale_weight_norms(self.trainer.args.scale_weight_norms)

    def score(self):
        """The column shadow_loss: the mean over the shadows of the loss on their folds; None where it is not due."""
        if not self.training.score_is_due():
            return None
        with self.training.apart():
            means = [self._fold_loss(number) for number in range(len(self.networks))]
        return sum(means) / len(means)

    def _fold_loss(self, number):
        self.networks[number].eval()
        losses = []
        for batch in self.fold_batches[number]:
            rows_of_each = [0] * number + [len(batch["image_keys"])]
            with self._rows_through(rows_of_each):
                losses += fixed_losses(self.trainer, [batch], 1)
        self.networks[number].train()
        return sum(losses) / len(losses)


def _name(number):
    return f"shadow_{number}"


def chosen(value, rows):
    """The rows of a batch, or of any dict, tuple or list of tensors and lists over its rows; None stays None."""
    if isinstance(value, dict):
        return {key: chosen(item, rows) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(chosen(item, rows) for item in value)
    if isinstance(value, list):
        return [value[row] for row in rows]
    return None if value is None else value[rows]
