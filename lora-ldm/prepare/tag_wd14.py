"""Captions of tags by the WD14 taggers (SmilingWolf's ONNX models), beside each picture.

    python lora-ldm/prepare/tag_wd14.py data/10_mycat --always_first_tags mycat --remove_underscore
    python lora-ldm/prepare/tag_wd14.py data/10_mycat --model wd14/model.onnx --append_tags

The model and its selected_tags.csv come from the hub (--repo_id) or from files (--model, --tags).
Captions that exist are kept unless --append_tags or --overwrite says otherwise.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from es_lora.files import read_text, split_lines  # noqa: E402
from es_lora.inputs.hub import hub_answers  # noqa: E402
from images.loading import UnreadableImageError, load_rgb  # noqa: E402
from prepare.caption_files import caption_path, existing_caption, find_pictures, write_caption  # noqa: E402
from settings.entry_point import ended  # noqa: E402

DEFAULT_REPO = "SmilingWolf/wd-v1-4-convnext-tagger-v2"
# Categories of selected_tags.csv.
GENERAL, CHARACTER, RATING = 0, 4, 9
# Faces made of signs keep their underscores.
KEEP_UNDERSCORE = frozenset(
    "0_0 (o)_(o) +_+ +_- ._. <o>_<o> <|>_<|> =_= >_< 3_3 6_9 >_o @_@ ^_^ o_o u_u x_x |_| ||_||".split()
)


@dataclass
class Tag:
    name: str
    category: int


class Tagger:
    """An ONNX tagger: pictures in, one probability per row of selected_tags.csv out.

    Raises ValueError: the model cannot be loaded, is of another kind, or does not fit the csv."""

    def __init__(self, model_path: Path, tags: list[Tag]):
        try:
            import onnxruntime
        except ImportError:
            raise ValueError("tagging needs onnxruntime: pip install -r lora-ldm/requirements-extras.txt") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = [p for p in onnxruntime.get_available_providers() if p in ("CUDAExecutionProvider",)]
        try:
            self.session = onnxruntime.InferenceSession(
                str(model_path), options, providers=[*providers, "CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own exceptions share no narrower base class
            raise ValueError(f"--model {model_path} cannot be loaded as an ONNX model: {error}") from error
        self.input = self.session.get_inputs()[0]
        self.tags = tags
        shape = self.input.shape
        if len(shape) != 4 or shape[3] != 3 or not isinstance(shape[1], int) or shape[1] != shape[2]:
            raise ValueError(f"--model {model_path} takes {shape}, a WD14 tagger takes (batch, side, side, 3)")
        outputs = self.session.get_outputs()[0].shape[-1]
        if isinstance(outputs, int) and outputs != len(tags):
            raise ValueError(f"--model {model_path} has {outputs} outputs, but the csv has {len(tags)} tags")
        self.side_px = shape[1]
        self.fixed_batch = shape[0] if isinstance(shape[0], int) else None

    def probabilities(self, pictures: list[np.ndarray]) -> np.ndarray:
        """Pictures as `prepared` gives them -> (B, tags) float32."""
        size = self.fixed_batch or len(pictures)
        results = []
        for start in range(0, len(pictures), size):
            batch = np.stack(pictures[start : start + size])  # (B, side, side, 3)
            missing = size - len(batch)
            if missing:
                batch = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
            (output,) = self.session.run([self.session.get_outputs()[0].name], {self.input.name: batch})
            results.append(output[: size - missing])
        return np.concatenate(results)


def prepared(rgb: np.ndarray, side_px: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (side, side, 3) float32 as the taggers were trained: blue first, 0 to
    255, white padding around the picture in the middle of a square."""
    height, width = rgb.shape[:2]
    longest = max(height, width)
    square = np.full((longest, longest, 3), 255, np.uint8)
    top, left = (longest - height) // 2, (longest - width) // 2
    square[top : top + height, left : left + width] = rgb[:, :, ::-1]
    interpolation = cv2.INTER_AREA if longest > side_px else cv2.INTER_LANCZOS4
    return cv2.resize(square, (side_px, side_px), interpolation=interpolation).astype(np.float32)


def read_tags(path: Path) -> list[Tag]:
    """Rows of selected_tags.csv (`name`, `category`). Raises ValueError or FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(
            f"tag list {path} does not exist (it is the selected_tags.csv that belongs to the model)"
        )
    rows = list(csv.DictReader(split_lines(read_text(path))))
    try:
        tags = [Tag(row["name"], int(row["category"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tag list {path} must have the columns name and category ({error!r})") from error
    if not tags:
        raise ValueError(f"tag list {path} is empty")
    return tags


def chosen_tags(probabilities: np.ndarray, tags: list[Tag], args: argparse.Namespace) -> list[str]:
    """Tags of one picture in the order of the caption.

    probabilities: (tags,) float.
    args: thresholds, undesired tags, replacements and order."""
    thresholds = {GENERAL: args.general_threshold, CHARACTER: args.character_threshold}
    found: dict[int, list[str]] = {GENERAL: [], CHARACTER: []}
    for tag, probability in zip(tags, probabilities):
        if tag.category in thresholds and probability >= thresholds[tag.category]:
            found[tag.category].append(spelled(tag.name, args))
    first, second = (CHARACTER, GENERAL) if args.character_tags_first else (GENERAL, CHARACTER)
    names = found[first] + found[second]
    if args.use_rating_tags:
        ratings = [(p, tag.name) for tag, p in zip(tags, probabilities) if tag.category == RATING]
        names = [spelled(name, args) for _, name in [max(ratings)]] + names if ratings else names
    undesired = set(args.undesired_tags)
    return [name for name in dict.fromkeys(names) if name not in undesired]


def spelled(name: str, args: argparse.Namespace) -> str:
    if args.remove_underscore and name not in KEEP_UNDERSCORE:
        name = name.replace("_", " ")
    return args.tag_replacement.get(name, name)


def caption_text(names: list[str], existing: Optional[str], args: argparse.Namespace) -> str:
    """The caption: trigger words, what was there (when appending), new tags; each once."""
    old = []
    if existing is not None and args.append_tags:
        old = [tag.strip() for tag in existing.strip().split(args.caption_separator.strip() or None) if tag.strip()]
    return args.caption_separator.join(dict.fromkeys([*args.always_first_tags, *old, *names]))


def model_files(args: argparse.Namespace) -> tuple[Path, Path]:
    """(model.onnx, selected_tags.csv) from the command line or from the hub."""
    if args.model:
        if not args.model.is_file():
            raise FileNotFoundError(f"--model {args.model}: there is no such file")
        return args.model, args.tags or args.model.with_name("selected_tags.csv")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from base.tensor_files import first_line

    offline = not hub_answers()
    try:
        names = ("model.onnx", "selected_tags.csv")
        model, tags = (Path(hf_hub_download(args.repo_id, name, local_files_only=offline)) for name in names)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        unanswered = offline and isinstance(error, LocalEntryNotFoundError)
        reason = "it does not answer" if unanswered else first_line(error)
        advice = "give the files with --model model.onnx --tags selected_tags.csv"
        raise ValueError(f"{args.repo_id} cannot be had from the hub ({reason}): {advice}") from error
    return model, args.tags or tags


def comma_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def replacements(text: str) -> dict[str, str]:
    pairs = [pair.split(",") for pair in text.split(";") if pair.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} must be pairs such as 'old,new;old2,new2'")
    return {old.strip(): new.strip() for old, new in pairs}


def parse_arguments(argv: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("train_data_dir", type=Path, help="folder with pictures")
    add("--repo_id", default=DEFAULT_REPO, help="tagger on the hub (default %(default)s)")
    add("--model", type=Path, help="model.onnx on this machine, instead of --repo_id")
    add("--tags", type=Path, help="its selected_tags.csv (default: beside the model)")
    add("--thresh", type=float, default=0.35, help="probability from which a tag is taken (default %(default)s)")
    add("--general_threshold", type=float, help="for general tags (default: --thresh)")
    add("--character_threshold", type=float, help="for names of characters (default: --thresh)")
    add("--undesired_tags", type=comma_list, default=[], help="tags to leave out, parted by commas")
    add("--always_first_tags", "--trigger", type=comma_list, default=[], help="trigger words, always put first")
    add("--tag_replacement", type=replacements, default={}, help="'old,new;old2,new2'")
    add("--character_tags_first", action="store_true", help="names of characters before general tags")
    add("--use_rating_tags", action="store_true", help="also the likeliest rating, in front")
    add("--remove_underscore", action="store_true", help="spaces instead of underscores, except in signs such as ^_^")
    add("--caption_extension", default=".txt")
    add("--caption_separator", default=", ")
    add("--append_tags", action="store_true", help="add to captions that exist")
    add("--overwrite", action="store_true", help="replace captions that exist")
    add("--recursive", action="store_true", help="take subfolders, too")
    add("--batch_size", type=int, default=1)
    add("--max_data_loader_n_workers", type=int, default=2, help="threads that load pictures")
    add("--frequency_tags", action="store_true", help="print how often each tag was given")
    return parser.parse_args(argv)


def validate(args: argparse.Namespace) -> None:
    """Fills the thresholds in. Raises ValueError with all problems."""
    args.general_threshold = args.thresh if args.general_threshold is None else args.general_threshold
    args.character_threshold = args.thresh if args.character_threshold is None else args.character_threshold
    problems = []
    for name in ("thresh", "general_threshold", "character_threshold"):
        if not 0 <= getattr(args, name) <= 1:
            problems.append(f"--{name} {getattr(args, name)} must be from 0 to 1")
    for name in ("batch_size", "max_data_loader_n_workers"):
        if getattr(args, name) < 1:
            problems.append(f"--{name} {getattr(args, name)} must be at least 1")
    if args.append_tags and args.overwrite:
        problems.append("--append_tags and --overwrite exclude each other")
    if not args.caption_extension.startswith("."):
        problems.append(f'--caption_extension {args.caption_extension!r} must begin with a dot, such as ".txt"')
    if not args.caption_separator:
        problems.append("--caption_separator must not be empty")
    if problems:
        raise ValueError("; ".join(problems))


def tag_pictures(captions: dict[Path, Path], tagger: Tagger, args: argparse.Namespace) -> tuple[list[str], Counter]:
    """Writes the caption of each picture; -> messages of damaged ones, count of each tag."""
    damaged, frequency = [], Counter()

    def load(path: Path) -> Optional[np.ndarray]:
        try:
            return prepared(load_rgb(path)[0], tagger.side_px)
        except UnreadableImageError as error:
            damaged.append(str(error))
            return None

    paths = list(captions)
    with ThreadPoolExecutor(args.max_data_loader_n_workers) as pool:
        for start in tqdm(range(0, len(paths), args.batch_size), desc="tagging", unit="batch"):
            group = paths[start : start + args.batch_size]
            pictures = {path: array for path, array in zip(group, pool.map(load, group)) if array is not None}
            if not pictures:
                continue
            for path, row in zip(pictures, tagger.probabilities(list(pictures.values()))):
                names = chosen_tags(row, tagger.tags, args)
                write_caption(captions[path], caption_text(names, existing_caption(captions[path]), args))
                frequency.update(names)
    return damaged, frequency


def tag_folder(args: argparse.Namespace) -> list[str]:
    """Tags the pictures of a folder; returns the messages of damaged ones."""
    pictures = find_pictures(args.train_data_dir, args.recursive)
    captions = {path: caption_path(path, args.caption_extension) for path in pictures}
    if not (args.append_tags or args.overwrite):
        captions = {path: caption for path, caption in captions.items() if not caption.exists()}
    damaged, frequency = [], Counter()
    if captions:
        model_path, tags_path = model_files(args)
        damaged, frequency = tag_pictures(captions, Tagger(model_path, read_tags(tags_path)), args)
    print(f"tagged {len(captions) - len(damaged)} of {len(pictures)} pictures in {args.train_data_dir}")
    kept = len(pictures) - len(captions)
    if kept:
        print(f"{kept} have captions already and are kept (--append_tags adds to them, --overwrite replaces them)")
    if args.frequency_tags:
        for name, count in frequency.most_common():
            print(f"  {count}\t{name}")
    return damaged


def main(argv: Optional[list[str]] = None) -> int:
    """Exit code 0, or 2 for bad arguments or damaged pictures (all others are tagged)."""
    args = parse_arguments(argv)

    def work() -> int:
        validate(args)
        damaged = tag_folder(args)
        for message in damaged:
            print(f"left out: {message}", file=sys.stderr)
        return 2 if damaged else 0

    return ended("tag_wd14", work)


if __name__ == "__main__":
    sys.exit(main())
