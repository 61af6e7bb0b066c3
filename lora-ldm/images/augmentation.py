"""From an image file to the array to train on: crop, scale, colour. Chance is the generator's."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import cv2
import numpy as np

from images.buckets import Placement, Size
from images.dataset_settings import SubsetSettings
from images.folders import ImageRecord
from images.loading import load_mask, load_rgb, resize, resize_mask

# Strengths of upstream's colour augmentation: a third of the images get a hue or gamma change.
COLOR_AUG_RATE = 0.33
HUE_SHIFT_LIMIT = 8  # of 180 in OpenCV's hue
GAMMA_LIMITS = (0.95, 1.05)

Box = tuple[int, int, int, int]  # (left, top, width, height), pixels


@dataclass
class Sample:
    """A picture at the size of its bucket.

    pixels: (H, W, 3) uint8.
    mask: (H, W) uint8 weight of the loss, or None.
    crop_left_top_px: corner of the cut in the scaled picture."""

    pixels: np.ndarray
    mask: Optional[np.ndarray]
    crop_left_top_px: tuple[int, int]


def load_sample(record: ImageRecord, placement: Placement, rng: Optional[random.Random] = None) -> Sample:
    """Loads, cuts and scales one picture; `rng` None: no augmentation (cached latents)."""
    subset = record.subset
    pixels, alpha = load_rgb(record.path)
    mask = mask_of(record, pixels, alpha)
    face = face_in_name(record.path) if rng and subset.face_crop_aug_range else None
    if face:
        box = face_window(record.size_px, face, rng.uniform(*subset.face_crop_aug_range), placement.bucket_px)
        pixels, mask = cut(pixels, box), cut(mask, box)
        left_top, scaled_px = (0, 0), placement.bucket_px
    else:
        left_top, scaled_px = crop_corner(placement, subset, rng), placement.resized_px
    box = (*left_top, *placement.bucket_px)
    pixels = cut(resize(pixels, scaled_px, subset.resize_interpolation), box)
    if mask is not None:
        mask = cut(resize_mask(mask, scaled_px), box)
    if rng and subset.color_aug:
        pixels = color_augmented(pixels, rng)
    return Sample(np.ascontiguousarray(pixels), mask, left_top)


def mask_of(record: ImageRecord, pixels: np.ndarray, alpha: Optional[np.ndarray]) -> Optional[np.ndarray]:
    """Loss weights (H, W) uint8 of a picture with masks: a mask picture, its alpha, or all 255."""
    height, width = pixels.shape[:2]
    if record.mask_path is not None:
        return load_mask(record.mask_path, (width, height))
    if not record.subset.alpha_mask:
        return None
    return alpha if alpha is not None else np.full((height, width), 255, np.uint8)


def cut(array: Optional[np.ndarray], box: Box) -> Optional[np.ndarray]:
    if array is None:
        return None
    left, top, width, height = box
    return array[top : top + height, left : left + width]


def crop_corner(placement: Placement, subset: SubsetSettings, rng: Optional[random.Random]) -> tuple[int, int]:
    """Left and top corner of the cut: the middle, or anywhere with `random_crop`."""
    if rng is None or not subset.random_crop:
        return placement.centre_crop_px
    return rng.randint(0, placement.slack_px[0]), rng.randint(0, placement.slack_px[1])


def color_augmented(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """With upstream's rate, a small hue shift or a small gamma change; (H, W, 3) uint8."""
    if rng.random() >= COLOR_AUG_RATE:
        return pixels
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(np.int16) + round(rng.uniform(-HUE_SHIFT_LIMIT, HUE_SHIFT_LIMIT))) % 180
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    levels = np.arange(256) / 255
    table = np.rint(levels ** rng.uniform(*GAMMA_LIMITS) * 255).astype(np.uint8)
    return table[pixels]


def face_in_name(path: Path) -> Optional[tuple[int, int, int, int]]:
    """(centre x, centre y, width, height) in pixels of the face, which upstream's tools write at
    the end of the file name (`cat_120_80_64_64.png`), or None."""
    parts = path.stem.split("_")[-4:]
    if len(path.stem.split("_")) < 5 or not all(part.isdecimal() for part in parts):
        return None
    centre_x, centre_y, width, height = (int(part) for part in parts)
    return (centre_x, centre_y, width, height) if width > 0 and height > 0 else None


def face_window(size_px: Size, face: tuple[int, int, int, int], factor: float, bucket_px: Size) -> Box:
    """Part around a face in the bucket's shape; its shorter side is `factor` times the face.
    It never leaves the picture, nor is smaller than the bucket where there is room."""
    width, height = size_px
    centre_x, centre_y, face_width, face_height = face
    largest = min(width / bucket_px[0], height / bucket_px[1])  # scale of the largest window that fits
    wanted = max(face_width, face_height) * factor / min(bucket_px)
    scale = min(largest, max(1.0, wanted))
    box_width, box_height = max(1, int(bucket_px[0] * scale)), max(1, int(bucket_px[1] * scale))
    left = min(max(0, centre_x - box_width // 2), width - box_width)
    top = min(max(0, centre_y - box_height // 2), height - box_height)
    return left, top, box_width, box_height
