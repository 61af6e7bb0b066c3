"""What pictures have in common, by an image encoder or by the latents of the base's VAE.

The figures are cosines of feature vectors: likeness as DreamBooth's evaluation takes it (Ruiz et
al. 2023, section 4.1, the mean over pairs), copying as the distance to the nearest, and drift."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import normalize

from base.sd import SDModel
from es_lora.command_line import is_out_of_memory
from images.folders import IMAGE_EXTENSIONS
from images.loading import UnreadableImageError, open_image, to_rgb_and_alpha

MOST_TRAINING_PICTURES = 300  # evenly of them; a mean of more says the same
MOST_SIDE_PX = 512  # of what the VAE encodes for a comparison
Features = torch.Tensor  # (N, D), each row of norm 1


@dataclass
class Encoder:
    """pictures -> Features; `about`: which one it is, for the page."""

    about: str
    encode: Callable[[Sequence[Image.Image]], Features]


def vae_encoder(model: SDModel) -> Encoder:
    """Pictures as the latents of the base's own VAE, cut to a square of its side and flattened."""
    side = min(model.unet.config.sample_size * model.vae_scale, MOST_SIDE_PX)

    @torch.no_grad()
    def encode(pictures: Sequence[Image.Image]) -> Features:
        rows = []
        for picture in pictures:
            square = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 127.5 - 1  # (1, 3, H, W)
            latents = model.vae.encode(pixels.to(model.vae.device, model.vae.dtype)).latent_dist.mode()
            rows.append(latents.float().flatten(1).cpu())
        return normalize(torch.cat(rows), dim=1)

    return Encoder(f"the latents of the base's own VAE at {side} px, which say more of layout than of meaning", encode)


def loaded_encoder(place: str, device: Any) -> Encoder:
    """An image encoder of transformers (CLIP, SigLIP, DINOv2, ...). Raises ValueError."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor, model = AutoImageProcessor.from_pretrained(place), AutoModel.from_pretrained(place)
    except Exception as error:  # whatever it is, the folder is no such encoder
        if is_out_of_memory(error):
            raise
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--encoder {place} is no image encoder of transformers ({told:.200})") from error
    model.eval().to(device)

    @torch.no_grad()
    def encode(pictures: Sequence[Image.Image]) -> Features:
        rows = []
        for picture in pictures:
            pixels = processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"].to(device)
            rows.append(_vector(model, pixels).float().flatten(1).cpu())
        return normalize(torch.cat(rows), dim=1)

    return Encoder(f"those of the encoder {place}", encode)


def _vector(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(1, D): the embedding that an encoder has for a whole picture."""
    has_text = hasattr(model, "get_image_features")
    out = model.get_image_features(pixel_values=pixels) if has_text else model(pixel_values=pixels)
    if isinstance(out, torch.Tensor):
        return out
    for name in ("image_embeds", "pooler_output"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    return out.last_hidden_state[:, 0]


def training_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder and of those below it, evenly at most MOST_TRAINING_PICTURES.
    Raises FileNotFoundError, or ValueError where it holds none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--training_data {folder} is no folder; give the one with the training pictures")
    inside = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS)
    found = [path for path in inside if path.is_file() and not path.name.startswith(".")]
    if not found:
        raise ValueError(f"--training_data {folder} holds no pictures")
    return found[:: -(-len(found) // MOST_TRAINING_PICTURES)]


@dataclass
class TrainingSet:
    """The features of the training pictures and their names."""

    names: list[str]
    features: Features

    def likeness(self, features: Features) -> float:
        """Mean cosine over all pairs of a picture and a training picture."""
        return (features @ self.features.T).mean().item()

    def nearest(self, features: Features) -> list[tuple[float, str]]:
        """(1 - cosine, name) of the nearest training picture of each."""
        closest = (features @ self.features.T).max(dim=1)
        return [(1 - value, self.names[at]) for value, at in zip(closest.values.tolist(), closest.indices.tolist())]

    def among_themselves(self) -> tuple[Optional[float], Optional[float]]:
        """(likeness, nearest) of training pictures to the others; None for a single one."""
        count = len(self.names)
        if count < 2:
            return None, None
        cosines = (self.features @ self.features.T).masked_select(~torch.eye(count, dtype=torch.bool))
        cosines = cosines.view(count, count - 1)
        return cosines.mean().item(), (1 - cosines.max(dim=1).values).mean().item()


def encode_training_set(paths: Sequence[Path], encoder: Encoder) -> tuple[TrainingSet, list[str]]:
    """(TrainingSet, names of pictures that cannot be read). Raises ValueError where none can."""
    names, rows, unread = [], [], []
    for path in paths:
        try:
            rows.append(encoder.encode([to_rgb_and_alpha(open_image(path))[0]]))
            names.append(path.name)
        except UnreadableImageError:
            unread.append(path.name)
    if not rows:
        raise ValueError(f"none of the {len(paths)} training pictures can be read, such as {paths[0]}")
    return TrainingSet(names, torch.cat(rows)), unread


def drift(features: Features, of_base: Features) -> float:
    """Mean of 1 - cosine between pictures of the same prompts and seeds with and without a LoRA."""
    return (1 - (features * of_base).sum(dim=1)).mean().item()
