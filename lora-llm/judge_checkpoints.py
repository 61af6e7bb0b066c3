"""Say which of a trainer's saved LoRA adapters is to be kept, from their weights and the base's.

    python judge_checkpoints.py FOLDER --base BASE [--rule R|recorded] [--steps_per_epoch N]
    [--json] [--html FILE.html] [--grid PROMPTS [--seeds 1,2,3] [--strength 0.6,1]]

FOLDER holds the adapters of one run: PEFT's `checkpoint-500/adapter_model.safetensors`, diffusers'
`checkpoint-500/pytorch_lora_weights.safetensors`, or kohya's `name-000003.safetensors` (epochs),
`name-step00000500.safetensors` (steps) and `name.safetensors` (the last). BASE is a Hugging Face
folder, a diffusers folder, or a Stable Diffusion checkpoint in one .safetensors file. The base is
read tensor by tensor, in blocks of rows. The parts are in es_lora/judge/. Python 3.8, torch 1.13.

--grid draws what each of them makes of a file of prompts, on one page to choose by. That loads the
base whole, with the packages of the tree; its room `grid` does it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Optional, Sequence

from es_lora.command_line import reported
from es_lora.inputs.bounds import whole
from es_lora.judge.base_index import Base
from es_lora.judge.grid_page import add_grid_flags, grid_facts, page_of, print_grid, write_grid
from es_lora.judge.run_folder import read_run
from es_lora.judge.verdict import judge, measure_run, print_verdict, write_page
from es_lora.rules import RULES


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Say which of a folder's saved LoRAs to keep.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="the folder with the saved adapters of one run")
    parser.add_argument("--base", type=Path, required=True, help="the model they were trained on: a folder or a file")
    rules = f"{', '.join(RULES)}, or recorded (default: the project's default, or one that weights can answer)"
    parser.add_argument("--rule", help=rules)
    parser.add_argument(
        "--steps_per_epoch", type=whole(1), help="optimizer steps an epoch, where the files do not tell"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", type=Path, help="write the report page to this file")
    add_grid_flags(parser)
    _add_flags_of_the_tree(parser)
    return parser.parse_args(argv)


def _add_flags_of_the_tree(parser: argparse.ArgumentParser) -> None:
    """Those of what draws here; none where these files were copied without it."""
    try:
        from grid.flags import add_flags
    except ImportError:
        return
    add_flags(parser)


def _drawing(arguments: argparse.Namespace) -> Any:
    """What draws the grid, its inputs checked. Raises ValueError, before anything slow is done."""
    try:
        from grid.drawing import drawing_of
    except ImportError as error:
        raise ValueError(f"--grid needs the packages of a whole tree of this project ({error}); leave it out") from None
    return drawing_of(arguments)


def main(argv: Optional[Sequence[str]] = None) -> int:
    arguments = parse_arguments(argv)
    return reported("judge_checkpoints", lambda: _judge(arguments), "interrupted: no page is written")


def _judge(arguments: argparse.Namespace) -> int:
    run = read_run(arguments.folder, arguments.steps_per_epoch)
    page = page_of(arguments.folder, arguments.grid_page) if arguments.grid else None
    drawing = _drawing(arguments) if arguments.grid else None
    measure_run(run, Base(arguments.base), progress=sys.stderr.isatty())
    verdict, history, decision = judge(run, arguments.rule)
    grid = drawing.draw(run, verdict) if drawing else None
    if arguments.html:
        write_page(arguments.html, verdict, history, decision)
    if page and grid:
        write_grid(page, grid, verdict)
        verdict["grid"] = grid_facts(grid, page)
    if arguments.json:
        print(json.dumps(verdict))
        return 0
    print_verdict(verdict)
    if page and grid:
        print_grid(grid, page, verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main())
