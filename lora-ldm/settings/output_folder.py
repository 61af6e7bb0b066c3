"""What lies in the output folder before a run: an earlier run, or something that is in the way."""

import re
from argparse import Namespace
from pathlib import Path

from es_lora.history import HISTORY_NAME
from es_lora.outcome import REPORT_NAME, RESULT_NAME
from es_lora.snapshots import SNAPSHOT_FOLDER

RECORDS = (RESULT_NAME, REPORT_NAME, HISTORY_NAME)
FOLDERS = (SNAPSHOT_FOLDER, "sample")
LONGEST_NAME_BYTES = 180  # file systems end at 255, and what is written aside has a longer name
SHOWN = 4


def output_problems(args: Namespace) -> list[str]:
    """Why a run may not write to --output_dir under --output_name, as lines; empty where it may."""
    problems = name_problems("last" if args.output_name is None else args.output_name)
    if not args.output_dir or problems:
        return problems
    folder = Path(args.output_dir)
    try:
        return folder_problems(folder) or in_the_way(folder, args) or earlier_run(folder, args)
    except OSError as error:
        return [f"--output_dir {folder} cannot be looked at: {error.strerror or error}; choose another output folder"]


def name_problems(name: str) -> list[str]:
    """Why a text is no name for a file inside the folder."""
    shown = f"--output_name {name!r:.80}"
    if not name or name in (".", ".."):
        return [f"{shown} names no file: give a name without ending, or leave it out for 'last'"]
    if re.search(r"[/\\\x00-\x1f]", name):
        return [f"{shown} leaves the output folder: give a plain name, and the place by --output_dir"]
    if len(name.encode(errors="replace")) > LONGEST_NAME_BYTES:
        return [f"{shown} is too long: {LONGEST_NAME_BYTES} bytes are the most"]
    return []


def folder_problems(folder: Path) -> list[str]:
    """Whether the folder is none and cannot be made."""
    place = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
    if place.is_dir() or not place.exists():
        return []
    where = "is a file" if place == folder else f"lies below {place}, which is a file"
    return [f"--output_dir {folder} {where}: name a folder"]


def in_the_way(folder: Path, args: Namespace) -> list[str]:
    """Folders with the name of a file that is to be written, and files with that of a folder."""
    files, folders = [folder / name for name in RECORDS], [folder / name for name in FOLDERS]
    for path in _entries(folder):
        if _own(args).fullmatch(path.name):
            (folders if args.train_full_unet or path.name.endswith("-state") else files).append(path)
    lines = [f"{path.name} is a folder, a file is to be written there" for path in files if path.is_dir()]
    lines += [f"{path.name} is a file, a folder is to be made there" for path in folders if path.is_file()]
    fix = "move it away, or choose another output folder"
    return [f"--output_dir {folder}: {line}; {fix}" for line in lines]


def earlier_run(folder: Path, args: Namespace) -> list[str]:
    """What an earlier run left that this one would write over. A run that is resumed from its own
    folder goes on there."""
    if args.resume and Path(args.resume).resolve().parent == folder.resolve():
        return []
    found = sorted(path.name for path in _entries(folder) if path.name in RECORDS or _own(args).fullmatch(path.name))
    if not found:
        return []
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    states = [name for name in found if name.endswith("-state")]
    fix = f", or go on with --resume {folder / states[-1]}" if states else ""
    shown = ", ".join(found[:SHOWN]) + more
    return [f"--output_dir {folder} holds {shown} of another run; choose another output folder{fix}"]


def _entries(folder):
    return list(folder.iterdir()) if folder.is_dir() else []


def _own(args):
    """The pattern of all names of weights and states that a run with this output name writes."""
    kind = "safetensors" if args.use_safetensors else args.save_model_as or "safetensors"
    suffix = "" if args.train_full_unet else re.escape(f".{kind}")
    name = re.escape("last" if args.output_name is None else args.output_name)
    return re.compile(rf"{name}(?:-last|-turning-point|-\d{{6}}|-step\d{{8}})?(?:{suffix}|-state)")
