"""Pictures from prompts: during training, at its end, and from the command line.

    python sample_images.py --base MODEL --lora FILE[:WEIGHT] \
        --prompt "a cat --w 512 --h 512 --d 7 --s 30"

Prompt lines: TEXT --n NEGATIVE --w WIDTH --h HEIGHT --d SEED --l SCALE --s STEPS --ss SAMPLER.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from base.memory import best_device, checked_device
from base.sampling import MOST_PROMPTS, SCHEDULERS, Sampler, parse_prompt_line, read_prompts
from settings.entry_point import ended

SCHEDULERS.update({f"k_{name}": SCHEDULERS[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")})


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pictures from a base model and LoRA files.", allow_abbrev=False)
    parser.add_argument("--base", required=True, help="diffusers folder, checkpoint file or hub name")
    parser.add_argument("--lora", action="append", default=[], help="LoRA file, FILE or FILE:WEIGHT; may be repeated")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt line; may be repeated")
    parser.add_argument("--prompts", help="a prompt file (.txt, .toml, .json)")
    parser.add_argument("--out", default="pictures", help="folder for the PNG files (default: %(default)s)")
    parser.add_argument("--sampler", default="ddim", choices=list(SCHEDULERS))
    parser.add_argument("--seed", type=int, default=0, help="of prompts without --d (default: %(default)s)")
    parser.add_argument("--vae", help="another VAE")
    parser.add_argument("--v2", action="store_true")
    parser.add_argument("--v_parameterization", action="store_true")
    parser.add_argument("--clip_skip", type=int)
    parser.add_argument("--max_token_length", type=int, choices=[75, 150, 225], help="longest prompt (default: 75)")
    parser.add_argument("--device", default=best_device())
    args = parser.parse_args(argv)
    if not (args.prompt or args.prompts):
        parser.error("give --prompt or --prompts")
    return args


def _check(args, count):
    """Raise ValueError for numbers of the command line that no picture can be made with."""
    if count > MOST_PROMPTS:
        raise ValueError(f"{count} prompts: {MOST_PROMPTS} are the most")
    if not 0 <= args.seed <= 2**63 - 1 - count:
        raise ValueError(f"--seed {args.seed} is not allowed: it must be at least 0 and below {2**63 - count}")
    if args.clip_skip is not None and not 1 <= args.clip_skip <= 12:
        raise ValueError(
            f"--clip_skip {args.clip_skip} is not allowed: the text encoder has 12 layers; 1 or 2 is usual"
        )


def split_weight(text: str) -> tuple[str, float]:
    """("file", weight) of FILE or FILE:WEIGHT."""
    path, colon, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if colon and path else (text, 1.0)
    except ValueError:
        return text, 1.0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    return ended("sample_images", lambda: sample(args))


def sample(args: argparse.Namespace) -> int:
    """Make the pictures and print their paths; -> 0."""
    prompts = [parse_prompt_line(line) for line in args.prompt] + (read_prompts(args.prompts) if args.prompts else [])
    _check(args, len(prompts))
    from base.loading import load_base_model
    from base.text_encoding import what_is_cut
    from network.folding import fold_lora
    from network.lora_file import load_lora

    checked_device(args.device)
    dtype = torch.float16 if args.device.startswith("cuda") else torch.float32
    settings = {"v2": args.v2, "v_parameterization": args.v_parameterization, "vae": args.vae}
    model = load_base_model(args.base, **settings, dtype=dtype)
    how = {"max_token_length": args.max_token_length, "clip_skip": args.clip_skip}
    for line in what_is_cut(model, [prompt.prompt for prompt in prompts], args.max_token_length, "prompts"):
        print(f"sample_images: {line}", file=sys.stderr)
    for text in args.lora:
        path, weight = split_weight(text)
        fold_lora(model, load_lora(path)[0], weight, path)
    for part in (model.unet, model.vae, *model.text_encoders):
        part.to(args.device)
    sampler = Sampler(
        model, lambda captions: model.encode_text(captions, **how), sampler=args.sampler, device=args.device
    )
    for _, path in sampler.save_pictures(prompts, args.out, "picture", args.seed):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
