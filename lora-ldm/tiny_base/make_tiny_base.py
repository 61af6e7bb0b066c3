"""Build the embedded diffusion base: collect (npm), tokenizer, vae, unet, export, evaluate.

    python make_tiny_base.py                        every stage in turn
    python make_tiny_base.py vae unet --device cuda --vae_minutes 4 --unet_minutes 5
    python make_tiny_base.py export evaluate        from weights that are there already

Needs `npm` on the path for the stage collect and requirements-extras.txt (resvg-py). Everything
between stages lies in --work_dir; the model goes to --model_dir (default: this folder).
"""

import argparse
import json
import random
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_networks
from augmentation import on_white
from safetensors.torch import load_file, save_file
from tiny_models import (
    LATENT_SCALE,
    build_noise_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
    learn_bpe,
    parameter_count,
    save_tokenizer,
    tokenize,
)

HERE = Path(__file__).resolve().parent
STAGES = ("collect", "tokenizer", "vae", "unet", "export", "evaluate")

# Fixed before the first picture was seen. The first 24 ask for things that have a picture in the
# training styles or among the held-out ones; the last 8 ask for combinations that no picture shows.
GRID_PROMPTS = (
    "red heart; cat face; grinning face; pizza; green apple; sunflower; house with garden; snow-capped mountain; "
    "rainbow; full moon; dog face; tropical fish; automobile; sailboat; rocket; soccer ball; umbrella; castle; "
    "woman: red hair; man: beard; frog; birthday cake; christmas tree; blue heart; purple cat face; sad pumpkin; "
    "blue apple; green car; house in the snow; red flower and a heart; angry dog; yellow fish"
).split("; ")


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON."""
    Path(path).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf8")


def read_records(args: Namespace) -> tuple[list[dict], np.ndarray]:
    """Records and pictures of the stage collect: (list of dicts, uint8 (N, 64, 64, 4))."""
    path = args.work_dir / "pictures.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run the stage `collect` first")
    return json.loads((args.work_dir / "records.json").read_text("utf8")), np.load(path)["pictures"]


def collect(args: Namespace) -> None:
    """Packages -> pictures.npz, records.json."""
    from emoji_pictures import collect_pictures

    records, pictures = collect_pictures(args.work_dir / "packages", args.seed)
    np.savez_compressed(args.work_dir / "pictures.npz", pictures=pictures)
    write_json(args.work_dir / "records.json", records)
    print(f"{len(records)} pictures, {sum(r['role'] == 'train' for r in records)} of them to train on")


def tokenizer(args: Namespace) -> None:
    """Captions -> tokenizer folder, tokens.npz."""
    from transformers import CLIPTokenizer

    records, _ = read_records(args)
    vocabulary, merges = learn_bpe([caption for record in records for caption in record["captions"][:8]])
    save_tokenizer(vocabulary, merges, args.work_dir / "tokenizer")
    clip = CLIPTokenizer.from_pretrained(args.work_dir / "tokenizer")
    flat = tokenize(clip, [caption for record in records for caption in record["captions"]])
    np.savez_compressed(
        args.work_dir / "tokens.npz",
        training=flat.view(len(records), -1, flat.shape[-1]).numpy().astype(np.int16),  # (N, captions, 77)
        fixed=tokenize(clip, [record["caption"] for record in records]).numpy().astype(np.int16),  # (N, 77)
        empty=tokenize(clip, [""])[0].numpy().astype(np.int16),  # (77,)
    )
    print(f"{len(vocabulary)} tokens; the longest caption has {int((flat != flat[0, -1]).sum(1).max()) + 1}")


def save_states(folder: Path, name: str, state: dict[str, torch.Tensor]) -> None:
    """Write one state dict as fp16 safetensors, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial"
    save_file({key: value.half().cpu().contiguous() for key, value in state.items()}, partial)
    partial.replace(folder / f"{name}.safetensors")


def load_states(args: Namespace, name: str, module: torch.nn.Module) -> torch.nn.Module:
    """Read what save_states wrote into a module."""
    state = load_file(args.results / f"{name}.safetensors")
    module.load_state_dict({key: value.float() for key, value in state.items()})
    return module.to(args.device).eval()


def vae(args: Namespace) -> None:
    """Pictures -> vae.safetensors."""
    records, pictures = read_records(args)
    training = [i for i, record in enumerate(records) if record["role"] == "train"]
    on_device = torch.from_numpy(pictures[training]).to(args.device)
    model = build_vae().to(args.device)
    figures = train_networks.train_vae(
        model,
        on_device,
        batch_size=args.vae_batch_size,
        max_minutes=args.vae_minutes,
        max_steps=args.max_steps,
        compiled=args.compile,
    )
    save_states(args.results, "vae", model.state_dict())
    validation = [i for i, record in enumerate(records) if record["role"] == "validation"]
    rgb = on_white(torch.from_numpy(pictures[validation]).to(args.device))
    figures["validation_psnr_db"] = round(train_networks.psnr_db(model.eval(), rgb), 2)
    write_json(args.results / "vae_training.json", figures)
    print("autoencoder:", figures, flush=True)


def unet(args: Namespace) -> None:
    """Pictures, captions and autoencoder -> unet_last, unet_best, text_last, text_best."""
    records, pictures = read_records(args)
    tokens = np.load(args.work_dir / "tokens.npz")
    image_model = load_states(args, "vae", build_vae())
    training = [i for i, record in enumerate(records) if record["role"] == "train"]
    can_flip = torch.tensor([records[i]["can_flip"] for i in training], device=args.device)
    weights = torch.tensor([records[i]["weight"] for i in training], device=args.device)
    latents = train_networks.encode_variations(
        image_model, torch.from_numpy(pictures[training]).to(args.device), can_flip, args.variations
    )
    print(f"latents: mean {float(latents.float().mean()):.3f}, spread {float(latents.float().std()):.3f}", flush=True)
    held = [i for i, record in enumerate(records) if record["role"] == "validation"]
    held_latents = encode_plain(image_model, pictures[held], args.device)
    held_tokens = torch.from_numpy(tokens["fixed"][held]).long().to(args.device)
    denoiser, text = build_unet().to(args.device), build_text_encoder().to(args.device)
    scheduler = build_noise_scheduler()
    if args.device == "cpu":
        from diffusers.models.attention_processor import AttnProcessor

        denoiser.set_attn_processor(AttnProcessor())  # nearly twice as fast backward as the fused one

    def validation():
        right, _ = train_networks.caption_losses(
            denoiser, text, scheduler, held_latents, held_tokens, held_tokens, draws=8
        )
        return float(right.mean())

    print(f"denoiser {parameter_count(denoiser)}, text {parameter_count(text)} parameters", flush=True)
    figures, best = train_networks.train_unet(
        denoiser,
        text,
        scheduler,
        latents,
        torch.from_numpy(tokens["training"][training]).to(args.device),
        weights,
        torch.from_numpy(tokens["empty"]).long().to(args.device),
        validation,
        batch_size=args.unet_batch_size,
        max_minutes=args.unet_minutes,
        max_steps=args.max_steps,
    )
    last = denoiser.state_dict(), text.state_dict()
    for name, state in zip(("unet_last", "text_last", "unet_best", "text_best"), (*last, *best)):
        save_states(args.results, name, state)
    write_json(args.results / "unet_training.json", figures)
    print("denoiser:", figures, flush=True)


@torch.no_grad()
def encode_plain(image_model: torch.nn.Module, pictures_uint8: np.ndarray, device: str) -> torch.Tensor:
    """Scaled latents of pictures as they are. Returns float (N, 4, 8, 8)."""
    rgb = on_white(torch.from_numpy(pictures_uint8).to(device))
    return torch.cat([image_model.encode(part).latent_dist.mean for part in rgb.split(128)]) * LATENT_SCALE


def export(args: Namespace) -> None:
    """Weights and tokenizer -> a StableDiffusionPipeline folder; the held-out pictures."""
    from diffusers import StableDiffusionPipeline
    from evaluate_tiny_base import save_heldout
    from transformers import CLIPTokenizer

    image_model = load_states(args, "vae", build_vae())
    denoiser = load_states(args, f"unet_{args.weights}", build_unet())
    text = load_states(args, f"text_{args.weights}", build_text_encoder())
    pipeline = StableDiffusionPipeline(
        image_model.half(),
        text.half(),
        CLIPTokenizer.from_pretrained(args.work_dir / "tokenizer"),
        denoiser.half(),
        build_noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(args.model_dir, safe_serialization=True)
    for path in (args.work_dir / "tokenizer").iterdir():  # newer transformers write tokenizer.json only
        (args.model_dir / "tokenizer" / path.name).write_bytes(path.read_bytes())
    records, pictures = read_records(args)
    save_heldout(args.model_dir, records, pictures)


def evaluate(args: Namespace) -> None:
    """Measure the exported folder: figures.json and grid.png beside the model."""
    from evaluate_tiny_base import measure, save_grid

    started = time.monotonic()
    figures = measure(args.model_dir, args.datasets)
    figures |= {"grid_seconds": save_grid(args.model_dir, GRID_PROMPTS)}
    for name in ("vae_training", "unet_training"):
        path = args.results / f"{name}.json"
        if path.is_file():
            figures[name] = json.loads(path.read_text("utf8"))
    write_json(args.model_dir / "figures.json", figures)
    print(json.dumps({k: v for k, v in figures.items() if not k.endswith("training")}, indent=1))
    print(f"evaluated in {time.monotonic() - started:.0f} s")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; device-dependent defaults are filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"any of {', '.join(STAGES)}; all of them by default")
    parser.add_argument("--work_dir", type=Path, default=HERE.parents[1] / "output/tiny_base")
    parser.add_argument("--results", type=Path, help="folder of the trained weights (default: the work folder)")
    parser.add_argument("--model_dir", type=Path, default=HERE)
    parser.add_argument("--datasets", type=Path, default=HERE.parents[1] / "dataset")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae_minutes", type=float, default=20.0)
    parser.add_argument("--unet_minutes", type=float, default=40.0)
    parser.add_argument("--vae_batch_size", type=int, help="default: 256 on a GPU, 16 on a CPU")
    parser.add_argument("--unet_batch_size", type=int, help="default: 1024 on a GPU, 64 on a CPU")
    parser.add_argument("--variations", type=int, help="moved copies of each picture; default: 32 on a GPU, 8 on a CPU")
    parser.add_argument("--max_steps", type=int, help="end a training stage after so many steps, to try it out")
    parser.add_argument("--weights", choices=("best", "last"), default="last", help="which denoiser to export")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the autoencoder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    unknown = [stage for stage in args.stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; the stages are {', '.join(STAGES)}")
    args.results = args.results or args.work_dir
    on_gpu = args.device != "cpu"
    args.vae_batch_size = args.vae_batch_size or (256 if on_gpu else 16)
    args.unet_batch_size = args.unet_batch_size or (1024 if on_gpu else 64)
    args.variations = args.variations or (32 if on_gpu else 8)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages asked for."""
    args = parse_arguments(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    for name in args.stages or STAGES:
        random.seed(args.seed)
        torch.manual_seed(args.seed)
        globals()[name](args)


if __name__ == "__main__":
    main()
