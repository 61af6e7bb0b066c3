"""Several files of one folder change together or not at all.

Before the first change, everything needed to go back is on disk in a journal folder, which appears
whole. While it is there the change is unfinished: an exception goes back at once, and after a kill
the next run does.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Dict, Iterable, List, Optional

JOURNAL = ".es_lora_journal"


class UnfinishedError(ValueError):
    """A change was interrupted and has not been rolled back."""


def _write_whole(path: Path, content: bytes, mode: Optional[int] = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.es_lora_tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Transaction:
    """`with Transaction(root) as change: change.write(name, bytes); change.delete(name)` - done in
    order at the end."""

    def __init__(self, root: Path):
        self.root = root
        self._changes: List = []

    def write(self, name: str, content: bytes) -> None:
        self._changes.append((name, content))

    def delete(self, name: str) -> None:
        self._changes.append((name, None))

    def __enter__(self) -> "Transaction":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            return
        try:
            self._write_journal()
            for name, content in self._changes:
                path = self.root / name
                if content is None:
                    path.unlink()
                else:
                    _write_whole(path, content, path.stat().st_mode if path.exists() else None)
            _drop_journal(self.root)
        except BaseException:
            roll_back_interrupted(self.root)
            raise

    def _write_journal(self) -> None:
        folder = self.root / f"{JOURNAL}.tmp"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        saved: Dict[str, Optional[str]] = {}  # name -> its copy in the journal, None where there was no such file
        for number, (name, _) in enumerate(self._changes):
            path = self.root / name
            saved[name] = f"file-{number}" if path.exists() else None
            if path.exists():
                _write_whole(folder / f"file-{number}", path.read_bytes(), path.stat().st_mode)
        _write_whole(folder / "journal.json", json.dumps(saved).encode("utf-8"))
        os.replace(folder, self.root / JOURNAL)


def _drop_journal(root: Path) -> None:
    """By a rename first, so that a kill here does not leave half a journal that looks whole."""
    trash = root / f"{JOURNAL}.tmp"
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(root / JOURNAL, trash)
    shutil.rmtree(trash)


def roll_back_interrupted(root: Path, dry_run: bool = False) -> bool:
    """Give a folder back as it was before an unfinished change; whether there was one.

    Raises UnfinishedError instead of changing anything where dry_run is set.
    """
    journal = root / JOURNAL
    if journal.is_dir() and dry_run:
        raise UnfinishedError(
            f"{root}: an earlier run was interrupted; run this tool without --check or --dry-run to undo it"
        )
    if not dry_run:
        shutil.rmtree(root / f"{JOURNAL}.tmp", ignore_errors=True)
    if not journal.is_dir():
        return False
    saved = json.loads((journal / "journal.json").read_text(encoding="utf-8"))
    for name, copy in reversed(list(saved.items())):  # the trainer was changed last: it goes back first
        path = root / name
        path.with_name(f".{path.name}.es_lora_tmp").unlink(missing_ok=True)
        if copy is None:
            path.unlink(missing_ok=True)
        else:
            _write_whole(path, (journal / copy).read_bytes(), (journal / copy).stat().st_mode)
    remove_empty_folders(root, saved)
    _drop_journal(root)
    return True


def remove_empty_folders(root: Path, names: Iterable[str]) -> None:
    """Remove the folders below `root` that files of these names lay in, as far as nothing is in
    them any more."""
    folders = {parent for name in names for parent in (root / name).parents if root in parent.parents}
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        for empty in (folder / "__pycache__", folder):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
