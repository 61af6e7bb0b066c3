"""Reads pictures as RGB arrays (and their masks), and brings them to the size of their bucket."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Optional

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from images.buckets import Size

# Pillow raises these for a damaged file; a decompression bomb is refused, too.
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError)
CV2_INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "linear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
}


MOST_PIXELS = 120_000_000  # of a picture: 360 MB once decoded, and several are at a time


class UnreadableImageError(ValueError):
    """A damaged file, or one that is no picture; the message names it."""


def open_image(path: Path) -> Image.Image:
    """The decoded first frame, upright as its EXIF orientation says.

    A picture of more than MOST_PIXELS is refused by its header, before a pixel is decoded. Raises
    UnreadableImageError, a ValueError that names the file, or FileNotFoundError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged EXIF block is no reason to leave a picture out
            with Image.open(path) as image:
                refuse_too_large(image.size)
                image.load()
                return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path} does not exist") from None
    except UnidentifiedImageError:
        raise UnreadableImageError(f"image {path} cannot be read: it is no picture in a known format") from None
    except IMAGE_ERRORS as error:
        raise UnreadableImageError(f"image {path} cannot be read: {error}") from error


def refuse_too_large(size_px: Size) -> None:
    """Raise ValueError where a picture of this size takes too much memory."""
    width, height = size_px
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"it is {width} x {height} px, and {MOST_PIXELS // 10**6} million pixels are the most: make it smaller"
        )


def to_eight_bit(image: Image.Image) -> Image.Image:
    """Grey levels of 16 or 32 bits, which Pillow would clip, scaled to 8; others unchanged."""
    if not (image.mode == "F" or image.mode.startswith("I")):
        return image
    levels = np.asarray(image, dtype=np.float64)
    if image.mode == "F" and levels.max() <= 1.0:
        levels = levels * 255
    elif image.mode.startswith("I;16") or levels.max() > 255:
        levels = levels / 257
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def to_rgb_and_alpha(image: Image.Image) -> tuple[Image.Image, Optional[Image.Image]]:
    """(RGB picture, alpha channel or None); what is transparent becomes white."""
    image = to_eight_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    flat = Image.new("RGB", rgba.size, (255, 255, 255))
    flat.paste(rgba, mask=alpha)
    return flat, alpha


def load_rgb(path: Path) -> tuple[np.ndarray, Optional[np.ndarray]]:
    """(RGB (H, W, 3) uint8, alpha (H, W) uint8 or None) of a file. ValueError with its name."""
    rgb, alpha = to_rgb_and_alpha(open_image(path))
    return np.array(rgb), None if alpha is None else np.array(alpha)


def load_mask(path: Path, size_px: Size) -> np.ndarray:
    """Red channel of a mask picture as (H, W) uint8, scaled to the size of its image."""
    rgb, _ = load_rgb(path)
    return resize_mask(np.ascontiguousarray(rgb[:, :, 0]), size_px)


def resize(array: np.ndarray, size_px: Size, interpolation: Optional[str]) -> np.ndarray:
    """(H, W, 3) or (H, W) uint8 at another size. Without a named interpolation: area averaging
    where the picture shrinks in both directions, Lanczos otherwise."""
    height, width = array.shape[:2]
    if (width, height) == tuple(size_px):
        return array
    if interpolation is None:
        interpolation = "area" if size_px[0] <= width and size_px[1] <= height else "lanczos"
    if interpolation == "lanczos":
        # Pillow's filter widens with the reduction: no aliasing; OpenCV's has a fixed width.
        return np.array(Image.fromarray(array).resize(size_px, Image.Resampling.LANCZOS))
    return cv2.resize(array, size_px, interpolation=CV2_INTERPOLATIONS[interpolation])


def resize_mask(mask: np.ndarray, size_px: Size) -> np.ndarray:
    """(H, W) uint8 at another size, without the overshoot of the sharper filters."""
    shrinks = size_px[0] <= mask.shape[1] and size_px[1] <= mask.shape[0]
    return resize(mask, size_px, "area" if shrinks else "bilinear")


def file_fingerprint(path: Path) -> str:
    """Size and time of modification: enough to notice that a file was replaced or edited."""
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"
