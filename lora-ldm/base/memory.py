"""How much memory there is, and what certainly does not fit into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from base.tensor_files import first_line

if TYPE_CHECKING:
    from base.sd import SDModel

NO_LIMIT = 2**63
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
FLOAT_BYTES = 4
TRAINED_BYTES = 4 * FLOAT_BYTES  # of a trained value: itself, its gradient, Adam's two means
VAE_COPIES = 2  # in and out of a convolution at full size
UNET_COPIES = 8  # kept for the backward pass at full size; really more


def memory_bytes(device: str | torch.device) -> int:
    """All memory of a device; of the CPU what this process may have of the machine's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        import resource
    except ImportError:  # Windows does not say it this way
        return NO_LIMIT
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    texts = [Path(path).read_text().strip() for path in CGROUP_LIMITS if Path(path).is_file()]
    limits += [int(text) for text in texts if text.isdigit()]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min([*limits, *([soft] if soft != resource.RLIM_INFINITY else [])])


def best_device() -> str:
    """The name of what computes fastest here: CUDA, Apple's GPU, or else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def checked_device(name: str) -> str:
    """The name of a device that is there. Raises ValueError for another one."""
    try:
        torch.zeros(1, device=torch.device(name)).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts
        fix = "give cpu, or cuda for a GPU (Apple's: mps)"
        message = f"--device {name:.60} is not to be had here ({first_line(error):.200}): {fix}"
        raise ValueError(message) from None
    return name


def refuse_batch(flag: str, count: int, bytes_each: int, device: str | torch.device) -> None:
    """Raise ValueError, by the number that would fit, where so many pictures certainly do not."""
    most = memory_bytes(device) // max(1, bytes_each)
    if count > most:
        raise ValueError(
            f"{flag} {count}: a picture of this size takes at least {bytes_each / 1e9:.2g} GB, and "
            f"{memory_bytes(device) / 1e9:.3g} GB are there; " + (f"{most} would fit" if most else "lower --resolution")
        )


def picture_bytes(model: SDModel, width_px: int, height_px: int, trained: bool) -> int:
    """At least so much a picture takes in the VAE, or where it is trained on in the U-Net."""
    in_vae = width_px * height_px * model.vae.config.block_out_channels[0] * VAE_COPIES * FLOAT_BYTES
    latents = width_px * height_px // model.vae_scale**2
    in_unet = latents * model.unet.config.block_out_channels[0] * UNET_COPIES * FLOAT_BYTES
    return in_unet if trained else in_vae


def refuse_rank(flag: str, rank: int, sides: list[tuple[int, int]], device: str | torch.device = "cpu") -> None:
    """Raise ValueError for a rank that no layer has, or whose LoRA certainly does not fit.

    sides: (out, in) of every layer's weight as a matrix."""
    largest = max(min(side) for side in sides)
    if rank > largest:
        raise ValueError(f"{flag} {rank}: no layer of this base has a rank above {largest}; give {largest} at most")
    needed = sum(rank * (outputs + inputs) * TRAINED_BYTES for outputs, inputs in sides)
    there = memory_bytes(device)
    if needed > there:
        raise ValueError(
            f"{flag} {rank}: the LoRA takes {needed / 1e9:.3g} GB to train, and {there / 1e9:.3g} GB are there; "
            f"{rank * there // needed} would fit"
        )
