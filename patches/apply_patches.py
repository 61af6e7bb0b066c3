#!/usr/bin/env python3
"""Put early stopping into an existing sd-scripts or qlora checkout, or take it out again.

    python apply_patches.py CHECKOUT              apply (does nothing where it is already applied)
    python apply_patches.py CHECKOUT --check      say what it is and whether it is patched
    python apply_patches.py CHECKOUT --dry-run    show what would be done
    python apply_patches.py CHECKOUT --reverse    give the checkout back byte for byte
    python apply_patches.py CHECKOUT --yes        apply to a revision that is not in the table, at
                                                  the places shown

--check and --dry-run change nothing.

Needs Python 3.8 and nothing else. Exit codes: 0 done, or nothing to do; 1 an unknown revision that
waits for --yes; 2 refused, nothing changed.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

from file_transaction import Transaction, remove_empty_folders, roll_back_interrupted
from insertion_points import Insertion, InsertionPointError, find_insertions

HERE = Path(__file__).resolve().parent
VENDORED = HERE.parent / "lora-llm"
# What is put beside the trainer, by its name there: the hook, and the method with its folder.
COPIED: Dict[str, Path] = {
    **{name: HERE / name for name in ("es_lora_hook.py", "es_lora_run.py", "es_lora_layers.py")},
    **{
        path.relative_to(VENDORED).as_posix(): path
        for path in (VENDORED / "cs_fluctuation.py", *sorted((VENDORED / "es_lora").rglob("*.py")))
    },
}
RECEIPT = ".es_lora_patch.json"
RECEIPT_FORMAT = "es-lora-patch/1"
# The file that is patched, and the files that tell the upstream from any other folder.
UPSTREAMS = {
    "sd-scripts": ("train_network.py", ("train_network.py", "library/train_util.py", "networks/lora.py")),
    "qlora": ("qlora.py", ("qlora.py",)),
}


class Refusal(Exception):
    """The checkout stays as it is; the message says why and what to do."""


class NeedsConsent(Refusal):
    """An unknown revision: possible, but only after a look at the places."""


def blob_hash(content: bytes) -> str:
    """The name git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def with_lf(content: bytes) -> bytes:
    return content.replace(b"\r\n", b"\n")


# ------------------------------------------------------------------------------------------ patches


def parse_patch(text: str) -> Tuple[str, List[Insertion]]:
    """(file name, insertions) of one of our patch files: added lines only, no context."""
    name, insertions, lines = "", [], text.split("\n")
    for number, line in enumerate(lines):
        if line.startswith("+++ "):
            name = line[4:].split("\t")[0].split("/", 1)[1]
        elif line.startswith("@@ "):
            after_line, count = re.match(r"@@ -(\d+),0 \+\d+(?:,(\d+))? @@", line).groups()
            added = lines[number + 1 : number + 1 + int(count or 1)]
            insertions.append(Insertion("", int(after_line), tuple(text[1:] for text in added)))
    return name, insertions


def write_patch(name: str, insertions: Sequence[Insertion]) -> str:
    """The text of a patch file that `git apply --unidiff-zero` takes."""
    parts, shift = [f"--- a/{name}\n+++ b/{name}\n"], 0
    for insertion in insertions:
        count = len(insertion.lines)
        parts.append(f"@@ -{insertion.after_line},0 +{insertion.after_line + shift + 1},{count} @@\n")
        parts += [f"+{line}\n" for line in insertion.lines]
        shift += count
    return "".join(parts)


def insert_lines(content: bytes, insertions: Sequence[Insertion]) -> Tuple[bytes, List[List[int]]]:
    """(content with the new lines in the file's own line ends, [[first new line, how many],
    ...])."""
    end = b"\r\n" if b"\r\n" in content else b"\n"
    lines, new, ranges, done = content.split(b"\n"), [], [], 0
    for insertion in insertions:
        new += lines[done : insertion.after_line]
        done = insertion.after_line
        ranges.append([len(new) + 1, len(insertion.lines)])
        new += [line.encode("utf-8") + end[:-1] for line in insertion.lines]
    return b"\n".join(new + lines[done:]), ranges


def remove_lines(content: bytes, ranges: Sequence[Sequence[int]]) -> bytes:
    lines = content.split(b"\n")
    for first, count in reversed(ranges):
        del lines[first - 1 : first - 1 + count]
    return b"\n".join(lines)


# ------------------------------------------------------------------------------------- the checkout


@dataclass
class Checkout:
    """What stands in a folder: upstream, file to be patched, revision (None: unknown), insertions,
    receipt."""

    root: Path
    upstream: str = ""
    file_name: str = ""
    content: bytes = b""
    revision: Optional[str] = None
    also: Sequence[str] = ()  # other revisions with the same file
    insertions: List[Insertion] = field(default_factory=list)
    receipt: Optional[Dict] = None

    @property
    def file(self) -> Path:
        return self.root / self.file_name

    def title(self) -> str:
        if self.revision is None:
            return f"{self.upstream}, a revision that is not in the table"
        return f"{self.upstream} {self.revision}" + (f" (same file: {', '.join(self.also)})" if self.also else "")


def known_revisions() -> Dict[str, Dict]:
    return json.loads((HERE / "revisions.json").read_text(encoding="utf-8"))


def read_checkout(root: Path) -> Checkout:
    """Recognise a folder. Raises Refusal where it is neither upstream, or where its receipt does
    not fit."""
    if not root.is_dir():
        raise Refusal(f"{root} is no folder; give the folder of an sd-scripts or qlora checkout")
    if (root / RECEIPT).is_file():
        return _read_patched(root)
    found = [name for name, (_, signs) in UPSTREAMS.items() if all((root / sign).is_file() for sign in signs)]
    if len(found) != 1:
        raise Refusal(
            f"{root} is neither an sd-scripts checkout (train_network.py, library/train_util.py, networks/lora.py) nor "
            "a qlora checkout (qlora.py); give the folder that holds the training script"
        )
    checkout = Checkout(root, found[0], UPSTREAMS[found[0]][0])
    checkout.content = checkout.file.read_bytes()
    hashes = {blob_hash(checkout.content), blob_hash(with_lf(checkout.content))}
    for revision, facts in known_revisions()[checkout.upstream].items():
        if facts["blob"] in hashes:
            checkout.revision, checkout.also = revision, facts.get("also", ())
            patch = HERE / checkout.upstream / revision / f"{checkout.file_name}.patch"
            checkout.insertions = parse_patch(patch.read_text(encoding="utf-8"))[1]
    return checkout


def _read_patched(root: Path) -> Checkout:
    receipt = json.loads((root / RECEIPT).read_text(encoding="utf-8"))
    if receipt.get("format") != RECEIPT_FORMAT:
        raise Refusal(f"{root / RECEIPT} has the format {receipt.get('format')!r}; this tool knows {RECEIPT_FORMAT}")
    checkout = Checkout(root, receipt["upstream"], receipt["file"], revision=receipt["revision"], receipt=receipt)
    changed = []
    for name, digest in {receipt["file"]: receipt["after"], **receipt["copied"]}.items():
        content = (root / name).read_bytes() if (root / name).is_file() else None
        if content is None or blob_hash(content) != digest:
            changed.append(f"{name} ({'missing' if content is None else 'changed'})")
    if changed:
        raise Refusal(
            f"{root} was patched, and since then: {', '.join(changed)}. Undo those changes and try again. If the "
            f"checkout was updated over the patch, delete {RECEIPT}, {', '.join(_top_level(receipt['copied']))}, "
            f"restore {receipt['file']} from git and apply again"
        )
    checkout.content = checkout.file.read_bytes()
    return checkout


def changed_since_commit(checkout: Checkout) -> Optional[bool]:
    """Whether the file differs from the checkout's commit; None where git cannot tell."""
    command = ["git", "-c", "safe.directory=*", "-C", str(checkout.root), "rev-parse", f"HEAD:./{checkout.file_name}"]
    try:
        answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return None
    committed = answer.stdout.decode("ascii", "replace").strip()
    if answer.returncode != 0:
        return None
    return committed not in (blob_hash(checkout.content), blob_hash(with_lf(checkout.content)))


def _top_level(names: Iterable[str]) -> List[str]:
    """The files and folders that these names begin with, each once."""
    return list(dict.fromkeys(name.split("/")[0] for name in names))


def _places(checkout: Checkout) -> str:
    """The insertions, one a line, for the person to look at."""
    shown = []
    for insertion in checkout.insertions:
        code = " ".join(text.strip() for text in insertion.lines)
        shown.append(f"  {checkout.file_name}, after line {insertion.after_line}: {code}")
    return "\n".join(shown)


def _find_by_structure(checkout: Checkout) -> None:
    """Insertions for a revision that no hash knows. Raises Refusal for local changes and for points
    that do not fit."""
    changed = changed_since_commit(checkout)
    if changed:
        raise Refusal(f"{checkout.file} has local changes; commit them, or put them aside (git stash), and try again")
    try:
        checkout.insertions = find_insertions(
            checkout.upstream, checkout.file_name, with_lf(checkout.content).decode("utf-8-sig")
        )
    except (InsertionPointError, UnicodeDecodeError) as error:
        raise Refusal(f"{checkout.title()}, and not every place for early stopping is clear. {error}") from error


# -------------------------------------------------------------------------------------------- doing


def apply(checkout: Checkout, yes: bool, dry_run: bool) -> str:
    if checkout.receipt is not None:
        stale = [
            name
            for name, path in COPIED.items()
            if blob_hash(path.read_bytes()) != checkout.receipt["copied"].get(name)
        ]
        if not stale and checkout.receipt["copied"].keys() == COPIED.keys():
            return f"{checkout.title()}: already applied, nothing to do."
        raise Refusal(f"applied by another version ({', '.join(stale)} differ); run --reverse, then apply again")
    if checkout.revision is None:
        _find_by_structure(checkout)
        if not (yes or dry_run):
            local = "" if changed_since_commit(checkout) is False else " (or local changes: git cannot tell here)"
            raise NeedsConsent(
                f"{checkout.title()}{local}. Nothing is changed yet; it would insert\n{_places(checkout)}\n"
                "If these places are right, run the command again with --yes"
            )
    absent = [str(path) for path in COPIED.values() if not path.is_file()]
    if absent:
        raise Refusal(f"{', '.join(absent)} missing; run this tool from a whole copy of ES-LoRA")
    taken = [name for name in _top_level(COPIED) if (checkout.root / name).exists()]
    if taken:
        raise Refusal(
            f"{checkout.root} already has {', '.join(taken)}, not put there by this tool; move them away first"
        )
    patched, ranges = insert_lines(checkout.content, checkout.insertions)
    copies = {name: path.read_bytes() for name, path in COPIED.items()}
    receipt = {
        "format": RECEIPT_FORMAT,
        "upstream": checkout.upstream,
        "revision": checkout.revision,
        "file": checkout.file_name,
        "before": blob_hash(checkout.content),
        "after": blob_hash(patched),
        "inserted": ranges,
        "copied": {name: blob_hash(content) for name, content in copies.items()},
    }
    if dry_run:
        what = f"would insert\n{_places(checkout)}\nand copy in {', '.join(_top_level(copies))}"
        return f"{checkout.title()}: {what}. Nothing is changed."
    with Transaction(checkout.root) as change:  # the trainer last: before that the new files do nothing
        for name, content in copies.items():
            change.write(name, content)
        change.write(RECEIPT, (json.dumps(receipt, indent=1) + "\n").encode("utf-8"))
        change.write(checkout.file_name, patched)
    return (
        f"{checkout.title()}: early stopping is in. {checkout.file_name} has {sum(count for _, count in ranges)} more "
        f"lines; {', '.join(_top_level(copies))} lie beside it. Add --early_stop to your training command.\n"
        f"To take it out: python {Path(__file__).name} {checkout.root} --reverse"
    )


def reverse(checkout: Checkout, dry_run: bool) -> str:
    receipt = checkout.receipt
    if receipt is None:
        return f"{checkout.title()}: not patched, nothing to do."
    original = remove_lines(checkout.content, receipt["inserted"])
    if blob_hash(original) != receipt["before"]:
        raise Refusal(f"{checkout.root / RECEIPT} does not fit {receipt['file']}; restore that file from git instead")
    if dry_run:
        return f"{checkout.title()}: would take early stopping out of {receipt['file']}. Nothing is changed."
    with Transaction(checkout.root) as change:
        change.write(receipt["file"], original)
        for name in (*receipt["copied"], RECEIPT):
            change.delete(name)
    for name in receipt["copied"]:
        compiled = (checkout.root / name).parent / "__pycache__"
        for file in compiled.glob(f"{Path(name).stem}.*.pyc"):
            file.unlink()
    remove_empty_folders(checkout.root, receipt["copied"])
    return f"{checkout.title()}: early stopping is out; {receipt['file']} is as it was, byte for byte."


def check(checkout: Checkout) -> str:
    if checkout.receipt is not None:
        return f"{checkout.title()}: patched, and as the tool left it."
    if checkout.revision is not None:
        return f"{checkout.title()}: not patched; can be."
    _find_by_structure(checkout)
    return f"{checkout.title()}: not patched; can be with --yes. It would insert\n{_places(checkout)}"


def parse_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Put early stopping into an sd-scripts or qlora checkout, or take it out.", allow_abbrev=False
    )
    parser.add_argument("checkout", type=Path, help="folder that holds train_network.py or qlora.py")
    parser.add_argument("--check", action="store_true", help="say what it is and whether it is patched; change nothing")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done; change nothing")
    parser.add_argument("--reverse", action="store_true", help="give the checkout back byte for byte")
    parser.add_argument("--yes", action="store_true", help="apply to a revision that is not in the table")
    arguments = parser.parse_args(argv)
    if arguments.check and arguments.reverse:
        parser.error("--check and --reverse exclude each other")
    return arguments


def _stop_on_signal(number, _frame):
    raise SystemExit(128 + number)  # a raised exception rolls the transaction back


def main(argv: Optional[Sequence[str]] = None) -> int:
    arguments = parse_arguments(argv)
    signal.signal(signal.SIGTERM, _stop_on_signal)
    root = Path(os.path.abspath(str(arguments.checkout)))
    try:
        if roll_back_interrupted(root, dry_run=arguments.check or arguments.dry_run):
            print("An earlier run was interrupted; the checkout is as it was before that run.")
        checkout = read_checkout(root)
        if arguments.check:
            print(check(checkout))
        elif arguments.reverse:
            print(reverse(checkout, arguments.dry_run))
        else:
            print(apply(checkout, arguments.yes, arguments.dry_run))
    except (Refusal, OSError, ValueError) as error:
        print(f"apply_patches: {error}", file=sys.stderr)
        return 1 if isinstance(error, NeedsConsent) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
