"""From folders, metadata files or a configuration to image records: images, captions, repeats.

The conventions are those of kohya's trainers: `<repeats>_<name>` folders, regularisation folders,
caption files beside the images, `--in_json` metadata and `--dataset_config`; and the
`metadata.jsonl` of Hugging Face image folders."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterable, Iterator, Optional, Sequence

from es_lora.files import read_text, split_lines
from es_lora.inputs.json_text import parsed_json
from images.dataset_settings import SubsetSettings

logger = logging.getLogger(__name__)
JPEG_EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".jfi", ".pjpeg", ".pjp")
IMAGE_EXTENSIONS = (".png", ".apng", *JPEG_EXTENSIONS, ".webp", ".bmp", ".dib", ".avif", ".tif", ".tiff", ".gif")
# Pictures that people have and that are not read here.
CONVERT_FIRST = """
    .heic .heif .jxl .psd .svg .jp2 .j2k .jpx .tga .ppm .pgm .pbm .pnm .ico .exr .hdr .xcf .eps
    .raw .cr2 .cr3 .nef .arw .dng .orf .rw2
""".split()
CAPTION_EXTENSIONS = (".caption", ".txt")
MOST_LETTERS = 100_000  # of a caption; at most some hundred words of it are encoded
REPEAT_FOLDER = re.compile(r"(\d+)(?:_(.*))?")


@dataclass
class ImageRecord:
    """One image of a subset.

    caption: as written; several lines only with `enable_wildcard`, which picks one.
    repeats: how often the image comes in one epoch.
    mask_path: picture whose red channel weighs the loss, or None.
    size_px: (width, height), upright by EXIF; (0, 0) until the image has been checked."""

    path: Path
    caption: str
    repeats: int
    subset: SubsetSettings
    mask_path: Optional[Path] = None
    size_px: tuple[int, int] = (0, 0)

    @property
    def is_reg(self) -> bool:
        return self.subset.is_reg


def existing_folder(folder: str | Path, flag: str) -> Path:
    path = Path(folder)
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{flag} {folder} {what}")
    return path


def subsets_of_folder(
    data_dir: str | Path, flag: str, common: SubsetSettings, masks_dir: Optional[str]
) -> list[SubsetSettings]:
    """A subset for each `<repeats>_<name>` folder in `data_dir`; the name: default caption.

    `data_dir` may be such a folder itself, with pictures and no such folders inside."""
    root = existing_folder(data_dir, flag)
    if is_leaf(root):
        logger.warning("%s %s is a <repeats>_<name> folder itself: it alone is used", flag, data_dir)
        return [subset_of_folder(root, common, masks_dir)]
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    subsets, others = [], []
    for folder in folders:
        match = REPEAT_FOLDER.fullmatch(folder.name)
        if match is None:
            others.append(folder.name)
            continue
        if int(match[1]) < 1:
            logger.warning("%s: 0 repeats, its images are not used", folder)
            continue
        subsets.append(subset_of_folder(folder, common, masks_dir))
    if not subsets and (root / "metadata.jsonl").is_file():  # an image folder as `datasets` writes it
        return [replace(common, image_dir=str(root), conditioning_data_dir=masks_dir)]
    if not subsets:
        raise ValueError(no_repeat_folders(root, flag, others))
    if others:
        logger.warning("%s: folders without repeats in their names are not used: %s", root, ", ".join(others))
    loose = sum(1 for _ in image_files(root))
    if loose:
        logger.warning("%s: %d images outside the <repeats>_<name> folders are not used", root, loose)
    return subsets


def subset_of_folder(folder: Path, common: SubsetSettings, masks_dir: Optional[str]) -> SubsetSettings:
    """The subset of a `<repeats>_<name>` folder."""
    match = REPEAT_FOLDER.fullmatch(folder.absolute().name)
    masks = mask_folder(masks_dir, folder.absolute().name)
    named = {"class_tokens": match[2], "num_repeats": int(match[1]), "conditioning_data_dir": masks}
    return replace(common, image_dir=str(folder), **named)


def is_leaf(root: Path) -> bool:
    """Whether a folder is a `<repeats>_<name>` folder with pictures, and holds no such folders."""
    match = REPEAT_FOLDER.fullmatch(root.absolute().name)
    return bool(match and int(match[1]) and any(image_files(root)) and not repeat_folders(root))


def repeat_folders(root: Path) -> list[Path]:
    """The `<repeats>_<name>` folders directly in a folder."""
    return [folder for folder in sorted(root.iterdir()) if folder.is_dir() and REPEAT_FOLDER.fullmatch(folder.name)]


def mask_folder(masks_dir: Optional[str], name: str) -> Optional[str]:
    """The mask folder with the name of the image folder, or the one folder for all."""
    if masks_dir is None:
        return None
    own = existing_folder(masks_dir, "--conditioning_data_dir") / name
    return str(own) if own.is_dir() else masks_dir


def no_repeat_folders(root: Path, flag: str, others: list[str]) -> str:
    wanted = f"{flag} {root} must hold folders named <repeats>_<name>, such as 10_{others[0] if others else 'mycat'}"
    deeper = [root / name for name in others if repeat_folders(root / name)]
    if deeper:
        return f"{wanted}: they lie in {deeper[0]}, give {flag} {deeper[0]}"
    zeros = [folder.name for folder in repeat_folders(root)]
    if zeros:
        return f"{wanted}: {', '.join(zeros)} has 0 repeats, so that nothing is trained; give it 1 or more"
    if others:
        return f'{wanted}: rename "{others[0]}" to "10_{others[0]}" (10 = each image comes 10 times an epoch)'
    if any(image_files(root)):
        return f"{wanted}: make that folder and move the images into it (10 = each image comes 10 times an epoch)"
    return f"{wanted} with the images in it; it is empty"


def image_files(folder: Path) -> Iterator[Path]:
    """Image files directly in a folder, sorted by name; hidden files are left out."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file() and not path.name.startswith("."):
            yield path


def read_records(subset: SubsetSettings) -> list[ImageRecord]:
    """Records of one subset, in the order of their paths.

    Raises ValueError: no images, images without masks, unreadable captions or metadata;
    FileNotFoundError: the folder or the metadata file is missing."""
    if subset.metadata_file:
        captions = read_metadata(subset)
        report_not_listed(subset, captions)
    else:
        captions = read_folder_captions(subset)
    captions = first_lines(captions, subset)
    problems = [
        f"the caption of {path} has {len(text)} letters, and {MOST_LETTERS} are the most: shorten it"
        for path, text in captions.items()
        if len(text) > MOST_LETTERS
    ]
    masks = find_masks(list(captions), subset, problems)
    if problems:
        raise ValueError("\n".join(problems))
    make = lambda path: ImageRecord(path, captions[path], subset.num_repeats, subset, masks.get(path))  # noqa: E731
    return [make(path) for path in sorted(captions)]


def read_folder_captions(subset: SubsetSettings) -> dict[Path, str]:
    """Captions of a folder's images: caption file, else metadata.jsonl, else folder name."""
    folder = existing_folder(subset.image_dir, "image folder")
    listed = folder / "metadata.jsonl"
    metadata = read_image_list(listed, subset) if listed.is_file() else {}
    paths = sorted(set(image_files(folder)) | set(metadata))
    report_left_out(folder, set(paths))
    report_lone_captions(folder, subset.caption_extension)
    if not paths:
        raise ValueError(f"image folder {folder} holds no images ({', '.join(IMAGE_EXTENSIONS)}){deeper_hint(folder)}")
    captions, sources, problems = {}, Counter(), []
    for path in paths:
        caption_file = find_caption_file(path, subset.caption_extension)
        if caption_file:
            captions[path] = read_caption(caption_file, problems)
            sources[caption_file.suffix.lower()] += 1
        elif path in metadata:
            captions[path] = metadata[path]
        else:
            captions[path] = subset.class_tokens or ""
            sources["folder name"] += 1
    if problems:
        raise ValueError("\n".join(problems))
    report_caption_sources(folder, subset, sources, captions)
    return captions


def report_left_out(folder: Path, used: set[Path]) -> None:
    """Counts and names the pictures that a folder holds and training does not read."""
    report_unread(folder, folder.iterdir())
    deeper = Counter(path.parent for path in deeper_images(folder) if path not in used)
    if deeper and used:
        shown = ", ".join(f"{count} in {inner.relative_to(folder)}" for inner, count in sorted(deeper.items())[:5])
        message = "%s: %d images in folders below it are not used (%s): move them up"
        logger.warning(message, folder, sum(deeper.values()), shown)


def report_unread(folder: Path, files: Iterable[Path], further: Sequence[str] = ()) -> None:
    """Counts the pictures of kinds that are not read. further: extensions that are."""
    kinds = (path.suffix.lower() for path in files)
    convert = Counter(kind for kind in kinds if kind in CONVERT_FIRST and kind not in further)
    if convert:
        shown = ", ".join(f"{count} {suffix}" for suffix, count in sorted(convert.items()))
        advice = "convert them to .png first (prepare/resize_images.py does it for .heic)"
        logger.warning("%s: %s files are not read: %s", folder, shown, advice)


def report_lone_captions(folder: Path, extension: str) -> None:
    """Counts and names the caption files of a folder that no picture there has the name of."""
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    pictures = [path for path in files if path.suffix.lower() in (*IMAGE_EXTENSIONS, *CONVERT_FIRST)]
    names = {name for path in pictures for name in (path.stem, path.name)}
    captions = [path for path in files if path.suffix.lower() in (extension.lower(), *CAPTION_EXTENSIONS)]
    lone = [path.name for path in captions if path.stem not in names]
    if lone:
        shown = ", ".join(lone[:5]) + (", ..." if len(lone) > 5 else "")
        message = "%s: %d caption files have no picture of their name and are not used: %s"
        logger.warning(message, folder, len(lone), shown)


def deeper_images(folder: Path) -> Iterator[Path]:
    """Images in the folders below a folder; hidden folders are left out."""
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        yield from image_files(inner)
        yield from deeper_images(inner)


def deeper_hint(folder: Path) -> str:
    """`: they lie in ...` where the folders below a folder hold images; empty otherwise."""
    inner = list(dict.fromkeys(str(path.parent) for path in deeper_images(folder)))
    return f"; they lie in {', '.join(inner[:3])}: give that folder" if inner else ""


def spelled(path: Path) -> Optional[Path]:
    """The file of this name, its extension in small or capital letters, or None."""
    for suffix in dict.fromkeys((path.suffix, path.suffix.lower(), path.suffix.upper(), path.suffix.title())):
        candidate = path.with_suffix(suffix)
        if candidate.is_file():
            return candidate
    return None


def report_not_listed(subset: SubsetSettings, captions: dict[Path, str]) -> None:
    """Counts the pictures of a folder that its metadata file does not name."""
    if subset.image_dir is None:
        return
    others = [path for path in image_files(existing_folder(subset.image_dir, "image folder")) if path not in captions]
    if others:
        message = "%s does not name %d images of %s, which are not used; the first is %s"
        logger.warning(message, subset.metadata_file, len(others), subset.image_dir, others[0].name)


def find_caption_file(path: Path, extension: str) -> Optional[Path]:
    """`cat.txt` or `cat.png.txt` for cat.png; else the other usual extension."""
    for suffix in dict.fromkeys((extension, *CAPTION_EXTENSIONS)):
        for candidate in (path.with_suffix(suffix), path.with_name(path.name + suffix)):
            found = spelled(candidate)
            if found:
                return found
    return None


def read_caption(path: Path, problems: list[str]) -> str:
    """The lines of a caption file that are not empty."""
    try:
        return written_lines(read_text(path))
    except ValueError as error:
        problems.append(f"caption file {error}")
        return ""


def written_lines(text: str) -> str:
    """A caption as written, without empty lines and the spaces around lines."""
    return "\n".join(line.strip() for line in split_lines(text) if line.strip())


def first_lines(captions: dict[Path, str], subset: SubsetSettings) -> dict[Path, str]:
    """The captions cut to their first line, and said, but where several are alternatives."""
    if subset.enable_wildcard:
        return captions
    longer = [text.count("\n") + 1 for text in captions.values() if "\n" in text]
    if longer:
        message = "%s: %d of %d captions have several lines (at most %d), only their first line is used: %s"
        advice = "write a caption in one line, or take one of its lines each time with --enable_wildcard"
        logger.warning(
            message, subset.image_dir or subset.metadata_file, len(longer), len(captions), max(longer), advice
        )
    return {path: text.partition("\n")[0] for path, text in captions.items()}


def report_caption_sources(folder: Path, subset: SubsetSettings, sources: Counter, captions: dict[Path, str]) -> None:
    """Says what may surprise: captions of another extension, of the folder's name, or none."""
    for suffix in CAPTION_EXTENSIONS:
        if sources[suffix] and suffix != subset.caption_extension:
            message = "%s: %d captions come from %s files, as there is no %s file for those images"
            logger.warning(message, folder, sources[suffix], suffix, subset.caption_extension)
    if sources["folder name"] and not subset.is_reg:
        shown = f'the caption "{subset.class_tokens}" of the folder' if subset.class_tokens else "an empty caption"
        message = "%s: %d of %d images have no caption file (%s) and get %s"
        logger.warning(message, folder, sources["folder name"], len(captions), subset.caption_extension, shown)
    empty = sum(not caption for caption in captions.values()) - (0 if subset.class_tokens else sources["folder name"])
    if empty > 0:
        logger.warning("%s: %d caption files are empty", folder, empty)


def read_metadata(subset: SubsetSettings) -> dict[Path, str]:
    """Captions of the images in an --in_json file, `{image: {"caption", "tags"}}` or JSON lines."""
    path = Path(subset.metadata_file)
    if not path.is_file():
        raise FileNotFoundError(f"metadata file {path} does not exist")
    if path.suffix.lower() == ".jsonl":
        return read_image_list(path, subset)
    try:
        content = parsed_json(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"metadata file {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise ValueError(f'metadata file {path} must be an object {{"image": {{"caption": "...", "tags": "..."}}}}')
    return captions_by_path(path, [(key, entry) for key, entry in content.items()], subset)


def read_image_list(path: Path, subset: SubsetSettings) -> dict[Path, str]:
    """Captions of a metadata.jsonl: one `{"file_name": ..., "text" or "caption": ...}` a line."""
    entries = []
    for number, line in enumerate(split_lines(read_text(path)), 1):
        if not line.strip():
            continue
        try:
            entry = parsed_json(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not valid JSON: {error}") from error
        name = entry.get("file_name") or entry.get("image_path") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise ValueError(f'{path} line {number} has no "file_name"')
        entries.append((name, {**entry, "caption": entry.get("caption", entry.get("text"))}))
    return captions_by_path(path, entries, subset)


def captions_by_path(source: Path, entries: list[tuple[str, dict]], subset: SubsetSettings) -> dict[Path, str]:
    folder = Path(subset.image_dir) if subset.image_dir else source.parent
    captions, missing = {}, []
    for key, entry in entries:
        path = find_image(folder, source.parent, key)
        if path is None:
            missing.append(key)
        else:
            captions[path] = joined_caption(entry, subset.between_tags)
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{source} names {len(missing)} images that are not in {folder}: {shown}")
    if not captions:
        raise ValueError(f"{source} names no images")
    return captions


def find_image(folder: Path, beside: Path, key: str) -> Optional[Path]:
    """The image that a metadata key names: a path, or a file name with or without its extension."""
    for candidate in (folder / key, beside / key):
        if candidate.is_file():
            return candidate
    for suffix in IMAGE_EXTENSIONS:
        candidate = folder / (key + suffix)
        if candidate.is_file():
            return candidate
    return None


def joined_caption(entry: dict, between_tags: str) -> str:
    """Caption and tags of a metadata entry as one text."""
    parts = []
    for name in ("caption", "tags"):
        value = entry.get(name)
        if isinstance(value, list):
            value = between_tags.join(str(item) for item in value)
        if value:
            parts.append(written_lines(str(value)))
    return between_tags.join(parts)


def find_masks(paths: list[Path], subset: SubsetSettings, problems: list[str]) -> dict[Path, Path]:
    """The mask of each image: the file of its name, any extension, in `conditioning_data_dir`."""
    if subset.conditioning_data_dir is None:
        return {}
    folder = existing_folder(subset.conditioning_data_dir, "conditioning_data_dir")
    by_stem = {path.stem: path for path in image_files(folder)}
    missing = [path.name for path in paths if path.stem not in by_stem]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        lack = f"has no mask of the same name for {len(missing)} images: {shown}{deeper_hint(folder)}"
        problems.append(f"conditioning_data_dir {folder} {lack}")
    return {path: by_stem[path.stem] for path in paths if path.stem in by_stem}


def picture_name(key: str | Path) -> str:
    """folder/file of an image: the same on every machine."""
    path = Path(key)
    return f"{path.parent.name}/{path.name}"
