"""Batches of images or cached latents with captions, in an order of nothing but (seed, epoch)."""

from __future__ import annotations

import random
from argparse import Namespace
from collections import defaultdict
from dataclasses import replace
from typing import Callable, Optional

import numpy as np
import torch
from tqdm import tqdm

from images.augmentation import load_sample
from images.buckets import Size
from images.captions import process_caption
from images.latent_cache import CachedLatents, LatentFiles
from images.loading import UnreadableImageError
from images.metadata import dataset_metadata
from images.selection import BucketedDataset, PlacedImage, prepare_datasets, without_chance


def build_datasets(args: Namespace, num_processes: int = 1) -> tuple[ImageBatches, Optional[ImageBatches]]:
    """(training, validation or None) batches of what the command line asks for.

    Every image is decoded once, so that a damaged one stops the run before its first step.

    args: parsed arguments; see `selection.load_datasets` for those of the data.
    num_processes: only for the token warm-up, which counts optimizer steps.
    Raises ValueError: bad settings, no images, damaged images (unless --skip_bad_images); all of a
    kind in one message; FileNotFoundError: a missing folder or file."""
    seed = getattr(args, "seed", None) or 0
    train, held_out = prepare_datasets(args, seed)
    common = {"seed": seed, "prior_loss_weight": getattr(args, "prior_loss_weight", 1.0)}
    common["is_user_config"] = bool(getattr(args, "dataset_config", None))
    batches_per_step = (getattr(args, "gradient_accumulation_steps", 1) or 1) * num_processes
    training = ImageBatches(train, batches_per_step=batches_per_step, **common)
    training.total_steps = total_steps(args, training)
    has_validation = any(dataset.images for dataset in held_out)
    return training, ImageBatches(held_out, training=False, **common) if has_validation else None


def total_steps(args: Namespace, training: ImageBatches) -> Optional[int]:
    epochs = getattr(args, "max_train_epochs", None)
    return epochs * training.steps_per_epoch if epochs else getattr(args, "max_train_steps", None)


class ImageBatches(torch.utils.data.Dataset):
    """One batch an index: order, buckets, augmentation, captions depend on (seed, epoch, index).

    Use as `DataLoader(dataset, batch_size=None, shuffle=False)` and call `set_epoch` before each
    epoch; the epoch lives in shared memory, so workers that persist see it as well.

    A batch is a dict with:
        latents: (B, 4, H/8, W/8) float32, or None without a cache
        images: (B, 3, H, W) float32 in [-1, 1], or None with a cache
        captions: list of B texts as they are trained on
        loss_weights: (B,) float32, `prior_loss_weight` for regularisation images
        alpha_masks: (B, 1, H, W) float32 in [0, 1], or None where no image of the batch has one
        original_sizes_hw, crop_top_lefts, target_sizes_hw: (B, 2) int64, pixels
        image_keys: list of B paths
    """

    def __init__(
        self,
        datasets: list[BucketedDataset],
        *,
        seed: int = 0,
        training: bool = True,
        prior_loss_weight: float = 1.0,
        batches_per_step: int = 1,
        is_user_config: bool = False,
    ):
        self.datasets = datasets
        self.seed = seed
        self.training = training
        self.prior_loss_weight = prior_loss_weight
        self.batches_per_step = batches_per_step
        self.is_user_config = is_user_config
        self.total_steps: Optional[int] = None
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._plan: tuple[int, list] = (-1, [])
        self._in_memory: Optional[dict[tuple[int, int], CachedLatents]] = None
        self._on_disk: Optional[LatentFiles] = None
        self._length = len(self.plan(0))

    def __len__(self) -> int:
        return self._length

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self) // self.batches_per_step)

    @property
    def epoch(self) -> int:
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Counted from 0."""
        self._epoch[0] = epoch

    def plan(self, epoch: int) -> list[tuple[int, list[int]]]:
        """Batches of an epoch: (dataset, its image indices). One batch has one bucket."""
        epoch = epoch if self.training else 0
        if self._plan[0] == epoch:
            return self._plan[1]
        rng = random.Random(f"{self.seed}/{epoch}/order")
        batches = []
        for number, dataset in enumerate(self.datasets):
            size = dataset.settings.batch_size
            for indices in dataset.buckets.values():
                order = list(indices)
                if self.training:
                    rng.shuffle(order)
                batches += [(number, order[start : start + size]) for start in range(0, len(order), size)]
        if self.training:
            rng.shuffle(batches)
        self._plan = (epoch, batches)
        return batches

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        epoch = self.epoch if self.training else 0
        number, members = self.plan(epoch)[index]
        samples = []
        for position, image_index in enumerate(members):
            rng = random.Random(f"{self.seed}/{epoch}/{index}/{position}")
            samples.append(self._sample(number, image_index, rng, epoch, index))
        return collate(samples)

    def _sample(self, number: int, image_index: int, rng: random.Random, epoch: int, batch_index: int) -> dict:
        image = self.datasets[number].images[image_index]
        record, placement = image.record, image.placement
        # The flip is drawn first, so that cached and uncached runs flip the same images.
        flipped = record.subset.flip_aug and rng.random() < 0.5
        step = epoch * self.steps_per_epoch + batch_index // self.batches_per_step
        sample = {
            "captions": process_caption(
                record.caption, record.subset, rng, epoch=epoch, step=step, total_steps=self.total_steps
            ),
            "loss_weights": self.prior_loss_weight if record.is_reg else 1.0,
            "original_sizes_hw": record.size_px[::-1],
            "target_sizes_hw": placement.bucket_px[::-1],
            "image_keys": str(record.path),
        }
        cached = self._cached(number, image_index)
        if cached is not None:
            left_top, mask = placement.centre_crop_px, cached.mask
            sample["latents"] = torch.from_numpy(cached.flipped if flipped else cached.latents)
        else:
            loaded = load_sample(record, placement, rng if self.training else None)
            left_top, mask = loaded.crop_left_top_px, loaded.mask
            sample["images"] = to_tensor(loaded.pixels, flipped)
        if flipped:  # what is cut off on the left of the mirrored picture was cut off on the right
            left_top = (placement.slack_px[0] - left_top[0], left_top[1])
        sample["crop_top_lefts"] = left_top[::-1]
        if mask is not None:
            mask = torch.from_numpy(np.ascontiguousarray(mask)).float()[None] / 255  # (1, H, W)
            sample["alpha_masks"] = mask.flip(-1) if flipped else mask
        return sample

    def _cached(self, number: int, image_index: int) -> Optional[CachedLatents]:
        if self._in_memory is not None:
            return self._in_memory[(number, image_index)]
        if self._on_disk is None:
            return None
        image = self.datasets[number].images[image_index]
        entry = self._on_disk.read(image.record, image.placement)
        if entry is None:
            path = self._on_disk.path(image.record, image.placement)
            raise UnreadableImageError(f"latent cache {path} or its image changed during the run: start again")
        return entry

    def cache_latents(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
        vae_key: str,
        *,
        to_disk: bool = False,
        batch_size: int = 1,
        write: bool = True,
        folder: Optional[str] = None,
    ) -> None:
        """Encodes every image once; from then on batches hold latents.

        encode: pixels (B, 3, H, W) float32 in [-1, 1] -> latents (B, 4, H/8, W/8), scaled.
        vae_key: names the VAE; entries made with another one are made anew.
        to_disk: npz files beside the images or in `folder`, for later runs; else in memory.
        write: False on ranks other than 0, which are to call this after rank 0 has finished.
        Raises ValueError: NaN in latents, or the cache cannot be written; RuntimeError: an entry
        that rank 0 should have written is missing."""
        files = LatentFiles(vae_key, folder) if to_disk else None
        todo = self._entries_to_encode(files)
        if to_disk and todo and not write:
            raise RuntimeError(f"{len(todo)} latent cache entries are missing: rank 0 has to write them first")
        in_memory = {}
        for group in tqdm(batches_of_equal_size(todo, batch_size), desc="caching latents", disable=not todo):
            for (number, image_index), entry in zip(group, self._encode(group, encode)):
                image = self.datasets[number].images[image_index]
                if files:
                    files.write(image.record, image.placement, entry)
                else:
                    in_memory[(number, image_index)] = entry
        self._on_disk, self._in_memory = files, None if files else in_memory

    def _entries_to_encode(self, files: Optional[LatentFiles]) -> dict[tuple[int, int], Size]:
        """{(dataset, image): bucket} of images whose latents are still to make, each file once."""
        todo, paths = {}, set()
        for number, dataset in enumerate(self.datasets):
            for index, image in enumerate(dataset.images):
                if files:
                    path = files.path(image.record, image.placement)
                    if path in paths or files.read(image.record, image.placement) is not None:
                        continue
                    paths.add(path)
                todo[(number, index)] = image.placement.bucket_px
        return todo

    def _encode(self, group: list[tuple[int, int]], encode) -> list[CachedLatents]:
        images = [self.datasets[number].images[index] for number, index in group]
        samples = [load_sample(image.record, image.placement) for image in images]
        pixels = torch.stack([to_tensor(sample.pixels) for sample in samples])  # (B, 3, H, W)
        latents = encoded(encode, pixels, images)
        flipped = [None] * len(images)
        if any(image.record.subset.flip_aug for image in images):
            flipped = encoded(encode, pixels.flip(-1), images)
        return [CachedLatents(*parts) for parts in zip(latents, flipped, [sample.mask for sample in samples])]

    def held_out(self, wanted: Callable[[PlacedImage], bool]) -> ImageBatches:
        """The training images wanted, each once, as validation images are; caches are shared."""
        datasets = []
        for dataset in self.datasets:
            images = [
                replace(i, record=replace(i.record, subset=without_chance(i.record.subset))) for i in dataset.images
            ]
            buckets = {
                size: [
                    index
                    for index in dict.fromkeys(indices)
                    if not images[index].record.is_reg and wanted(images[index])
                ]
                for size, indices in dataset.buckets.items()
            }
            datasets.append(BucketedDataset(dataset.settings, images, buckets))
        batches = ImageBatches(datasets, seed=self.seed, training=False)
        batches._in_memory, batches._on_disk = self._in_memory, self._on_disk
        return batches

    def described(self) -> list[tuple[str, str]]:
        """(file name, caption) of every picture: the same in every process of a run."""
        records = [image.record for dataset in self.datasets for image in dataset.images]
        return [(record.path.name, record.caption) for record in records]

    def whole_captions(self) -> list[str]:
        """A caption an image as it is trained on where nothing of it is varied or left out."""
        records = [image.record for dataset in self.datasets for image in dataset.images]
        settings = {id(record.subset): without_chance(record.subset) for record in records}
        chance = random.Random(0)
        return [process_caption(r.caption, settings[id(r.subset)], chance, epoch=0, step=0) for r in records]

    def metadata(self) -> dict[str, object]:
        """The `ss_*` facts of the saved LoRA that come from the data."""
        return dataset_metadata(self.datasets, num_batches=len(self), is_user_config=self.is_user_config)


def encoded(
    encode: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, images: list[PlacedImage]
) -> list[np.ndarray]:
    """Latents of a batch as float32 arrays. Raises ValueError, naming one that is not finite."""
    with torch.no_grad():
        latents = encode(pixels).detach().float().cpu()  # (B, 4, H/8, W/8)
    for image, one in zip(images, latents):
        if not torch.isfinite(one).all():
            message = f"the VAE gives NaN for {image.record.path}: use --no_half_vae or another --vae"
            raise ValueError(message)
    return [one.numpy().copy() for one in latents]


def batches_of_equal_size(sizes: dict[tuple[int, int], Size], batch_size: int) -> list[list[tuple[int, int]]]:
    by_size = defaultdict(list)
    for key, size in sizes.items():
        by_size[size].append(key)
    return [keys[i : i + batch_size] for keys in by_size.values() for i in range(0, len(keys), batch_size)]


def to_tensor(pixels: np.ndarray, flipped: bool = False) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32 in [-1, 1], mirrored if asked."""
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    return tensor.flip(-1) if flipped else tensor.contiguous()


def collate(samples: list[dict]) -> dict:
    """Samples of one bucket as one batch (see ImageBatches)."""
    batch = {name: [sample[name] for sample in samples] for name in ("captions", "image_keys")}
    batch["loss_weights"] = torch.tensor([sample["loss_weights"] for sample in samples], dtype=torch.float32)
    for name in ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw"):
        batch[name] = torch.tensor([sample[name] for sample in samples], dtype=torch.int64)
    for name in ("latents", "images"):
        batch[name] = torch.stack([sample[name] for sample in samples]) if name in samples[0] else None
    batch["alpha_masks"] = None
    if any("alpha_masks" in sample for sample in samples):
        whole = torch.ones(1, *samples[0]["target_sizes_hw"])
        batch["alpha_masks"] = torch.stack([sample.get("alpha_masks", whole) for sample in samples])
    return batch
