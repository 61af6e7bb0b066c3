"""The processes of a run: the accelerator, what the first says, and what all agree on."""

import datetime
import os
import random
import sys
import time
from argparse import Namespace
from collections.abc import Iterable
from typing import Any, Optional

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast
from tqdm import tqdm

from es_lora.hugging_face.processes import digest_of, refuse_different

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Processes:
    """This process among those of the run. weight_dtype: in which the model computes.
    Raises ValueError for a precision that the device does not have."""

    def __init__(self, args: Namespace):
        self.accelerator = make_accelerator(args)
        self.weight_dtype = PRECISIONS[args.mixed_precision]

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def count(self) -> int:
        return self.accelerator.num_processes

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    def say(self, *lines: str) -> None:
        """Lines of the first process, above the progress bar."""
        if self.is_main:
            for line in lines:
                tqdm.write(line, file=sys.stdout)

    def agreed_seed(self, seed: Optional[int]) -> int:
        """The seed, or one drawn by the first process for all of them."""
        drawn = random.SystemRandom().randrange(2**31) if seed is None else seed
        return int(broadcast(torch.tensor([drawn], device=self.device))[0])

    def told_by_main(self, answer: float) -> float:
        """The first process's answer, on all of them."""
        told = torch.tensor([float(answer)], device=self.device)
        return (broadcast(told) if self.count > 1 else told).item()

    def check_same(self, what: str, values: Iterable[Any]) -> None:
        """Raises ValueError, on all of them, where they do not hold the same values in order."""
        if self.count > 1:
            own = torch.tensor([digest_of(values)], device=self.device)
            refuse_different(what, self.accelerator.gather(own).tolist())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the processes, the same on all of them."""
        return self.accelerator.reduce(values, "mean") if self.count > 1 else values

    def share_gradients(self, parameters: list[torch.Tensor]) -> None:
        """Mean of the gradients over processes: one transfer a step, whatever its micro-batches."""
        if self.count == 1:
            return
        for weight in parameters:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        flat = self.mean(torch.cat([weight.grad.flatten() for weight in parameters]))
        for weight, part in zip(parameters, flat.split([weight.numel() for weight in parameters])):
            weight.grad.copy_(part.view_as(weight))


def make_accelerator(args: Namespace) -> Accelerator:
    """The accelerate.Accelerator of the run. Raises ValueError for a precision not to be had."""
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--mixed_precision fp16 needs a GPU; use no or bf16 on a CPU")
    handlers = (
        [InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=args.ddp_timeout))] if args.ddp_timeout else []
    )
    trackers = {"all": ["tensorboard", "wandb"], None: None}.get(args.log_with, [args.log_with])
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    accelerator = Accelerator(
        cpu=on_cpu,  # said outright, several processes on a CPU find each other
        mixed_precision=args.mixed_precision,
        log_with=trackers,
        project_dir=_logging_folder(args) if trackers else None,
        kwargs_handlers=handlers,
    )
    if args.full_fp16:
        _allow_fp16_gradients(accelerator)
    return accelerator


def _logging_folder(args):
    """kohya's layout: a folder a run, named by its time, inside --logging_dir."""
    stamp = time.strftime("%Y%m%d%H%M%S", time.localtime())
    return os.path.join(args.logging_dir or os.path.join(args.output_dir, "logs"), f"{args.log_prefix or ''}{stamp}")


def _allow_fp16_gradients(accelerator):
    """torch's scaler refuses gradients in fp16 unless told that this is meant (--full_fp16)."""
    unscale = accelerator.scaler._unscale_grads_
    accelerator.scaler._unscale_grads_ = lambda *words: unscale(*words[:3], True)
