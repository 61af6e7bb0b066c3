"""Say which of a trainer's saved LoRA adapters is to be kept, from their weights and the base's.

    python judge_checkpoints.py FOLDER --base BASE [--rule R|recorded] [--steps_per_epoch N]
    [--json] [--html FILE.html]

FOLDER holds the adapters of one run: PEFT's `checkpoint-500/adapter_model.safetensors`, diffusers'
`checkpoint-500/pytorch_lora_weights.safetensors`, or kohya's `name-000003.safetensors` (epochs),
`name-step00000500.safetensors` (steps) and `name.safetensors` (the last). BASE is a Hugging Face
folder, a diffusers folder, or a Stable Diffusion checkpoint in one .safetensors file. The base is
read tensor by tensor, in blocks of rows. The parts are in es_lora/judge/. Python 3.8, torch 1.13.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Optional, Sequence

from es_lora.command_line import reported
from es_lora.inputs.bounds import whole
from es_lora.judge.base_index import Base
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
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    arguments = parse_arguments(argv)
    return reported("judge_checkpoints", lambda: _judge(arguments))


def _judge(arguments: argparse.Namespace) -> int:
    run = read_run(arguments.folder, arguments.steps_per_epoch)
    measure_run(run, Base(arguments.base), progress=sys.stderr.isatty())
    verdict, history, decision = judge(run, arguments.rule)
    if arguments.html:
        write_page(arguments.html, verdict, history, decision)
    if arguments.json:
        print(json.dumps(verdict))
    else:
        print_verdict(verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main())
