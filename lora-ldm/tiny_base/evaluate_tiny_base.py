"""Figures and the grid of pictures of the exported base, all from the committed folder alone."""

import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tiny_models import LATENT_SCALE, parameter_count, tokenize
from train_networks import caption_losses, psnr_db, shuffled_positions

HELDOUT_ROLES = ("new_concept", "new_picture")
TILES_A_ROW = 16
SAMPLING_STEPS, GUIDANCE = 20, 5.0


def load_pipeline(model_dir: Path) -> Any:
    """The folder as StableDiffusionPipeline in float32, offline, without progress bars."""
    from diffusers import StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor

    pipeline = StableDiffusionPipeline.from_pretrained(model_dir, local_files_only=True, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.set_attn_processor(AttnProcessor())
    return pipeline


def save_heldout(model_dir: Path, records: list[dict], pictures_uint8: np.ndarray) -> None:
    """Write the pictures never trained on, skin tone copies left out: heldout.png, heldout.json."""
    from emoji_pictures import on_white

    chosen = [i for i, r in enumerate(records) if r["role"] in HELDOUT_ROLES and not r["is_tone_variant"]]
    rows = math.ceil(len(chosen) / TILES_A_ROW)
    sheet = Image.new("RGB", (TILES_A_ROW * 64, rows * 64), "white")
    for place, index in enumerate(chosen):
        tile = on_white(Image.fromarray(pictures_uint8[index]))
        sheet.paste(tile, (place % TILES_A_ROW * 64, place // TILES_A_ROW * 64))
    sheet.save(Path(model_dir) / "heldout.png", optimize=True)
    kept = [{name: records[i][name] for name in ("caption", "concept", "style", "role")} for i in chosen]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in kept)
    (Path(model_dir) / "heldout.json").write_text(f"[\n{lines}\n]\n", encoding="utf8")


def read_heldout(model_dir: Path) -> tuple[list[dict], torch.Tensor]:
    """Returns (rows, pictures): list of dicts and float (N, 3, 64, 64) in [-1, 1]."""
    rows = json.loads((Path(model_dir) / "heldout.json").read_text("utf8"))
    with Image.open(Path(model_dir) / "heldout.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    tiles = pixels.reshape(pixels.shape[0] // 64, 64, TILES_A_ROW, 64, 3).swapaxes(1, 2).reshape(-1, 64, 64, 3)
    return rows, to_tensor(tiles[: len(rows)])


def to_tensor(pixels_uint8: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels_uint8)).permute(0, 3, 1, 2).float() / 127.5 - 1


def read_folder(folder: Path) -> torch.Tensor | None:
    """All 64 px pictures under a folder as one tensor (N, 3, 64, 64), or None."""
    paths = sorted(Path(folder).glob("**/*.png"))
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in paths if "512px" not in path.parts]
    return to_tensor(np.stack(pixels)) if pixels else None


@torch.no_grad()
def encode(vae: torch.nn.Module, rgb: torch.Tensor) -> torch.Tensor:
    """Scaled latents (N, 4, 8, 8)."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in rgb.split(64)]) * LATENT_SCALE


def caption_gaps(pipeline: Any, latents: torch.Tensor, rows: list[dict], draws: int = 4) -> dict:
    """How much higher the denoising loss is with shuffled captions than with the right ones.

    Returns {which pictures: {"right", "shuffled", "gap_percent", "pictures"}} for all, for each
    kind of held-out picture, and with captions shuffled among pictures of the same style only,
    where the name of the style cannot help."""
    tokens = tokenize(pipeline.tokenizer, [row["caption"] for row in rows])
    concepts, styles = [row["concept"] for row in rows], [row["style"] for row in rows]
    gaps = {}
    for groups in (None, styles):
        other = tokens[shuffled_positions(concepts, 0, groups)]
        losses = caption_losses(pipeline.unet, pipeline.text_encoder, pipeline.scheduler, latents, tokens, other, draws)
        for role in (None, *HELDOUT_ROLES):
            members = [i for i, row in enumerate(rows) if role in (None, row["role"])]
            right, shuffled = (float(loss[members].mean()) for loss in losses)
            name = (role or "all") + (", shuffled within the style" if groups else "")
            gaps[name] = {
                "right": round(right, 4),
                "shuffled": round(shuffled, 4),
                "gap_percent": round(100 * (shuffled / right - 1), 1),
                "pictures": len(members),
            }
    return gaps


def measure(model_dir: Path, dataset_folder: Path) -> dict:
    """All figures of the exported folder.

    Returns parameters and bytes, the autoencoder's PSNR a style, caption gap a kind of picture."""
    pipeline = load_pipeline(model_dir)
    rows, rgb = read_heldout(model_dir)
    weights = [path for path in Path(model_dir).glob("*/*.safetensors")]
    figures = {
        "parameters": {name: parameter_count(getattr(pipeline, name)) for name in ("vae", "unet", "text_encoder")},
        "model_bytes": sum(path.stat().st_size for path in weights),
        "psnr_db": {},
    }
    for style in sorted({row["style"] for row in rows}):
        members = [i for i, row in enumerate(rows) if row["style"] == style]
        figures["psnr_db"][f"{style}, held out"] = round(psnr_db(pipeline.vae, rgb[members]), 2)
    for name in ("portraits", "stills", "landscape", "architecture"):
        pictures = read_folder(Path(dataset_folder) / name)
        if pictures is not None:
            figures["psnr_db"][f"dataset/{name}"] = round(psnr_db(pipeline.vae, pictures), 2)
    figures["caption_gap"] = caption_gaps(pipeline, encode(pipeline.vae, rgb), rows)
    figures["seconds_a_picture"] = seconds_a_picture(pipeline)
    return figures


def generate_batch(pipeline: Any, prompts: Iterable[str], seed: int) -> list[Image.Image]:
    """One 64 px picture a prompt, all of the same seed, with the settings of all figures."""
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    return pipeline(
        list(prompts),
        height=64,
        width=64,
        num_inference_steps=SAMPLING_STEPS,
        guidance_scale=GUIDANCE,
        generator=generators,
    ).images


def generate(pipeline: Any, prompt: str, seed: int) -> Image.Image:
    """One 64 px picture with the settings used for all figures."""
    return generate_batch(pipeline, [prompt], seed)[0]


def seconds_a_picture(pipeline: Any, repeats: int = 5) -> dict:
    """Median wall and processor time of one picture at these settings, number of threads."""
    generate(pipeline, "red heart", 0)
    wall, processor = [], []
    for seed in range(repeats):
        started = time.perf_counter(), time.process_time()
        generate(pipeline, "red heart", seed)
        wall.append(time.perf_counter() - started[0])
        processor.append(time.process_time() - started[1])
    return {
        "wall": round(sorted(wall)[repeats // 2], 2),
        "processor": round(sorted(processor)[repeats // 2], 2),
        "threads": torch.get_num_threads(),
        "steps": SAMPLING_STEPS,
    }


def save_grid(
    model_dir: Path, prompts: Sequence[str], columns: int = 8, zoom: int = 2, name: str = "grid.png"
) -> float:
    """One picture a prompt, first seed, no choosing. Writes the labelled grid; -> seconds."""
    pipeline = load_pipeline(model_dir)
    side, text_px = 64 * zoom, 16
    rows = math.ceil(len(prompts) / columns)
    grid = Image.new("RGB", (columns * side, rows * (side + text_px)), "white")
    draw = ImageDraw.Draw(grid)
    started = time.perf_counter()
    for place, (prompt, picture) in enumerate(zip(prompts, generate_batch(pipeline, prompts, seed=0))):
        left, top = place % columns * side, place // columns * (side + text_px)
        grid.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left, top))
        draw.text((left + 4, top + side + 2), prompt[:22], fill="black")
    grid.save(Path(model_dir) / name, optimize=True)
    return round(time.perf_counter() - started, 1)
