"""In which order batches reach the optimizer steps of each process, and the loader that brings them."""

import os

import torch
from torch.utils.data import DataLoader, Sampler


class Order(Sampler):
    """Indices that are set anew before each epoch; the loader, and workers that persist, stay the same."""

    def __init__(self):
        self.indices = []

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


def make_loader(args, batches, latents_in_memory):
    """(DataLoader, its Order). Workers only where there is something to decode or to read."""
    workers = 0 if latents_in_memory else min(args.max_data_loader_n_workers, os.cpu_count() or 1)
    order = Order()
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        persistent_workers=bool(workers and args.persistent_data_loader_workers),
        generator=torch.Generator(),  # or it would draw from the random state of training
    )
    return loader, order


def step_indices(batch_count, processes, rank, accumulation):
    """The batch indices of each optimizer step of an epoch, for one process: a list of lists.

    Batches are dealt out in turn; where they do not come out even, the first ones are used again, so that all processes
    have the same number of steps. The last step of an epoch may have fewer micro-batches.
    """
    own_count = -(-batch_count // processes)
    own = [(i * processes + rank) % batch_count for i in range(own_count)]
    return [own[start : start + accumulation] for start in range(0, own_count, accumulation)]
