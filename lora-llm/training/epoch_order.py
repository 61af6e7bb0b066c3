"""The order of an epoch's examples: by (seed, epoch) alone, so that a resumed run sees it again."""

from collections.abc import Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class EpochSeededLengthSampler(LengthGroupedSampler):
    """Groups by length in an order of (seed, epoch) alone, the same for a run resumed mid-epoch."""

    seed = 0

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, by_length: bool) -> list[int]:
    """Every index once. by_length: examples of like length together, in batches of batch_size."""
    if by_length:
        sampler = EpochSeededLengthSampler(batch_size, lengths=list(lengths))
        sampler.seed = seed
        sampler.set_epoch(epoch)
        return list(sampler)
    return torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
