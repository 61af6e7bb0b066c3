"""From the command line to datasets that are ready to be drawn from: every image checked, split off
for validation, balanced against the regularisation images and put into its bucket."""

from __future__ import annotations

import logging
import math
import random
from argparse import Namespace
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

from tqdm import tqdm

from images.augmentation import face_in_name
from images.buckets import BucketSelector, Placement, Size
from images.dataset_settings import (
    DatasetSettings,
    SubsetSettings,
    command_line_values,
    make_settings,
    settings_from_toml,
)
from images.folders import ImageRecord, read_records, subsets_of_folder
from images.loading import UnreadableImageError, open_image, refuse_too_large

logger = logging.getLogger(__name__)
MOST_OF_AN_EPOCH = 5_000_000  # pictures with their repeats


@dataclass
class PlacedImage:
    record: ImageRecord
    placement: Placement


@dataclass
class BucketedDataset:
    """One dataset of the configuration with its images sorted into buckets."""

    settings: DatasetSettings
    images: list[PlacedImage]
    buckets: dict[Size, list[int]]  # indices into `images`, each as often as it repeats


def prepare_datasets(args: Namespace, seed: int) -> tuple[list[BucketedDataset], list[BucketedDataset]]:
    """(training, validation) datasets of the command line; see images.batches.build_datasets."""
    datasets = load_datasets(args)
    records = read_all_records(datasets)
    for settings, group in zip(datasets, records):
        assert_supported(settings, args)
        report_unused_settings(settings, group)
    all_records = [record for group in records for record in group]
    refuse_too_many(all_records)
    bad = set(check_images(all_records, bool(getattr(args, "skip_bad_images", False))))
    train, held_out = [], []
    for settings, group in zip(datasets, records):
        usable = [record for record in group if record.path not in bad]
        train_records, validation_records = split_records(settings, usable, seed)
        train.append(bucketed(settings, balance_regularisation(train_records)))
        held_out.append(bucketed(settings, validation_records))
    if not any(not image.record.is_reg for dataset in train for image in dataset.images):
        other = "all others are regularisation images, held out by validation_split, or damaged"
        raise ValueError(f"there are no training images: {other}")
    return train, held_out


def read_all_records(datasets: list[DatasetSettings]) -> list[list[ImageRecord]]:
    """Records of each dataset. Raises ValueError with the problems of all folders together."""
    records, problems = [], []
    for dataset in datasets:
        records.append([])
        for subset in dataset.subsets:
            try:
                records[-1] += read_records(subset)
            except (ValueError, FileNotFoundError) as error:
                problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ValueError("\n".join(str(problem) for problem in problems))
    return records


def refuse_too_many(records: list[ImageRecord]) -> None:
    """Raise ValueError where the repeats make more of an epoch than can be listed."""
    total = sum(record.repeats for record in records)
    if total > MOST_OF_AN_EPOCH:
        most = max(records, key=lambda record: record.repeats)
        others = sum(record.repeats for record in records if record.repeats < most.repeats)
        count = sum(record.repeats == most.repeats for record in records)
        raise ValueError(
            f"{most.path.parent}: {most.repeats} repeats make an epoch of {total} pictures, and {MOST_OF_AN_EPOCH} are "
            f"the most: give at most {max(1, (MOST_OF_AN_EPOCH - others) // count)} repeats"
        )


def report_unused_settings(settings: DatasetSettings, records: list[ImageRecord]) -> None:
    """Says which settings have no effect on these images."""
    if settings.bucket_no_upscale and not settings.enable_bucket:
        logger.warning("bucket_no_upscale has no effect without enable_bucket")
    cropped = [record for record in records if record.subset.face_crop_aug_range]
    faceless = sum(face_in_name(record.path) is None for record in cropped)
    if faceless:
        names = "names such as cat_120_80_64_64.png (centre x, centre y, width, height of the face)"
        message = "face_crop_aug_range: %d of %d images have no face in their file names and are cut in the middle; %s"
        logger.warning(message, faceless, len(cropped), names + " give one")


def split_records(
    settings: DatasetSettings, records: list[ImageRecord], seed: int
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """(training, validation) records of a dataset; each subset apart, regularisation never."""
    train, held_out = [], []
    for subset in settings.subsets:
        own = [record for record in records if record.subset is subset]
        if subset.is_reg:
            train += own
            continue
        split_seed = seed if subset.validation_seed is None else subset.validation_seed
        kept, validation = split_validation(own, subset.validation_split, split_seed)
        train += kept
        held_out += validation
    still: dict[int, SubsetSettings] = {id(s): without_chance(s) for s in settings.subsets}
    return train, [replace(record, subset=still[id(record.subset)]) for record in held_out]


def without_chance(subset: SubsetSettings) -> SubsetSettings:
    """The settings of a subset for validation: nothing varies, nothing is left out."""
    images = {"flip_aug": False, "color_aug": False, "random_crop": False, "face_crop_aug_range": None}
    captions = {"shuffle_caption": False, "caption_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 0}
    tags = {"caption_tag_dropout_rate": 0.0, "token_warmup_step": 0}
    return replace(subset, **images, **captions, **tags)


def assert_supported(settings: DatasetSettings, args: Namespace) -> None:
    """Raises ValueError for settings that exclude each other."""
    caches = [flag for flag in ("cache_latents", "cache_latents_to_disk") if getattr(args, flag, False)]
    varying = sorted({name for subset in settings.subsets for name in subset.varying_images})
    if caches and varying:
        fix = "leave one of them out (flip_aug works with cached latents)"
        raise ValueError(f"--{caches[0]} keeps each image as it is, {', '.join(varying)} varies it: {fix}")
    if getattr(args, "masked_loss", False) and not any(subset.has_masks for subset in settings.subsets):
        raise ValueError("--masked_loss has no masks: give --alpha_mask or --conditioning_data_dir FOLDER")


def bucketed(settings: DatasetSettings, records: list[ImageRecord]) -> BucketedDataset:
    selector = BucketSelector(
        settings.resolution,
        enable_bucket=settings.enable_bucket,
        min_px=settings.min_bucket_reso,
        max_px=settings.max_bucket_reso,
        step_px=settings.bucket_reso_steps,
        no_upscale=settings.bucket_no_upscale,
    )
    images = [PlacedImage(record, _placed(selector, record)) for record in records]
    buckets = defaultdict(list)
    for index, image in enumerate(images):
        buckets[image.placement.bucket_px] += [index] * image.record.repeats
    return BucketedDataset(settings, images, dict(sorted(buckets.items())))


def _placed(selector, record):
    """The placement of a picture, which must not grow out of bounds where it is a thin stripe."""
    placement = selector.place(record.size_px)
    try:
        refuse_too_large(placement.resized_px)
    except ValueError as error:
        width, height = record.size_px
        message = f"image {record.path} is {width} x {height} px; scaled to cover its bucket {error}, or cut it"
        raise ValueError(message) from None
    return placement


def check_images(records: list[ImageRecord], skip_bad: bool) -> list[Path]:
    """Decodes every image and mask and notes its size; returns the paths of damaged images.
    Raises ValueError: names and counts the damaged ones, unless `skip_bad`."""

    def check(record: ImageRecord) -> Optional[str]:
        try:
            record.size_px = open_image(record.path).size
            if record.mask_path:
                open_image(record.mask_path)
        except (UnreadableImageError, FileNotFoundError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max_workers=4) as pool:
        checks = pool.map(check, records)
        results = list(tqdm(checks, total=len(records), desc="checking images", disable=len(records) < 50))
    problems = [problem for problem in results if problem]
    if problems and not skip_bad:
        shown = "\n  ".join(problems)
        advice = "repair or remove them, or leave them out with --skip_bad_images"
        raise ValueError(f"{len(problems)} of {len(records)} images are damaged ({advice}):\n  {shown}")
    for problem in problems:
        logger.warning("left out: %s", problem)
    if problems:
        logger.warning("%d of %d images are damaged and left out", len(problems), len(records))
    return [record.path for record, problem in zip(records, results) if problem]


def load_datasets(args: Namespace) -> list[DatasetSettings]:
    """Dataset settings of the command line (DESIGN: data's way); every problem in one message.

    Raises ValueError: contradicting, missing or mistyped settings; FileNotFoundError: a folder or
    file that is not there."""
    if getattr(args, "dataset_config", None):
        for flag in ("train_data_dir", "reg_data_dir", "in_json"):
            if getattr(args, flag, None):
                logger.warning("--%s is not used: --dataset_config says where the images are", flag)
        return settings_from_toml(args.dataset_config, args)
    if not getattr(args, "train_data_dir", None):
        raise ValueError("no images: give --train_data_dir FOLDER (with folders such as 10_name) or --dataset_config")
    problems: list[str] = []
    values = command_line_values(args, problems)
    if "resolution" not in values and not problems:
        problems.append("--resolution is missing, for example --resolution 512")
    if problems:
        raise ValueError("\n".join(problems))
    dataset = make_settings(DatasetSettings, values)
    common = make_settings(SubsetSettings, values)
    masks = getattr(args, "conditioning_data_dir", None)
    if getattr(args, "in_json", None):
        subset = replace(common, image_dir=args.train_data_dir, metadata_file=args.in_json, conditioning_data_dir=masks)
        dataset.subsets.append(subset)
    else:
        dataset.subsets += subsets_of_folder(args.train_data_dir, "--train_data_dir", common, masks)
    if getattr(args, "reg_data_dir", None):
        dataset.subsets += subsets_of_folder(args.reg_data_dir, "--reg_data_dir", replace(common, is_reg=True), None)
    return [dataset]


def split_validation(
    records: list[ImageRecord], split: float, seed: int
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """(training, validation) records of a subset; training is rounded up, order by the seed.

    The pictures are those that sd-scripts (library/train_util.py) chooses with this
    --validation_seed, without the one that its rounding may leave in both parts."""
    if split <= 0 or not records:
        return records, []
    shuffled = sorted(records, key=lambda record: str(record.path))
    random.Random(seed).shuffle(shuffled)
    count = math.ceil(len(shuffled) * (1 - split))
    held_out = [replace(record, repeats=1) for record in shuffled[count:]]
    if not held_out:
        message = "validation_split %s of %d images in %s is less than one image: nothing is held out"
        logger.warning(message, split, len(records), records[0].path.parent)
    return sorted(shuffled[:count], key=lambda r: r.path), sorted(held_out, key=lambda r: r.path)


def balance_regularisation(records: list[ImageRecord]) -> list[ImageRecord]:
    """Repeats the regularisation images until they equal the training ones; drops a surplus.
    The repeats of the folder's name come first, in turn, then one more of each until equal."""
    train = [record for record in records if not record.is_reg]
    reg = [record for record in records if record.is_reg]
    wanted = sum(record.repeats for record in train)
    if not reg or not train:
        return records
    used, total = [], 0
    for record in reg:
        if total >= wanted:
            break
        used.append(replace(record, repeats=min(record.repeats, wanted - total)))
        total += used[-1].repeats
    for i in range(wanted - total):
        used[i % len(used)].repeats += 1
    if len(used) < len(reg):
        message = "%d of %d regularisation images are not used: there are only %d training images (with repeats)"
        logger.warning(message, len(reg) - len(used), len(reg), wanted)
    return train + used
