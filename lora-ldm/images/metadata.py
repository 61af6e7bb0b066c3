"""The `ss_*` facts about the images that kohya's trainers write into a LoRA file."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence

from images.buckets import aspect_ratio_error
from images.dataset_settings import SubsetSettings
from images.selection import BucketedDataset

SUBSET_FACTS = """
    num_repeats color_aug flip_aug random_crop shuffle_caption keep_tokens keep_tokens_separator secondary_separator
    enable_wildcard caption_prefix caption_suffix trigger_word
""".split()


def dataset_metadata(
    datasets: Sequence[BucketedDataset], *, num_batches: int, is_user_config: bool
) -> dict[str, object]:
    """Facts of all datasets. One dataset from plain folders is described in separate entries, as
    upstream does; a --dataset_config in the one entry `ss_datasets`. Nested values are JSON texts.

    datasets: list of images.selection.BucketedDataset.
    num_batches: of one epoch."""
    images = [image for dataset in datasets for image in dataset.images]
    facts = {
        "ss_num_train_images": sum(image.record.repeats for image in images if not image.record.is_reg),
        "ss_num_reg_images": sum(image.record.repeats for image in images if image.record.is_reg),
        "ss_num_batches_per_epoch": num_batches,
    }
    if is_user_config:
        facts["ss_datasets"] = json.dumps([describe(dataset) for dataset in datasets])
        return facts
    dataset = datasets[0]
    settings, subset = dataset.settings, dataset.settings.subsets[0]
    facts.update(
        ss_resolution=str(tuple(settings.resolution)),
        ss_color_aug=subset.color_aug,
        ss_flip_aug=subset.flip_aug,
        ss_random_crop=subset.random_crop,
        ss_shuffle_caption=subset.shuffle_caption,
        ss_keep_tokens=subset.keep_tokens,
        ss_enable_bucket=settings.enable_bucket,
        ss_bucket_no_upscale=settings.bucket_no_upscale,
        ss_min_bucket_reso=settings.min_bucket_reso,
        ss_max_bucket_reso=settings.max_bucket_reso,
        ss_dataset_dirs=json.dumps(folder_counts(dataset, is_reg=False)),
        ss_reg_dataset_dirs=json.dumps(folder_counts(dataset, is_reg=True)),
        ss_tag_frequency=json.dumps(tag_frequency([dataset])),
        ss_bucket_info=json.dumps(bucket_info(dataset)),
    )
    return facts


def folder_name(subset: SubsetSettings) -> str:
    return os.path.basename(os.path.normpath(subset.image_dir or subset.metadata_file))


def describe(dataset: BucketedDataset) -> dict:
    settings = dataset.settings
    images = [image.record for image in dataset.images]
    return {
        "is_dreambooth": all(subset.metadata_file is None for subset in settings.subsets),
        "batch_size_per_device": settings.batch_size,
        "num_train_images": sum(record.repeats for record in images if not record.is_reg),
        "num_reg_images": sum(record.repeats for record in images if record.is_reg),
        "resolution": list(settings.resolution),
        "enable_bucket": settings.enable_bucket,
        "min_bucket_reso": settings.min_bucket_reso,
        "max_bucket_reso": settings.max_bucket_reso,
        "tag_frequency": tag_frequency([dataset]),
        "bucket_info": bucket_info(dataset),
        "subsets": [describe_subset(dataset, subset) for subset in settings.subsets],
    }


def describe_subset(dataset: BucketedDataset, subset: SubsetSettings) -> dict:
    facts = {"img_count": count_images(dataset, subset)}
    facts.update({name: getattr(subset, name) for name in SUBSET_FACTS})
    if subset.metadata_file:
        facts["metadata_file"] = os.path.basename(subset.metadata_file)
    else:
        facts.update(image_dir=folder_name(subset), class_tokens=subset.class_tokens, is_reg=subset.is_reg)
    return facts


def count_images(dataset: BucketedDataset, subset: SubsetSettings) -> int:
    return sum(image.record.subset is subset for image in dataset.images)


def folder_counts(dataset: BucketedDataset, *, is_reg: bool) -> dict[str, dict[str, int]]:
    """{folder: {"n_repeats", "img_count"}}"""
    subsets = [subset for subset in dataset.settings.subsets if subset.is_reg == is_reg]
    return {
        folder_name(subset): {"n_repeats": subset.num_repeats, "img_count": count_images(dataset, subset)}
        for subset in subsets
    }


def tag_frequency(datasets: list) -> dict[str, dict[str, int]]:
    """{folder: {tag in lower case: number of images}}"""
    counts = defaultdict(Counter)
    for dataset in datasets:
        for image in dataset.images:
            subset = image.record.subset
            for line in image.record.caption.split("\n"):
                tags = (tag.strip().lower() for tag in line.split(subset.caption_separator))
                counts[folder_name(subset)].update(tag for tag in tags if tag)
    return {folder: dict(tags) for folder, tags in counts.items()}


def bucket_info(dataset: BucketedDataset) -> dict:
    """Resolution and image count of each bucket, and the mean distance of shapes from theirs."""
    if not dataset.settings.enable_bucket:
        return {}
    buckets = {
        str(number): {"resolution": list(size), "count": len(indices)}
        for number, (size, indices) in enumerate(dataset.buckets.items())
    }
    errors = [aspect_ratio_error(image.record.size_px, image.placement.bucket_px) for image in dataset.images]
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / max(1, len(errors))}
