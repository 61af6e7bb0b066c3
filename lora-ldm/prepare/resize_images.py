"""From photographs to training images: upright, 8-bit RGB, scaled and cut to size or buckets.

    python lora-ldm/prepare/resize_images.py photos data/10_mycat --size 512 --crop smart
    python lora-ldm/prepare/resize_images.py photos data/10_mycat --size 512 --buckets --dry_run

Originals are never touched, nothing is overwritten without --overwrite; captions come along.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Callable, Optional, TextIO

import numpy as np
from PIL import Image, ImageCms
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from images.buckets import BucketSelector, Size  # noqa: E402
from images.dataset_settings import INTERPOLATIONS, checked_resolution  # noqa: E402
from images.folders import CAPTION_EXTENSIONS, REPEAT_FOLDER, spelled  # noqa: E402
from images.loading import UnreadableImageError, open_image, resize, resize_mask, to_rgb_and_alpha  # noqa: E402
from prepare.caption_files import find_pictures  # noqa: E402
from prepare.smart_crop import METHODS, Box, crop_box, face_finder  # noqa: E402
from settings.entry_point import ended  # noqa: E402

HEIF_EXTENSIONS = (".heic", ".heif")
FORMATS = {"png": {}, "jpg": {"quality": 95, "subsampling": 0}, "webp": {"quality": 95}}
DEFAULT_DUPLICATE_BITS = 4  # of the 64 bits of a difference hash
DUPLICATE_COLOUR_LEVELS = 12  # mean difference of 8 x 8 colours, of 255


@dataclass
class Report:
    """What was done, for the summary at the end."""

    written: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)  # were there already
    enlarged: list[Path] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    duplicates: list[tuple[Path, Path]] = field(default_factory=list)  # (picture, the earlier one it resembles)
    sizes: Counter = field(default_factory=Counter)
    hashes: list[tuple] = field(default_factory=list)  # (picture, difference hash, 8 x 8 colours)


def parse_arguments(argv: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", type=Path, help="folder with pictures")
    add("output", type=Path, help="folder for the training images, such as data/10_mycat")
    add("--size", default="512", help="training resolution, one or two numbers: 512 or 512,768 (default 512)")
    add(
        "--crop",
        choices=METHODS,
        default="centre",
        help="what to cut around; smart = faces, else edges (default centre)",
    )
    add(
        "--buckets",
        action="store_true",
        help="keep the shapes: scale and cut to the aspect-ratio bucket of each picture",
    )
    add("--min_bucket_reso", type=int, default=256)
    add("--max_bucket_reso", type=int, default=1024)
    add("--bucket_reso_steps", type=int, default=64)
    add("--bucket_no_upscale", action="store_true", help="with --buckets, never enlarge a picture")
    add("--resize_interpolation", choices=INTERPOLATIONS, help="default: area for smaller, Lanczos for larger")
    add("--format", choices=sorted(FORMATS), default="png")
    add(
        "--keep_alpha",
        action="store_true",
        help="keep transparency for --alpha_mask (png, webp); else it becomes white",
    )
    add("--recursive", action="store_true", help="take subfolders, too, and keep their structure")
    add("--face_model", help="OpenCV's face_detection_yunet_*.onnx for better faces")
    bits = "report pictures whose hashes differ in at most N of 64 bits (default %(default)s, -1: do not look)"
    add("--duplicate_bits", type=int, default=DEFAULT_DUPLICATE_BITS, metavar="N", help=bits)
    add("--skip_duplicates", action="store_true", help="write only the first picture of near-duplicates")
    add("--overwrite", action="store_true", help="replace files in the output folder")
    add("--dry_run", action="store_true", help="write nothing, only say what would be done")
    return parser.parse_args(argv)


def validated(args: argparse.Namespace) -> BucketSelector:
    """The placement of every picture. Raises ValueError or FileNotFoundError with all problems."""
    problems = []
    if not args.input.is_dir():
        raise FileNotFoundError(f"input folder {args.input} does not exist")
    if args.output.resolve() == args.input.resolve():
        problems.append("the output folder must be another one than the input folder")
    if args.output.exists() and not args.output.is_dir():
        problems.append(f"output {args.output} is a file, it must be a folder")
    if args.keep_alpha and args.format == "jpg":
        problems.append("--keep_alpha needs --format png or webp, jpg has no transparency")
    if not -1 <= args.duplicate_bits <= 64:
        problems.append(f"--duplicate_bits {args.duplicate_bits} must be from -1 to 64")
    selector = None
    try:
        limits = {"min_px": args.min_bucket_reso, "max_px": args.max_bucket_reso, "step_px": args.bucket_reso_steps}
        size_px = checked_resolution("--size", args.size)
        selector = BucketSelector(size_px, enable_bucket=args.buckets, no_upscale=args.bucket_no_upscale, **limits)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return selector


def pictures_to_resize(args: argparse.Namespace) -> list[Path]:
    """Pictures of the input folder, the output folder left out. Raises ValueError if there are
    none."""
    pictures = find_pictures(args.input, args.recursive, HEIF_EXTENSIONS, args.output)
    if any(path.suffix.lower() in HEIF_EXTENSIONS for path in pictures):
        register_heif()
    return pictures


def register_heif() -> None:
    try:
        import pillow_heif
    except ImportError:
        raise ValueError("HEIC pictures need the package pillow-heif: pip install pillow-heif") from None
    pillow_heif.register_heif_opener()


def output_paths(pictures: list[Path], args: argparse.Namespace) -> dict[Path, Path]:
    """Where each picture goes; a name that two would share gets the old extension added."""
    taken, targets = set(), {}
    for path in pictures:
        target = args.output / path.relative_to(args.input).with_suffix(f".{args.format}")
        if target in taken:
            target = target.with_name(f"{path.stem}_{path.suffix[1:].lower()}.{args.format}")
        taken.add(target)
        targets[path] = target
    return targets


def to_srgb(image: Image.Image) -> Image.Image:
    """The picture in sRGB where it carries another colour profile (phones, print)."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except ImageCms.PyCMSError:
        return image  # a profile of another kind of picture; its numbers are taken as they are


def cut_and_scale(array: np.ndarray, box: Box, size_px: Size, interpolation: Optional[str]) -> np.ndarray:
    left, top, width, height = box
    part = np.ascontiguousarray(array[top : top + height, left : left + width])
    return resize_mask(part, size_px) if array.ndim == 2 else resize(part, size_px, interpolation)


def save_whole(image: Image.Image, path: Path, options: dict) -> None:
    """Writes a picture aside and renames it, so that a half-written one is never met."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            image.save(file, format={"jpg": "JPEG"}.get(path.suffix[1:], path.suffix[1:].upper()), **options)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def nearest_earlier(path: Path, image: Image.Image, report: Report, max_bits: int) -> Optional[Path]:
    """An earlier picture whose difference hash is within `max_bits`; notes the hash of this one."""
    if max_bits < 0:
        return None
    try:
        import imagehash
    except ImportError:
        raise ValueError("near-duplicates need ImageHash: pip install imagehash, or --duplicate_bits -1") from None
    fingerprint = imagehash.dhash(image)
    colours = np.asarray(image.resize((8, 8), Image.Resampling.BOX)).astype(np.int16)  # the hash sees brightness only
    match = None
    for earlier, other, other_colours in report.hashes:
        if fingerprint - other <= max_bits and np.abs(colours - other_colours).mean() <= DUPLICATE_COLOUR_LEVELS:
            match = earlier
            break
    report.hashes.append((path, fingerprint, colours))
    return match


def convert(
    path: Path,
    target: Path,
    args: argparse.Namespace,
    selector: BucketSelector,
    find_faces: Callable | None,
    report: Report,
) -> None:
    """One picture: load, place, cut, scale, write; notes the outcome in the report."""
    rgb_image, alpha_image = to_rgb_and_alpha(to_srgb(open_image(path)))
    twin = nearest_earlier(path, rgb_image, report, args.duplicate_bits)
    if twin is not None:
        report.duplicates.append((path, twin))
        if args.skip_duplicates:
            return
    if target.exists() and not args.overwrite:
        report.kept.append(target)
        return
    size_px = selector.place(rgb_image.size).bucket_px
    rgb = np.array(rgb_image)
    box = crop_box(rgb, size_px, args.crop, find_faces)
    report.sizes[size_px] += 1
    if box[2] < size_px[0] or box[3] < size_px[1]:
        report.enlarged.append(path)
    report.written.append(target)
    if args.dry_run:
        return
    result = Image.fromarray(cut_and_scale(rgb, box, size_px, args.resize_interpolation))
    if args.keep_alpha and alpha_image is not None:
        result.putalpha(Image.fromarray(cut_and_scale(np.array(alpha_image), box, size_px, None)))
    save_whole(result, target, FORMATS[args.format])
    copy_captions(path, target, args.overwrite)


def copy_captions(path: Path, target: Path, overwrite: bool) -> None:
    for suffix in CAPTION_EXTENSIONS:
        source, copy = spelled(path.with_suffix(suffix)), target.with_suffix(suffix)
        if source and (overwrite or not copy.exists()):
            shutil.copyfile(source, copy)


def print_report(report: Report, total: int, args: argparse.Namespace) -> None:
    verb = "would write" if args.dry_run else "wrote"
    print(f"{verb} {len(report.written)} of {total} pictures to {args.output}")
    for size, count in sorted(report.sizes.items()):
        print(f"  {size[0]}x{size[1]}: {count}")
    if report.kept:
        print(f"{len(report.kept)} were there already and are kept (--overwrite replaces them)")
    print_list("enlarged, they are smaller than the training resolution", report.enlarged)
    pairs = [f"{path} resembles {twin}" for path, twin in report.duplicates]
    print_list("near-duplicates, left out" if args.skip_duplicates else "near-duplicates", pairs)
    print_list("damaged and left out", report.damaged, sys.stderr)
    if report.written and not REPEAT_FOLDER.fullmatch(args.output.resolve().name):
        name = args.output.resolve().name
        print(
            f"to train on them, name the folder <repeats>_<name>, such as 10_{name}, and give its parent as "
            "--train_data_dir"
        )


def print_list(title: str, items: list, file: TextIO = None) -> None:
    if items:
        print(f"{len(items)} {title}:", *(f"  {item}" for item in items), sep="\n", file=file)


def resize_folder(args: argparse.Namespace) -> Report:
    """Converts all pictures. Raises ValueError or FileNotFoundError before anything is written."""
    selector = validated(args)
    targets = output_paths(pictures_to_resize(args), args)
    find_faces: Optional[Callable] = face_finder(args.face_model) if args.crop in ("faces", "smart") else None
    report = Report()
    for path, target in tqdm(targets.items(), desc="resizing", unit="picture"):
        try:
            convert(path, target, args, selector, find_faces, report)
        except UnreadableImageError as error:
            report.damaged.append(str(error))
    print_report(report, len(targets), args)
    return report


def main(argv: Optional[list[str]] = None) -> int:
    """Exit code 0, or 2 for bad arguments or damaged pictures (all others are converted)."""
    args = parse_arguments(argv)
    return ended("resize_images", lambda: 2 if resize_folder(args).damaged else 0)


if __name__ == "__main__":
    sys.exit(main())
