"""Settings of the image data: command line and --dataset_config -> DatasetSettings, SubsetSettings.

The names, levels and precedence are those of kohya's dataset configuration: a value of a subset
goes before that of its dataset, that before [general], that before the command line. Each dataclass
field carries its own check, so the dataclasses are the schema."""

from __future__ import annotations

import dataclasses
import difflib
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

from settings.bounds import MOST_SIDE_PX, problem_of
from settings.bounds import shown as shown_as
from settings.toml_files import read_toml

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")
# Keys of upstream's configuration that have no meaning for LoRA training of SD 1.x/2.x here.
UNSUPPORTED_KEYS = {
    "cache_info": "image sizes are read anew at each start, remove this line",
    "network_multiplier": "it belongs to slider training, which is not supported",
    "custom_attributes": "it belongs to other model families",
    "skip_image_resolution": "remove small images from the folder instead",
    "system_prompt": "it belongs to other model families",
    "multiplier": "it belongs to slider training, which is not supported",
}
# A setting whose command-line flag has another name.
FLAG_NAMES = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"}


def setting(
    default: Any,
    kind: str,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] | None = None,
    distinct: bool = False,
) -> Any:
    """A dataclass field with its check. `distinct` marks what only a subset itself can say."""
    checks = {"kind": kind, "minimum": minimum, "maximum": maximum, "choices": choices, "distinct": distinct}
    return field(default=default, metadata=checks)


@dataclass
class SubsetSettings:
    """One folder (or metadata file) of images, and all that is done to images and captions."""

    image_dir: Optional[str] = setting(None, "str", distinct=True)
    metadata_file: Optional[str] = setting(None, "str", distinct=True)
    conditioning_data_dir: Optional[str] = setting(None, "str", distinct=True)
    is_reg: bool = setting(False, "bool", distinct=True)
    class_tokens: Optional[str] = setting(None, "str")
    trigger_word: Optional[str] = setting(None, "str")
    caption_extension: str = setting(".caption", "extension")
    num_repeats: int = setting(1, "int", minimum=1)
    shuffle_caption: bool = setting(False, "bool")
    caption_separator: str = setting(",", "str")
    keep_tokens: int = setting(0, "int", minimum=0)
    keep_tokens_separator: Optional[str] = setting(None, "str")
    secondary_separator: Optional[str] = setting(None, "str")
    enable_wildcard: bool = setting(False, "bool")
    caption_prefix: Optional[str] = setting(None, "str")
    caption_suffix: Optional[str] = setting(None, "str")
    caption_dropout_rate: float = setting(0.0, "float", minimum=0, maximum=1)
    caption_dropout_every_n_epochs: int = setting(0, "int", minimum=0)
    caption_tag_dropout_rate: float = setting(0.0, "float", minimum=0, maximum=1)
    token_warmup_min: int = setting(1, "int", minimum=0)
    token_warmup_step: float = setting(0, "float", minimum=0)
    flip_aug: bool = setting(False, "bool")
    color_aug: bool = setting(False, "bool")
    random_crop: bool = setting(False, "bool")
    face_crop_aug_range: Optional[tuple[float, float]] = setting(None, "range")
    alpha_mask: bool = setting(False, "bool")
    resize_interpolation: Optional[str] = setting(None, "str", choices=INTERPOLATIONS)
    validation_split: float = setting(0.0, "float", minimum=0, maximum=1)
    validation_seed: Optional[int] = setting(None, "int")

    @property
    def between_tags(self) -> str:
        """What joins tags: the separator, and a space where it does not end in one."""
        return self.caption_separator if self.caption_separator[-1:].isspace() else f"{self.caption_separator} "

    @property
    def has_masks(self) -> bool:
        return self.alpha_mask or self.conditioning_data_dir is not None

    @property
    def varying_images(self) -> list[str]:
        """Settings that change the picture from epoch to epoch: no latents can be cached."""
        names = ("color_aug", "random_crop", "face_crop_aug_range")
        return [name for name in names if getattr(self, name)]


@dataclass
class DatasetSettings:
    """Subsets that share resolution, buckets and batch size. Sizes: (width, height) in pixels."""

    resolution: tuple[int, int] = setting(None, "resolution")
    batch_size: int = setting(1, "int", minimum=1)
    enable_bucket: bool = setting(False, "bool")
    min_bucket_reso: int = setting(256, "int", minimum=8)
    max_bucket_reso: int = setting(1024, "int", minimum=8)
    bucket_reso_steps: int = setting(64, "int", minimum=8)
    bucket_no_upscale: bool = setting(False, "bool")
    subsets: list[SubsetSettings] = field(default_factory=list)


def schema(settings_class: type, distinct: Optional[bool] = None) -> dict[str, dataclasses.Field]:
    """Checked fields of a settings class by name; `distinct` True or False keeps only those."""
    checked = {f.name: f for f in fields(settings_class) if f.metadata}
    return {k: f for k, f in checked.items() if distinct is None or f.metadata["distinct"] == distinct}


def checked_value(name: str, value: Any, checks: Mapping[str, Any]) -> Any:
    """The value in its final type. Raises ValueError that says the value and what is allowed."""
    kind, shown = checks["kind"], f"{name} = {value!r}"
    if kind == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"{shown} must be true or false, without quotes")
    elif kind in ("int", "float"):
        allowed = (int,) if kind == "int" else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise ValueError(f"{shown} must be {'a whole number' if kind == 'int' else 'a number'}, without quotes")
    elif kind == "resolution":
        return checked_resolution(name, value)
    elif kind == "range":
        return checked_range(name, value)
    elif not isinstance(value, str):
        raise ValueError(f"{shown} must be text in quotes")
    elif kind == "extension" and not (value.startswith(".") and len(value) > 1):
        raise ValueError(f'{shown} must begin with a dot, such as ".txt"')
    low, high, choices = checks["minimum"], checks["maximum"], checks["choices"]
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} = {shown_as(value)} must be {limits}")
    if problem := problem_of(value, FLAG_NAMES.get(name, name).removeprefix("--")):
        raise ValueError(f"{name} = {shown_as(value)} is not allowed: {problem}")
    if choices and value not in choices:
        raise ValueError(f"{shown} must be one of {', '.join(choices)}")
    return value


def numbers_in(value: Any, convert: Callable[[Any], Any]) -> list[Any]:
    """Numbers of a scalar, list or comma-separated text; else TypeError or ValueError."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(part, bool) for part in parts):
        raise TypeError("a truth value is no number")
    numbers = [convert(part) for part in parts]
    if any(not isinstance(part, str) and number != part for part, number in zip(parts, numbers)):
        raise ValueError("not a whole number")
    return numbers


def checked_resolution(name: str, value: Any) -> tuple[int, int]:
    try:
        numbers = numbers_in(value, int)
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if numbers and max(numbers) > MOST_SIDE_PX:
        raise ValueError(f"{name} = {value!r:.60}: {MOST_SIDE_PX} px a side are the most")
    if len(numbers) not in (1, 2) or min(numbers) < 8:
        raise ValueError(f"{name} = {value!r} must be one or two whole numbers of pixels, such as 512 or 512,768")
    return numbers[0], numbers[-1]


def checked_range(name: str, value: Any) -> tuple[float, float]:
    try:
        numbers = numbers_in(value, float)
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 2 or not 1.0 <= numbers[0] <= numbers[1] <= 1000:
        raise ValueError(f"{name} = {value!r} must be two numbers of face sizes, 1 or more and rising, such as 2.0,4.0")
    return numbers[0], numbers[1]


def command_line_values(args: Namespace, problems: list[str]) -> dict[str, Any]:
    """Dataset and subset settings of the command line, as they are named in TOML."""
    values = {}
    for name, checks in {**schema(DatasetSettings), **schema(SubsetSettings, distinct=False)}.items():
        flag = FLAG_NAMES.get(name, name)
        if name == "caption_extension" and getattr(args, "caption_extention", None):
            flag = "caption_extention"  # upstream keeps the old misspelling as an alias
        value = getattr(args, flag, None)
        if value is None or value == "":
            continue
        try:
            values[name] = checked_value("--" + flag, value, checks.metadata)
        except ValueError as error:
            problems.append(str(error))
    return values


def checked_table(
    table: dict[str, Any], allowed: dict[str, dataclasses.Field], where: str, problems: list[str]
) -> dict[str, Any]:
    """Values of one TOML table that pass their checks; what does not is added to `problems`."""
    values = {}
    for key, value in table.items():
        name = "caption_extension" if key == "caption_extention" else key
        if name in allowed:
            try:
                values[name] = checked_value(key, value, allowed[name].metadata)
            except ValueError as error:
                problems.append(f"{where}: {error}")
        elif key in UNSUPPORTED_KEYS:
            problems.append(f"{where}: {key} is not supported: {UNSUPPORTED_KEYS[key]}")
        else:
            problems.append(f"{where}: {unknown_key(key, allowed)}")
    return values


def unknown_key(key: str, allowed: dict[str, Any]) -> str:
    if key in schema(SubsetSettings, distinct=True):
        return f"{key} belongs into [[datasets.subsets]]"
    if key in schema(DatasetSettings):
        return f"{key} belongs into [general] or [[datasets]]"
    nearest = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"allowed are {', '.join(sorted(allowed))}"
    return f"unknown key {key}: {hint}"


def list_of_tables(value: Any, name: str, problems: list[str]) -> list[dict[str, Any]]:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    problems.append(f"{name} must be written with double brackets: [[{name}]]")
    return []


def settings_from_toml(path: str | Path, args: Namespace) -> list[DatasetSettings]:
    """DatasetSettings of a --dataset_config file over the values of the command line.

    Raises FileNotFoundError: no such file; ValueError: all that is wrong in it, a line each."""
    content, problems = read_toml(path, "--dataset_config"), []
    base = command_line_values(args, problems)
    for key in sorted(set(content) - {"general", "datasets"}):
        nearest = difflib.get_close_matches(key, ["general", "datasets"], n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "allowed are general, datasets"
        problems.append(f"unknown table {key}: {hint}")
    dataset_keys, inherited = schema(DatasetSettings), schema(SubsetSettings, distinct=False)
    general = content.get("general", {})
    if not isinstance(general, dict):
        problems.append("general must be written with single brackets: [general]")
        general = {}
    base = {**base, **checked_table(general, {**dataset_keys, **inherited}, "[general]", problems)}
    datasets = []
    for i, table in enumerate(list_of_tables(content.get("datasets", []), "datasets", problems), 1):
        where = f"[[datasets]] {i}"
        own = {key: value for key, value in table.items() if key != "subsets"}
        values = {**base, **checked_table(own, {**dataset_keys, **inherited}, where, problems)}
        dataset = make_settings(DatasetSettings, values)
        if dataset.resolution is None:
            problems.append(f"{where}: resolution is missing, for example resolution = 512")
        for j, subset in enumerate(list_of_tables(table.get("subsets", []), "datasets.subsets", problems), 1):
            where_subset = f"{where} [[datasets.subsets]] {j}"
            own = checked_table(subset, schema(SubsetSettings), where_subset, problems)
            dataset.subsets.append(make_settings(SubsetSettings, {**values, **own}))
            if "image_dir" not in subset and "metadata_file" not in subset:
                problems.append(f"{where_subset}: image_dir is missing, the folder of the images")
        if not table.get("subsets"):
            problems.append(f"{where}: has no [[datasets.subsets]]")
        datasets.append(dataset)
    if not content.get("datasets"):
        problems.append("there is no [[datasets]]")
    if problems:
        raise ValueError(f"--dataset_config {path}:\n  " + "\n  ".join(dict.fromkeys(problems)))
    return datasets


def make_settings(settings_class: type, values: dict[str, Any]) -> Any:
    names = schema(settings_class)
    return settings_class(**{name: value for name, value in values.items() if name in names})
