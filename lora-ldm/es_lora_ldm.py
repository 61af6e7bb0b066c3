"""Train a LoRA for Stable Diffusion 1.x / 2.x and stop at its turning point.

    python es_lora_ldm.py --pretrained_model_name_or_path BASE --train_data_dir IMAGES \
        --resolution 512 --output_dir OUT --early_stop --max_train_epochs 15

Flags, folders and files are those of sd-scripts' train_network.py; see `--help`. `step`: completed
optimizer steps. Exit codes: 0 trained or stopped early, 2 bad input, 3 diverged, 130 interrupted.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Optional

import quiet_libraries  # noqa: F401  (before diffusers)

from base.families import StableDiffusion
from es_lora.command_line import last_state_named
from es_lora.folder_lock import locked
from images.batches import build_datasets
from settings.entry_point import ended
from settings.parsing import parse_arguments
from training.loop import train
from training.results import finish, how_to_go_on, last_lines
from training.setup import set_up


def main(argv: Optional[Sequence[str]] = None, family: type[StableDiffusion] = StableDiffusion) -> int:
    """Run the trainer for a kind of base; -> exit code. argv: the words, None: the process's."""

    def work() -> int:
        args = parse_arguments(argv, family.is_sdxl)
        if args.debug_dataset:
            return show_data(args)
        with output_folder_held(args, family.program), last_state_named(lambda: how_to_go_on(args)):
            run = set_up(args, family)
            outcome = finish(run, train(run))
            if run.processes.is_main:
                print("\n".join(last_lines(outcome, run)))
        return outcome.exit_code

    return ended(family.program, work, "interrupted at once; what was saved before is whole")


def output_folder_held(args: Namespace, program: str) -> AbstractContextManager:
    """The output folder is this run's alone; its first process holds it for all."""
    first = os.environ.get("RANK", "0") == "0"
    return locked(args.output_dir, program) if first else nullcontext()


def show_data(args: Namespace) -> int:
    """--debug_dataset: what the first epoch would train on."""
    args.seed = args.seed or 0
    batches, _ = build_datasets(args)
    for index in range(len(batches)):
        batch = batches[index]
        for key, caption, weight in zip(batch["image_keys"], batch["captions"], batch["loss_weights"].tolist()):
            print(f"batch {index}: {key} | loss weight {weight:g} | {caption}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
