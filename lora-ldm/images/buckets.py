"""Aspect-ratio buckets: the size a picture is trained at, how it is scaled and cut. Arithmetic.

The bucket list and the choice of the bucket follow the published behaviour of kohya's sd-scripts: a
data set falls into the same buckets there and here. All sizes are (width, height) in pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

Size = tuple[int, int]  # (width, height), pixels


@dataclass(frozen=True)
class Placement:
    """How one picture reaches its bucket: scale to `resized_px`, then cut `bucket_px` out of it."""

    bucket_px: Size
    resized_px: Size

    @property
    def slack_px(self) -> Size:
        """Pixels that the cut removes in each direction, both >= 0."""
        return self.resized_px[0] - self.bucket_px[0], self.resized_px[1] - self.bucket_px[1]

    @property
    def centre_crop_px(self) -> Size:
        """Left and top corner of the cut in the middle."""
        return self.slack_px[0] // 2, self.slack_px[1] // 2


def bucket_sizes(resolution_px: Size, min_px: int, max_px: int, step_px: int) -> list[Size]:
    """All bucket sizes whose area does not exceed that of `resolution_px`, sorted.

    For each width from `min_px` to `max_px` in steps, the tallest height (a multiple of `step_px`,
    at most `max_px`) that keeps the area; each also turned by 90 degrees; the square of that area.

    >>> bucket_sizes((64, 64), 32, 128, 32)
    [(32, 128), (64, 64), (128, 32)]
    """
    max_area = resolution_px[0] * resolution_px[1]
    square = int(math.sqrt(max_area) // step_px) * step_px
    sizes = {(square, square)}
    for width in range(min_px, max_px + 1, step_px):
        height = min(max_px, max_area // width // step_px * step_px)
        if height >= min_px:
            sizes.update([(width, height), (height, width)])
    return sorted(sizes)


class BucketSelector:
    """Finds the placement of a picture.

    resolution_px: training resolution; its area bounds every bucket.
    enable_bucket: without it every picture is scaled to cover `resolution_px` and cut to that.
    no_upscale: a picture smaller than the area keeps its size (cut down to multiples of `step_px`).
    Raises ValueError: sizes that contradict each other, all of them in one message."""

    def __init__(
        self,
        resolution_px: Size,
        *,
        enable_bucket: bool = False,
        min_px: int = 256,
        max_px: int = 1024,
        step_px: int = 64,
        no_upscale: bool = False,
    ):
        problems = size_problems(resolution_px, enable_bucket, min_px, max_px, step_px, no_upscale)
        if problems:
            raise ValueError("; ".join(problems))
        self.resolution_px = resolution_px
        self.enable_bucket = enable_bucket
        self.no_upscale = no_upscale
        self.step_px = step_px
        # Limits that are no multiples of the step are widened to the next ones, as upstream does.
        min_px = min_px // step_px * step_px
        max_px = -(-max_px // step_px) * step_px
        self.sizes = bucket_sizes(resolution_px, min_px, max_px, step_px) if enable_bucket else [resolution_px]

    def place(self, size_px: Size) -> Placement:
        """Placement of a picture of `size_px`."""
        if self.enable_bucket and self.no_upscale:
            placement = self._place_without_upscaling(size_px)
            if placement:
                return placement
        bucket = self._nearest_bucket(size_px)
        return Placement(bucket, covering_size(size_px, bucket))

    def _nearest_bucket(self, size_px: Size) -> Size:
        if size_px in self.sizes:
            return size_px
        ratio = size_px[0] / size_px[1]
        return min(self.sizes, key=lambda size: abs(size[0] / size[1] - ratio))

    def _place_without_upscaling(self, size_px: Size) -> Optional[Placement]:
        """None for a picture with a side below one step, which would have to be upscaled."""
        width, height = size_px
        max_area = self.resolution_px[0] * self.resolution_px[1]
        if width * height > max_area:
            resized = self._shrink_to_area(width / height, max_area)
        else:
            resized = size_px
        bucket = (resized[0] // self.step_px * self.step_px, resized[1] // self.step_px * self.step_px)
        return Placement(bucket, resized) if min(bucket) > 0 else None

    def _shrink_to_area(self, ratio: float, max_area: int) -> Size:
        """Size of this aspect ratio within `max_area` with one side a multiple of the step:
        whichever of the two choices distorts the ratio of the later cut least."""
        exact_width = math.sqrt(max_area * ratio)
        exact_height = max_area / exact_width
        width = self._round_down(exact_width)
        height = self._round_down(exact_height)
        by_width = (width, self._round_down(width / ratio)) if width else None
        by_height = (self._round_down(height * ratio), height) if height else None

        def distortion(size: Optional[Size]) -> float:
            return abs(size[0] / size[1] - ratio) if size and min(size) > 0 else math.inf

        if distortion(by_width) < distortion(by_height):
            return width, int(width / ratio + 0.5)
        return int(height * ratio + 0.5), height

    def _round_down(self, length_px: float) -> int:
        return int(length_px + 0.5) // self.step_px * self.step_px


def covering_size(size_px: Size, target_px: Size) -> Size:
    """Smallest size of the same shape that covers `target_px` in both directions."""
    width, height = size_px
    if width / height > target_px[0] / target_px[1]:
        return max(target_px[0], int(width * target_px[1] / height + 0.5)), target_px[1]
    return target_px[0], max(target_px[1], int(height * target_px[0] / width + 0.5))


def aspect_ratio_error(size_px: Size, bucket_px: Size) -> float:
    """Distance of two aspect ratios (`mean_img_ar_error` of the metadata is its mean)."""
    return abs(size_px[0] / size_px[1] - bucket_px[0] / bucket_px[1])


def size_problems(
    resolution_px: Size, enable_bucket: bool, min_px: int, max_px: int, step_px: int, no_upscale: bool
) -> list[str]:
    """Every contradiction among the sizes, each with its fix; empty if they fit together."""
    shown = f"{resolution_px[0]},{resolution_px[1]}"
    if min(resolution_px) < 8:
        return [f"resolution {shown} must be at least 8 pixels a side"]
    if not enable_bucket:
        if resolution_px[0] % 8 or resolution_px[1] % 8:
            return [f"resolution {shown} must be a multiple of 8, the VAE's reduction"]
        return []
    problems = []
    if step_px < 8 or step_px % 8:
        problems.append(f"bucket_reso_steps {step_px} must be a multiple of 8, the VAE's reduction")
    elif min(resolution_px) < step_px:
        problems.append(f"bucket_reso_steps {step_px} is larger than the resolution {shown}: lower it")
    if min_px < max(step_px, 1):
        problems.append(f"min_bucket_reso {min_px} must be at least bucket_reso_steps {step_px}")
    if not no_upscale:
        if min(resolution_px) < min_px:
            problems.append(f"min_bucket_reso {min_px} is larger than the resolution {shown}: lower it")
        if max(resolution_px) > max_px:
            problems.append(f"max_bucket_reso {max_px} is smaller than the resolution {shown}: raise it")
    return problems
