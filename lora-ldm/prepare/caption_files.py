"""Where captions go: a text file a picture, or one metadata.jsonl. Written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Iterable, Iterator, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from es_lora.files import read_text, split_lines  # noqa: E402
from es_lora.inputs.json_text import parsed_json  # noqa: E402
from images.folders import IMAGE_EXTENSIONS, deeper_hint, deeper_images, report_unread, spelled  # noqa: E402

logger = logging.getLogger(__name__)


def find_pictures(
    folder: Path, recursive: bool, further: tuple[str, ...] = (), output: Optional[Path] = None
) -> list[Path]:
    """Sorted; what is left out is said. further: extensions read beside the usual ones. output: a
    folder that is left out. Raises FileNotFoundError for no such folder, ValueError for no picture.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {folder} does not exist")
    found = sorted(folder.rglob("*") if recursive else folder.iterdir())
    wanted = (*IMAGE_EXTENSIONS, *further)
    pictures = [p for p in _outside(found, output) if p.suffix.lower() in wanted and p.is_file() and p.name[0] != "."]
    if not pictures:
        hint = "" if recursive else f" (--recursive takes subfolders, too){deeper_hint(folder)}"
        raise ValueError(f"no pictures in {folder}{hint}")
    report_unread(folder, found, further)
    deeper = [] if recursive else list(_outside(deeper_images(folder), output))
    if deeper:
        message = "%s: %d pictures in folders below it are left out; --recursive takes them, too"
        logger.warning(message, folder, len(deeper))
    return pictures


def _outside(paths: Iterable[Path], folder: Optional[Path]) -> Iterator[Path]:
    """The paths that do not lie in a folder."""
    return (path for path in paths if folder is None or folder.resolve() not in path.resolve().parents)


def caption_path(picture: Path, extension: str) -> Path:
    """Where a picture's caption is, `cat.TXT` too, or where it is to be written."""
    path = picture.with_suffix(extension)
    return spelled(path) or path


def existing_caption(path: Path) -> Optional[str]:
    """The text of a caption file, None if there is none. ValueError where it is not UTF-8."""
    return read_text(path) if path.exists() else None


def write_caption(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; it ends with a line break."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


class CaptionFiles:
    """Captions as text files beside the pictures.
    Raises ValueError: two pictures would share a caption file."""

    def __init__(self, pictures: list[Path], extension: str):
        self.extension = extension
        owners: dict[Path, Path] = {}
        for picture in pictures:
            first = owners.setdefault(self.path(picture), picture)
            if first != picture:
                raise ValueError(
                    f"{first} and {picture.name} would share {self.path(picture).name}: rename one of them"
                )

    def path(self, picture: Path) -> Path:
        return caption_path(picture, self.extension)

    def get(self, picture: Path) -> Optional[str]:
        return existing_caption(self.path(picture))

    def put(self, picture: Path, caption: str) -> None:
        write_caption(self.path(picture), caption)


class MetadataFile:
    """Captions as lines {"file_name", "text"} of FOLDER/metadata.jsonl; all else stays.
    Raises ValueError: the file that is there is not such a list."""

    def __init__(self, folder: Path):
        self.folder, self.file, self.lock = folder, folder / "metadata.jsonl", threading.Lock()
        self.entries: dict[str, dict] = {}
        for number, line in enumerate(split_lines(existing_caption(self.file) or ""), 1):
            if line.strip():
                try:
                    entry = parsed_json(line)
                    self.entries[entry["file_name"]] = entry
                except (json.JSONDecodeError, TypeError, KeyError):
                    raise ValueError(
                        f'{self.file} line {number} is no JSON object with a "file_name": mend it'
                    ) from None

    def name(self, picture: Path) -> str:
        return picture.relative_to(self.folder).as_posix()

    def get(self, picture: Path) -> Optional[str]:
        entry = self.entries.get(self.name(picture), {})
        return entry.get("caption", entry.get("text"))

    def put(self, picture: Path, caption: str) -> None:
        with self.lock:
            entry = self.entries.setdefault(self.name(picture), {"file_name": self.name(picture)})
            entry["caption" if "caption" in entry else "text"] = caption
            write_caption(self.file, "\n".join(json.dumps(line, ensure_ascii=False) for line in self.entries.values()))
