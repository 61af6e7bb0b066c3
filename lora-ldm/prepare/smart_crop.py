"""Where to cut a picture: in the middle, around faces, or where its edges or its entropy are.

The cut has the shape asked for and is as large as the picture allows: only its position is chosen.
Nothing is invented here: faces come from OpenCV's YuNet (where its model file is given) or
scikit-image's cascade, edges, skin and colours from smartcrop.py, entropy from scikit-image.

    python lora-ldm/prepare/smart_crop.py photos --size 512 --method faces  # prints every cut
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Callable, Optional

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from images.buckets import Size  # noqa: E402
from images.dataset_settings import checked_resolution  # noqa: E402
from images.folders import CAPTION_EXTENSIONS, image_files  # noqa: E402
from images.loading import load_rgb, resize  # noqa: E402
from settings.entry_point import ended  # noqa: E402

Box = tuple[int, int, int, int]  # (left, top, width, height), pixels
METHODS = ("centre", "faces", "edges", "entropy", "smart")
ANALYSIS_PX = 512  # longest side of the reduced picture that is looked at
SMALLEST_FACE = 0.06  # of the shorter side of the picture
MISSING_PACKAGE = "smart crops need extra packages: pip install -r lora-ldm/requirements-extras.txt"


def crop_box(rgb: np.ndarray, shape_px: Size, method: str = "smart", find_faces: Optional[Callable] = None) -> Box:
    """Largest box of the shape `shape_px` in a picture.

    rgb: (H, W, 3) uint8.
    shape_px: (width, height); only their ratio counts.
    method: one of METHODS; `smart` is `faces`, and where there are none `edges`.
    find_faces: picture -> list of Box; a face_finder() if left out."""
    if method not in METHODS:
        raise ValueError(f"crop method {method!r} must be one of {', '.join(METHODS)}")
    height, width = rgb.shape[:2]
    scale = min(width / shape_px[0], height / shape_px[1])
    box_px = max(1, int(shape_px[0] * scale + 1e-6)), max(1, int(shape_px[1] * scale + 1e-6))
    centre = (width / 2, height / 2)
    if box_px != (width, height) and method != "centre":
        centre = centre_of_interest(rgb, box_px, method, find_faces) or centre
    left, top = (
        int(min(max(0, centre[axis] - box_px[axis] / 2), limit - box_px[axis]))
        for axis, limit in enumerate((width, height))
    )
    return left, top, box_px[0], box_px[1]


def centre_of_interest(
    rgb: np.ndarray, box_px: Size, method: str, find_faces: Optional[Callable]
) -> Optional[tuple[float, float]]:
    """(x, y) in pixels that the cut is to be centred on, or None for the middle."""
    if method in ("faces", "smart"):
        faces = (find_faces or face_finder())(rgb)
        if faces:
            return centre_of_faces(faces, box_px)
        if method == "faces":
            return None
    small, factor = reduced(rgb)
    box_small = max(1, round(box_px[0] * factor)), max(1, round(box_px[1] * factor))
    x, y = entropy_centre(small, box_small) if method == "entropy" else edges_centre(small, box_small)
    return x / factor, y / factor


def centre_of_faces(faces: list[Box], box_px: Size) -> tuple[float, float]:
    """Middle of all faces if they fit into the cut together, else of the largest."""
    left, top = min(face[0] for face in faces), min(face[1] for face in faces)
    right, bottom = max(face[0] + face[2] for face in faces), max(face[1] + face[3] for face in faces)
    if right - left > box_px[0] or bottom - top > box_px[1]:
        left, top, width, height = max(faces, key=lambda face: face[2] * face[3])
        right, bottom = left + width, top + height
    return (left + right) / 2, (top + bottom) / 2


def reduced(rgb: np.ndarray) -> tuple[np.ndarray, float]:
    """(picture of at most ANALYSIS_PX, its scale)"""
    height, width = rgb.shape[:2]
    factor = min(1.0, ANALYSIS_PX / max(width, height))
    return resize(rgb, (max(1, round(width * factor)), max(1, round(height * factor))), None), factor


def edges_centre(rgb: np.ndarray, box_px: Size) -> tuple[float, float]:
    """Centre of smartcrop.py's best cut: edges, skin, saturated colours, few at its border."""
    try:
        import smartcrop
    except ImportError:
        raise ValueError(MISSING_PACKAGE) from None
    from PIL import Image

    options = {"min_scale": 1.0, "max_scale": 1.0, "step": 4}
    best = smartcrop.SmartCrop().crop(Image.fromarray(rgb), *box_px, **options)["top_crop"]
    return best["x"] + best["width"] / 2, best["y"] + best["height"] / 2


def entropy_centre(rgb: np.ndarray, box_px: Size) -> tuple[float, float]:
    """Centre of the cut with the largest sum of local entropy."""
    try:
        from skimage.filters.rank import entropy
        from skimage.morphology import disk
    except ImportError:
        raise ValueError(MISSING_PACKAGE) from None
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    total = cv2.integral(entropy(grey, disk(5)))  # (H + 1, W + 1): sums of everything above and left
    width, height = box_px
    sums = total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
    # Among equal sums the middle one, so that an even picture is cut in its middle.
    ys, xs = np.nonzero(sums >= sums.max() - 1e-6 * max(1.0, sums.max()))
    middle = len(xs) // 2
    return xs[middle] + width / 2, ys[middle] + height / 2


def face_finder(model_path: Optional[str] = None) -> Callable[[np.ndarray], list[Box]]:
    """Function picture -> faces as boxes in its pixels.

    model_path: OpenCV's face_detection_yunet_*.onnx, which finds far more faces and fewer wrong
    ones; without it the frontal-face cascade in scikit-image.
    Raises ValueError: an unreadable model, or no scikit-image; FileNotFoundError: no such model."""
    if model_path:
        return yunet_finder(model_path)
    try:
        from skimage.data import lbp_frontal_face_cascade_filename
        from skimage.feature import Cascade
    except ImportError:
        raise ValueError(MISSING_PACKAGE) from None
    cascade = Cascade(lbp_frontal_face_cascade_filename())

    def find(rgb: np.ndarray) -> list[Box]:
        small, factor = reduced(rgb)
        shorter = min(small.shape[:2])
        smallest = max(24, int(shorter * SMALLEST_FACE))
        if shorter <= smallest:
            return []
        sizes = {"min_size": (smallest, smallest), "max_size": (shorter, shorter)}
        found = cascade.detect_multi_scale(small, scale_factor=1.1, step_ratio=1, **sizes)
        boxes = [(face["c"], face["r"], face["width"], face["height"]) for face in found]
        # The cascade takes small patterns for faces: what is much smaller than the largest goes.
        largest = max((box[2] for box in boxes), default=0)
        return [tuple(round(value / factor) for value in box) for box in boxes if box[2] >= 0.75 * largest]

    return find


def yunet_finder(model_path: str) -> Callable[[np.ndarray], list[Box]]:
    if not Path(model_path).is_file():
        raise FileNotFoundError(f"--face_model {model_path}: there is no such file")
    try:
        detector = cv2.FaceDetectorYN.create(str(model_path), "", (320, 320), score_threshold=0.7)
    except cv2.error as error:
        raise ValueError(f"--face_model {model_path} cannot be read as a YuNet model: {error}") from error

    def find(rgb: np.ndarray) -> list[Box]:
        small, factor = reduced(rgb)
        detector.setInputSize((small.shape[1], small.shape[0]))
        _, found = detector.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        rows = [] if found is None else found
        return [tuple(int(round(value / factor)) for value in row[:4]) for row in rows]

    return find


def copy_with_face(path: Path, faces: list[Box], folder: Path) -> None:
    """Copies a picture and its captions; the largest face's position goes to the end of the name,
    for --face_crop_aug_range (centre x, centre y, width, height). What is there already is kept."""
    stem = path.stem
    if faces:
        left, top, width, height = max(faces, key=lambda face: face[2] * face[3])
        stem += f"_{max(0, left + width // 2)}_{max(0, top + height // 2)}_{width}_{height}"
    for suffix in (path.suffix, *CAPTION_EXTENSIONS):
        source, copy = path.with_suffix(suffix), folder / (stem + suffix)
        if source.is_file() and not copy.exists():
            shutil.copyfile(source, copy)


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="Prints where each picture of a folder would be cut.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="512", help="shape of the cut, one or two numbers: 512 or 512,768")
    parser.add_argument("--method", choices=METHODS, default="smart")
    parser.add_argument("--face_model", help="OpenCV's face_detection_yunet_*.onnx for better faces")
    copies = "also copy the pictures there, with the face in the file name for --face_crop_aug_range"
    parser.add_argument("--copy_with_faces", type=Path, metavar="FOLDER", help=copies)
    args = parser.parse_args(argv)
    return ended("smart_crop", lambda: print_cuts(args))


def print_cuts(args: argparse.Namespace) -> int:
    """A line a picture: name, left, top, width, height, faces; -> exit code 0.
    Raises FileNotFoundError without the folder, ValueError for a shape that is none."""
    if not args.folder.is_dir():
        raise FileNotFoundError(f"folder {args.folder} does not exist")
    shape_px = checked_resolution("--size", args.size)
    wants_faces = args.method in ("faces", "smart") or args.copy_with_faces
    find_faces = face_finder(args.face_model) if wants_faces else None
    print("picture\tleft\ttop\twidth\theight\tfaces")
    for path in image_files(args.folder):
        rgb, _ = load_rgb(path)
        faces = find_faces(rgb) if find_faces else []
        box = crop_box(rgb, shape_px, args.method, lambda _, faces=faces: faces)
        print(path.name, *box, faces, sep="\t")
        if args.copy_with_faces:
            args.copy_with_faces.mkdir(parents=True, exist_ok=True)
            copy_with_face(path, faces, args.copy_with_faces)
    return 0


if __name__ == "__main__":
    sys.exit(main())
