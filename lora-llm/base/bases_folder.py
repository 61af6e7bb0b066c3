"""`.bases` in the project: bases that were converted once, each whole or not there."""

import shutil
import time
from pathlib import Path
from typing import Any, Callable

from es_lora.files import write_folder_whole

BASES_FOLDER = Path(__file__).resolve().parents[2] / ".bases"
ABANDONED_SEC = 3600


def convert_once(folder: Path, what: str, write: Callable[[Path], Any]) -> Path:
    """`folder`, filled by `write(aside)` where it is not there yet.

    What a killed conversion left is taken away an hour later; it never has the folder's name.
    """
    if folder.is_dir():
        return folder
    for part in folder.parent.glob(f".{folder.name}.*.part"):
        if time.time() - part.stat().st_mtime > ABANDONED_SEC:
            shutil.rmtree(part, ignore_errors=True)
    print(f"Converting {what} into {folder} (once) ...", flush=True)
    write_folder_whole(folder, write)
    return folder
