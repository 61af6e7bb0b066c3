"""Fold one or more weighted LoRAs into a checkpoint, so that it needs no LoRA any more.

    python merge_lora.py --sd_model BASE --models a.safetensors b.safetensors \
        --ratios 0.8 0.5 --save_to merged

A diffusers folder becomes a folder; a single file becomes a .safetensors file in the same original
layout (everything but the adapted weights is kept as it is) or, where --save_to has no ending, a
folder. LoRAs of kohya's and diffusers' naming are read, and LyCORIS' locon, loha and lokr.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from base.files import read_json
from base.tensor_files import read_tensors, refuse_not_finite
from es_lora.files import write_folder_whole, write_whole
from es_lora.weights import save_tensors
from network.folding import fold_into_tensors, fold_lora
from network.lora_file import DTYPES, load_lora
from settings.entry_point import ended

TOO_LARGE = "the sum is too large for it: give --save_precision float, or lower --ratios"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code: 0, or 2 with one line on stderr."""
    args = _parser().parse_args(argv)
    return ended("merge_lora", lambda: _merge(args))


def _merge(args):
    ratios = _check(args)
    loras = [(load_lora(path)[0], ratio, path) for path, ratio in zip(args.models, ratios)]
    base, target = Path(args.sd_model), Path(args.save_to)
    if base.is_file() and target.suffix:
        _merge_file(base, target, loras, args)
    else:
        _merge_folder(args.sd_model, target, loras, args)
    print(f"{args.save_to}: {args.sd_model} with {len(args.models)} LoRA(s) folded in")
    return 0


def _merge_file(base, target, loras, args):
    checkpoint = read_tensors(base)
    config = base.with_suffix(".config") / "unet" / "config.json"
    layers_per_block = read_json(config)["layers_per_block"] if config.is_file() else 2
    for tensors, ratio, path in loras:
        fold_into_tensors(checkpoint, tensors, ratio, layers_per_block, path)
    dtype = DTYPES[args.save_precision]
    if dtype is not None:
        checkpoint = {k: value.to(dtype) if value.is_floating_point() else value for k, value in checkpoint.items()}
    refuse_not_finite(f"{target} in {args.save_precision or 'its precision'}", checkpoint, TOO_LARGE)
    metadata = {}
    if base.suffix == ".safetensors":
        with safe_open(base, "pt") as file:
            metadata = file.metadata() or {}
    metadata["modelspec.merged_from"] = ", ".join(Path(path).stem for path in (base, *args.models))
    checkpoint = {name: value.contiguous() for name, value in checkpoint.items()}
    write_whole(target, lambda aside: save_tensors(checkpoint, aside, metadata))


def _merge_folder(base, target, loras, args):
    from base.loading import load_base_model

    dtype = DTYPES[args.save_precision] or torch.float32
    model = load_base_model(
        base,
        v2=args.v2,
        v_parameterization=args.v_parameterization,
        vae=args.vae,
        tokenizer_cache_dir=args.tokenizer_cache_dir,
    )
    for tensors, ratio, path in loras:
        fold_lora(model, tensors, ratio, path)
    for part in (model.unet, model.vae, *model.text_encoders):
        part.to(dtype)
        refuse_not_finite(f"{target} in {args.save_precision or 'float'}", part.state_dict(), TOO_LARGE)
    write_folder_whole(target, model.save_pipeline)


def _check(args):
    """The ratios, one a LoRA. Raises ValueError with every problem of the arguments."""
    problems, target = [], Path(args.save_to)
    ratios = args.ratios or [1.0] * len(args.models)
    if len(ratios) != len(args.models):
        problems.append(f"--ratios has {len(ratios)} numbers for {len(args.models)} LoRAs; give one for each")
    if target.suffix not in ("", ".safetensors"):
        problems.append(f"--save_to ends in {target.suffix}; give a .safetensors file or a folder without an ending")
    if target.suffix and Path(args.sd_model).is_dir():
        problems.append(f"--sd_model is a folder, so --save_to must be one, too: leave {target.suffix} out")
    if not all(map(math.isfinite, ratios)):
        problems.append(f"--ratios {' '.join(map(str, ratios))} must be finite numbers")
    if target.exists() and Path(args.sd_model).exists() and target.samefile(args.sd_model):
        problems.append(f"--save_to is the base model itself ({target}); give another path")
    elif target.is_dir() and any(target.iterdir()):
        problems.append(f"--save_to {target} is a folder with files in it; give a new one")
    if problems:
        raise ValueError("; ".join(problems))
    return ratios


def _parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sd_model", required=True, help="base: diffusers folder, .safetensors or .ckpt file, hub name")
    add("--models", required=True, nargs="+", metavar="LORA", help="LoRA files")
    add("--ratios", nargs="+", type=float, help="strength of each LoRA (default 1)")
    add("--save_to", required=True, help="new .safetensors file (from a file) or new folder")
    add(
        "--save_precision", "--precision", choices=["float", "fp16", "bf16"],
        help="of the saved weights; the sum is computed in float32 (default: as the base file, float for a folder)",
    )  # fmt: skip
    add("--vae", help="another VAE, or that of a base without one, for a folder")
    add("--v2", action="store_true", help="the base is SD 2.x")
    add("--v_parameterization", action="store_true", help="the base predicts velocity")
    add("--tokenizer_cache_dir", help="where the CLIP vocabulary lies, for file to folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
