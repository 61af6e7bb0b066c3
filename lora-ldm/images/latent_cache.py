"""Latents of images that do not vary from epoch to epoch, kept in memory or as npz files.

An entry carries a key of everything it depends on - image, mask, VAE, size, scaling -, so that a
changed one is noticed and computed anew. Entries appear whole or not at all."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from images.buckets import Placement
from images.folders import ImageRecord
from images.loading import file_fingerprint

logger = logging.getLogger(__name__)

FORMAT = "es-lora-latents/1"


@dataclass
class CachedLatents:
    """Attributes:
    latents: (4, H/8, W/8) float32, scaled as the U-Net takes them.
    flipped: the same of the mirrored picture, or None.
    mask: (H, W) uint8, or None."""

    latents: np.ndarray
    flipped: Optional[np.ndarray] = None
    mask: Optional[np.ndarray] = None


def cache_key(record: ImageRecord, placement: Placement, vae_key: str) -> str:
    """Everything that the latents of an image depend on."""
    subset = record.subset
    mask = file_fingerprint(record.mask_path) if record.mask_path else str(subset.alpha_mask)
    sizes = f"{placement.bucket_px} of {placement.resized_px}"
    parts = [FORMAT, vae_key, file_fingerprint(record.path), mask, sizes, str(subset.resize_interpolation)]
    return " | ".join(parts)


class LatentFiles:
    """npz files beside the images, or in one cache folder.

    vae_key: names the VAE (a hash of its weights); another VAE makes every entry stale.
    folder: cache folder, or None for beside the images."""

    def __init__(self, vae_key: str, folder: Optional[Path] = None):
        self.vae_key = vae_key
        self.folder = Path(folder) if folder else None

    def path(self, record: ImageRecord, placement: Placement) -> Path:
        width, height = placement.bucket_px
        name = f"{record.path.name}_{width:04d}x{height:04d}_latents.npz"
        if self.folder is None:
            return record.path.with_name(name)
        # Images of the same name in different folders must not share an entry.
        place = hashlib.sha256(str(record.path.resolve().parent).encode()).hexdigest()[:12]
        return self.folder / f"{place}_{name}"

    def read(self, record: ImageRecord, placement: Placement) -> Optional[CachedLatents]:
        """The entry; None if missing, stale, without the flipped latents, or damaged (said)."""
        path = self.path(record, placement)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["key"]) != cache_key(record, placement, self.vae_key):
                    return None
                entry = CachedLatents(file["latents"], file.get("flipped"), file.get("mask"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("latent cache %s is damaged and is made anew: %s", path, error)
            return None
        if record.subset.flip_aug and entry.flipped is None:
            return None
        return entry

    def write(self, record: ImageRecord, placement: Placement, entry: CachedLatents) -> None:
        """Raises ValueError with the way out where the folder cannot be written to."""
        path = self.path(record, placement)
        arrays = {"key": np.array(cache_key(record, placement, self.vae_key)), "latents": entry.latents}
        if entry.flipped is not None:
            arrays["flipped"] = entry.flipped
        if entry.mask is not None:
            arrays["mask"] = entry.mask
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            message = f"latent cache {path} cannot be written ({error.strerror}): use --cache_latents without _to_disk"
            raise ValueError(message) from error
