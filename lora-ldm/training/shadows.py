"""Shadow adapters of a diffusion model: more LoRA networks in its layers; see es_lora/shadows.py.

Every micro-batch goes through the model a second time, its rows repeated for the shadows that train
on them, each row through its own shadow's layers: one pass for all shadows. The noise and the
timesteps of a picture are those that the main network has just trained on."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any, Optional

import torch

from base.random_state import untouched_random_state
from es_lora.shadows import ShadowTraining, auto_interval, make_folds, seed_of
from images.batches import ImageBatches
from images.folders import picture_name
from network.lora import ADAPTER, LoraNetwork, create_network_beside
from training.objective import TIMESTEPS, Noised, Objective


class ShadowNetworks:
    """The shadows of a run, made after its network and caches, put into the network's layers.

    args.stop says how many, and of which rank. A fold is a set of pictures: all repeats, sizes and
    flips of a picture are in the same fold, regularisation pictures are in none. With
    --network_weights every shadow adds to a frozen copy of the LoRA that the main network starts
    from.
    measured_per_epoch: how often CS is measured, for --shadow_interval auto.
    Raises ValueError where there are too few pictures."""

    def __init__(self, objective: Objective, network: LoraNetwork, batches: ImageBatches, measured_per_epoch: float):
        self.objective, self.args, args = objective, objective.args, objective.args
        count = args.stop.shadow_count
        self._parts: list[tuple[str, int]] = []  # while a pass runs: (adapter, number of rows) in the rows' order
        images = [image for dataset in batches.datasets for image in dataset.images]
        pictures = [picture_name(image.record.path) for image in images if not image.record.is_reg]
        folds = make_folds(pictures, count, args.seed)
        self.networks = [self._create(network, number) for number in range(count)]
        self.starts = _frozen_starts(network) if args.network_weights else {}
        for module in network.modules:
            module.layer.register_forward_pre_hook(self._base_alone, with_kwargs=True)
            module.layer.register_forward_hook(self._add_shadows)
        self.fold_batches = [_batches_of_fold(batches, folds, number) for number in range(count)]
        processes, rates = objective.processes, (args.learning_rate, args.unet_lr, args.text_encoder_lr)
        self.training = ShadowTraining(
            folds,
            [beside.parameter_groups(*rates) for beside in self.networks],
            max_norm=args.max_grad_norm,
            interval=self._interval(batches, measured_per_epoch),
            seed=f"{args.seed}/{processes.rank}",
            average=args.stop.average_width,
            sum_over_processes=processes.accelerator.reduce if processes.count > 1 else None,
        )

    def _create(self, network, number):
        with untouched_random_state():
            torch.manual_seed(seed_of(self.args.seed, "shadow", number))
            model, name = self.objective.base.model, _name(number)
            beside = create_network_beside(model, network, name, self.args.stop.shadow_rank)
        weight = network.parameters()[0]
        return beside.to(weight.device, weight.dtype)

    def _interval(self, batches, measured_per_epoch):
        """Measurements from score to score; with auto it follows from the pictures of a fold."""
        if self.args.stop.shadow_interval is not None:
            return self.args.stop.shadow_interval
        pictures, fold = (sum(len(rows) for _, rows in part.plan(0)) for part in (batches, self.fold_batches[0]))
        return auto_interval(fold * TIMESTEPS, pictures / measured_per_epoch, pictures)

    @contextlib.contextmanager
    def _rows_through(self, rows_of_each):
        """Within it, gradients included, so many rows of a batch go through each shadow in turn."""
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
        inputs, start = args[0], self.starts.get(layer)
        if start is not None:
            output = output + start(inputs).to(output.dtype)
        # A long caption is several rows of the text encoder.
        repeats = len(inputs) // sum(count for _, count in self._parts)
        updates = []
        for (name, _), part in zip(self._parts, inputs.split([count * repeats for _, count in self._parts])):
            down, up = layer.lora_A[name], layer.lora_B[name]
            updates.append(up(down(part.to(down.weight.dtype))) * layer.scaling[name])
        return output + torch.cat(updates).to(output.dtype)

    def backward(self, batch: dict, noised: Noised) -> None:
        """Add each shadow's gradients of a micro-batch, noised as for the main network."""
        rows = self.training.trained_rows([picture_name(key) for key in batch["image_keys"]])
        every = [row for own in rows for row in own]
        if not every or not self.training.trains_now():
            return
        counts = [len(own) for own in rows]
        with self.training.apart(), self._rows_through(counts):
            losses = self.objective.picture_losses(chosen(batch, every), Noised(*chosen(noised, every)))  # (rows,)
            self.training.backward(losses.sum(), counts)

    def step(self, main_optimizer: torch.optim.Optimizer) -> None:
        """The optimizer step of every shadow, at the main optimizer's present learning rates."""
        self.training.step(main_optimizer)
        if self.args.scale_weight_norms:
            for network in self.networks:
                network.scale_weight_norms(self.args.scale_weight_norms)
        self.training.average()

    def score(self) -> Optional[float]:
        """The mean loss on the folds, of the shadows' averages where they have some; None if not
        due."""
        if not self.training.score_is_due():
            return None
        with self.training.weights_to_score():
            losses = self.fold_losses()
        return sum(losses) / len(losses)

    def fold_losses(self) -> list[float]:
        """Each shadow's loss on its own fold, its weights as they are."""
        with self.training.apart():
            return [self._fold_loss(number) for number in range(len(self.networks))]

    def _fold_loss(self, number):
        self.networks[number].eval()
        losses = []
        for batch in self.fold_batches[number]:
            rows_of_each = [0] * number + [len(batch["image_keys"])]
            with self._rows_through(rows_of_each):
                losses += self.objective.fixed_losses([batch], 1)
        self.networks[number].train()
        return sum(losses) / len(losses)


def _frozen_starts(network: LoraNetwork) -> dict[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """{layer: its update as the network has it now}, of copies that training does not change."""

    def frozen(layer):
        down, up = (copy.deepcopy(side[ADAPTER]).requires_grad_(False) for side in (layer.lora_A, layer.lora_B))
        scaling = layer.scaling[ADAPTER]
        return lambda inputs: up(down(inputs.to(down.weight.dtype))) * scaling

    return {module.layer: frozen(module.layer) for module in network.modules}


def _name(number):
    return f"shadow_{number}"


def _batches_of_fold(batches, folds, number):
    return batches.held_out(lambda image: folds.get(picture_name(image.record.path)) == number)


def chosen(value: Any, rows: list[int]) -> Any:
    """The rows of a batch, or of any dict, tuple or list of tensors and lists over its rows."""
    if isinstance(value, dict):
        return {key: chosen(item, rows) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(chosen(item, rows) for item in value)
    if isinstance(value, list):
        return [value[row] for row in rows]
    return None if value is None else value[rows]
