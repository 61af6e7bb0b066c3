"""Numbers of flags and files: finite, and no larger than makes sense. One check for all of them."""

import argparse
import math
from collections.abc import Iterator
from typing import Any

from es_lora.inputs.bounds import MOST

MOST_STEPS = 10**8  # of a run
MOST_SIDE_PX = 4096  # of a picture to train on or to make
LARGEST_FLOAT = 1e36  # above it a square is infinite even in half of float32's range

# {flag: the most that makes sense}; of the others MOST and LARGEST_FLOAT.
MOST_OF = {
    **dict.fromkeys(("train_batch_size", "vae_batch_size"), 4096),
    **dict.fromkeys(("max_train_steps", "initial_step"), MOST_STEPS),
    **dict.fromkeys(("max_train_epochs", "initial_epoch", "ddp_timeout", "network_dim"), 10**6),
    **dict.fromkeys(("gradient_accumulation_steps", "num_class_images"), 10**5),
    **dict.fromkeys(("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"), MOST_SIDE_PX),
    **dict.fromkeys(("multires_noise_iterations", "shadows"), 100),
    **dict.fromkeys(("max_data_loader_n_workers", "shadow_rank"), 4096),
    "snapshot_disk_gb": 10**6,
    "seed": 2**32 - 1,
    "validation_seed": 2**63 - 1,
}


def problem_of(value: Any, name: str = "") -> str | None:
    """Why a number is none to use, in words; None for one that is, and for what is no number.
    name: of the flag or setting, whose most it must not exceed."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value) if isinstance(value, float) else False:
        return "it must be a finite number"
    most = MOST_OF.get(name, MOST if isinstance(value, int) else LARGEST_FLOAT)
    if abs(value) > most:
        return f"it must be at most {most:g}" if isinstance(most, float) else f"it must be at most {most}"
    return "it must be at least 0" if name == "seed" and value < 0 else None


def shown(value: int | float) -> str:
    """A number as it was given, or so much of it as tells it."""
    text = f"{value}" if isinstance(value, float) or abs(value) < 10**40 else f"{float(min(abs(value), 10**300)):g}"
    return text


def out_of_bounds(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, str]:
    """{flag: the line that refuses its number} for every flag of the command line or a file."""
    given = {**vars(args), **args.stop.as_flags()}
    lines = {}
    for name in [action.dest for action in parser._actions]:
        for value in _values(given.get(name)):
            problem = problem_of(value, name)
            if problem:
                lines[name] = f"--{name} {shown(value)} is not allowed: {problem}"
    return lines


def _values(value: Any) -> Iterator[Any]:
    """A value, or the values in a list or tuple."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _values(item)
    else:
        yield value
