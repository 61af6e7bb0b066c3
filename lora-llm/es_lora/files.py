"""Files and folders that appear whole or not at all, and text files as people write them."""

import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Iterable, List, Union

OURS = r"adapter.*|checkpoint.*|model|.+-state|state.*|cs_.+|.+\.(?:safetensors|json|jsonl|html|png)"  # what runs leave
ASIDE = re.compile(rf"\.({OURS})(?:\.\d+\.tmp|(?:\.[a-z0-9_]{{8}})?\.part|\.old)")  # and how it is called until then

# Windows refuses to replace a file that is open: the demo page reads result.json every two seconds.
WAITS_SEC = (0.05,) * 40 if os.name == "nt" else ()


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
    """Let `write(aside)` make the file in a folder of its own, flush it, then name it in one step.

    The folder also holds what a library's writer writes aside (safetensors does), for a kill."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        aside = folder / path.name
        write(aside)
        flush(aside)
        put_in_place(aside, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(aside: Path, path: Path) -> None:
    """Name what was made aside, in one step; on Windows, once no other program reads the old."""
    for wait_sec in WAITS_SEC:
        with suppress(PermissionError):
            return os.replace(aside, path)
        time.sleep(wait_sec)
    os.replace(aside, path)


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
        flush_all(aside)
        os.chmod(aside, 0o755)
        replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(aside: Path, folder: Path) -> None:
    """A folder cannot replace a full one in one step: the old one steps aside first."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        put_in_place(folder, old)
    put_in_place(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def flush_all(folder: Path) -> None:
    """Return when every file of a folder is on the disk."""
    for file in filter(Path.is_file, folder.rglob("*")):
        flush(file)


def flush(file: Path) -> None:
    """Return when the file's bytes are on the disk."""
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def sweep(folder: Union[str, Path]) -> None:
    """Clear away what a killed run left half written in its output folder and just below it.

    A folder that had stepped aside for one that never came gets its name back."""
    for path in [*Path(folder).glob(".*"), *Path(folder).glob("*/.*")]:
        found = ASIDE.fullmatch(path.name)
        if found is None or not path.exists():
            continue
        if path.name.endswith(".old") and not path.with_name(found.group(1)).exists():
            os.replace(path, path.with_name(found.group(1)))
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def refuse_in_the_way(folder: Union[str, Path], files: Iterable[str], folders: Iterable[str] = ()) -> None:
    """Raises ValueError where a folder lies at the place of a file, or a file at a folder's."""
    for name in files:
        if (Path(folder) / name).is_dir():
            raise ValueError(f"{Path(folder) / name} is a folder and in the way of a file: move it, or choose another")
    for name in folders:
        if (Path(folder) / name).is_file():
            raise ValueError(f"{Path(folder) / name} is a file and in the way of a folder: move it, or choose another")
