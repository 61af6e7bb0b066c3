"""Files and folders that appear whole or not at all, and text files as people write them."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, List, Union


def read_text(path: Union[str, Path]) -> str:
    """The text of a UTF-8 file, with or without a byte order mark, its line ends as they are.

    Raises ValueError, naming line and byte, where it is not UTF-8.
    """
    return decoded(Path(path).read_bytes(), path)


def decoded(data: bytes, where: Union[str, Path], first_line: int = 1) -> str:
    """The same of bytes that are at hand; where and first_line: their place, for the message."""
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + first_line
        raise ValueError(f"{where}, line {line} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def split_lines(text: str) -> List[str]:
    """The lines of a text, cut at LF and CRLF only.

    str.splitlines also cuts at U+2028, U+0085, form feeds and others, which stand within lines.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write(aside)` make the file beside `path`, flush it, then name it in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(aside)
        flush(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> None:
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that never changes a second name; a copy where the disk has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        write_whole(target, lambda aside: shutil.copyfile(source, aside))


def write_folder_whole(folder: Union[str, Path], write: Callable[[Path], Any]) -> None:
    """Let `write(aside)` fill a folder beside, then name it, in place of one that had the name."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=str(folder.parent), prefix=f".{folder.name}.", suffix=".part"))
    try:
        write(aside)
        for file in filter(Path.is_file, aside.rglob("*")):
            flush(file)
        os.chmod(aside, 0o755)
        replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(aside: Path, folder: Path) -> None:
    """A folder cannot replace a full one in one step: the old one steps aside first."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def flush(file: Path) -> None:
    """Return when the file's bytes are on the disk."""
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
