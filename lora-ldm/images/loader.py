"""In which order batches reach each process's optimizer steps, and the loader of them."""

import os
from argparse import Namespace
from collections.abc import Iterator
from typing import Union

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from images.batches import ImageBatches


class Order(Sampler):
    """Indices set anew before each epoch; the loader, and workers that persist, stay."""

    def __init__(self):
        self.indices: list[int] = []

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


class Readable(Dataset):
    """The batches, and in place of one that cannot be read the error: a worker process that raised
    it would send a traceback along."""

    def __init__(self, batches: ImageBatches):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Union[dict, Exception]:
        try:
            return self.batches[index]
        except (ValueError, OSError) as error:
            return type(error)(str(error))


def _unless_unreadable(batch):
    if isinstance(batch, Exception):
        raise batch
    return batch


class StepLoader:
    """The micro-batches of each optimizer step, for one process of several.
    args: the settings of a run. Workers only where there is something to decode or to read."""

    def __init__(self, args: Namespace, batches: ImageBatches, processes: int = 1, rank: int = 0):
        self.batches = batches
        self._dealt = processes, rank, args.gradient_accumulation_steps
        latents_in_memory = args.cache_latents and not args.cache_latents_to_disk
        workers = 0 if latents_in_memory else min(args.max_data_loader_n_workers, os.cpu_count() or 1)
        self._order = Order()
        self._loader = DataLoader(
            Readable(batches),
            batch_size=None,
            sampler=self._order,
            num_workers=workers,
            persistent_workers=bool(workers and args.persistent_data_loader_workers),
            generator=torch.Generator(),  # or it would draw from the random state of training
        )

    def __len__(self) -> int:
        """Optimizer steps of an epoch."""
        return len(step_indices(len(self.batches), *self._dealt))

    def steps(self, epoch: int, done: int) -> Iterator[list[dict]]:
        """The micro-batches of each step of an epoch, counted from 0, that is still to do."""
        self.batches.set_epoch(epoch)
        steps = step_indices(len(self.batches), *self._dealt)[done:]
        self._order.indices = [index for step in steps for index in step]
        batches = iter(self._loader)
        for step in steps:
            yield [_unless_unreadable(next(batches)) for _ in step]


def step_indices(batch_count: int, processes: int, rank: int, accumulation: int) -> list[list[int]]:
    """The batch indices of each optimizer step of an epoch, for one process: a list of lists.

    Batches are dealt out in turn; where they do not come out even, the first ones are used again,
    so that all processes have the same number of steps. The last step may have fewer micro-batches.
    """
    own_count = -(-batch_count // processes)
    own = [(i * processes + rank) % batch_count for i in range(own_count)]
    return [own[start : start + accumulation] for start in range(0, own_count, accumulation)]
