#!/usr/bin/env python3
"""Put early stopping into a checkout of sd-scripts, musubi-tuner, diffusers or qlora, or take it
out again.

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

from file_transaction import Transaction, remove_empty_folders, roll_back_interrupted
from insertion_points import Insertion, InsertionPointError, find_insertions

HERE = Path(__file__).resolve().parent
VENDORED = HERE.parent / "lora-llm"
HOOKS = ("es_lora_hook.py", "es_lora_diffusers_hook.py", "es_lora_run.py", "es_lora_layers.py")
# What is put beside the trainer, by its name there: the hooks, and the method with its folder.
COPIED: Dict[str, Path] = {
    **{name: HERE / name for name in HOOKS},
    **{
        path.relative_to(VENDORED).as_posix(): path
        for path in (VENDORED / "cs_fluctuation.py", *sorted((VENDORED / "es_lora").rglob("*.py")))
    },
}
RECEIPT = ".es_lora_patch.json"
RECEIPT_FORMAT, OLD_RECEIPT_FORMAT = "es-lora-patch/2", "es-lora-patch/1"


@dataclass(frozen=True)
class Layout:
    """How a checkout of an upstream looks. signs: files that tell it from any other folder.
    trainers: patterns of the files that are patched. beside: the folder that the copied files go
    to. one_by_one: each trainer stands alone, and one that is not clear is left out."""

    upstream: str
    signs: Tuple[str, ...]
    trainers: Tuple[str, ...]
    beside: str = ""
    one_by_one: bool = False


MUSUBI, DREAMBOOTH = "src/musubi_tuner/", "train_dreambooth_lora*.py"
LAYOUTS = (
    Layout("sd-scripts", ("train_network.py", "library/train_util.py", "networks/lora.py"), ("train_network.py",)),
    Layout("qlora", ("qlora.py",), ("qlora.py",)),
    *(
        Layout("musubi-tuner", trainers, trainers, "src")
        for trainers in (
            (f"{MUSUBI}training/trainer_base.py", f"{MUSUBI}training/parser_common.py"),
            (f"{MUSUBI}hv_train_network.py",),  # until v0.2
        )
    ),
    *(
        Layout("diffusers", (f"{folder}{DREAMBOOTH}",), (f"{folder}{DREAMBOOTH}",), folder.rstrip("/"), one_by_one=True)
        for folder in ("examples/dreambooth/", "")
    ),
)


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
class TrainerFile:
    """A file to be patched. name: its place in the checkout. revisions: those it is of; none: an
    unknown one."""

    name: str
    content: bytes
    revisions: List[str] = field(default_factory=list)
    insertions: List[Insertion] = field(default_factory=list)

    @property
    def base_name(self) -> str:
        return self.name.split("/")[-1]


@dataclass
class Checkout:
    """What stands in a folder: its layout, the files to be patched, and the receipt where it is
    patched. left_out: {file: why it is not clear}."""

    root: Path
    layout: Layout
    files: List[TrainerFile]
    receipt: Optional[Dict] = None
    left_out: Dict[str, str] = field(default_factory=dict)

    @property
    def is_known(self) -> bool:
        return all(file.revisions for file in self.files)

    @property
    def revision(self) -> Optional[str]:
        """In words; None where a file is of no known revision."""
        if self.receipt is not None:
            return self.receipt["revision"]
        if not self.is_known:
            return None
        of_all = [name for name in self.files[0].revisions if all(name in file.revisions for file in self.files)]
        if len(of_all) > 1:
            return f"{of_all[0]} (the same there: {', '.join(of_all[1:])})"
        return ", ".join(of_all or dict.fromkeys(name for file in self.files for name in file.revisions))

    def title(self) -> str:
        return (
            f"{self.layout.upstream} {self.revision}"
            if self.revision
            else (f"{self.layout.upstream}, a revision that is not in the table")
        )


def known_revisions() -> Dict[str, Dict]:
    return json.loads((HERE / "revisions.json").read_text(encoding="utf-8"))


def read_checkout(root: Path) -> Checkout:
    """Recognise a folder. Raises Refusal where it is no upstream's, or where its receipt does
    not fit."""
    if not root.is_dir():
        raise Refusal(f"{root} is no folder; give the folder of a checkout of {_in_words(UPSTREAMS)}")
    if (root / RECEIPT).is_file():
        return _read_patched(root)
    found = {layout.upstream: layout for layout in reversed(LAYOUTS) if _is_there(root, layout.signs)}
    if len(found) != 1:
        signs = "; ".join(f"{layout.upstream}: {', '.join(layout.signs)}" for layout in LAYOUTS)
        raise Refusal(
            f"{root} is {'more than one' if found else 'none'} of the checkouts that are known, by their files "
            f"({signs}); give the folder that holds the training script"
        )
    layout = next(iter(found.values()))
    names = [path for pattern in layout.trainers for path in sorted(root.glob(pattern))]
    files = [TrainerFile(path.relative_to(root).as_posix(), path.read_bytes()) for path in names]
    for file in files:
        _recognise(file, layout.upstream)
    return Checkout(root, layout, files)


UPSTREAMS = tuple(dict.fromkeys(layout.upstream for layout in LAYOUTS))


def _in_words(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _is_there(root: Path, patterns: Iterable[str]) -> bool:
    return all(any(root.glob(pattern)) for pattern in patterns)


def _recognise(file: TrainerFile, upstream: str) -> None:
    """The revisions that have this very file, and the places of their patch."""
    hashes = {blob_hash(file.content), blob_hash(with_lf(file.content))}
    for revision, facts in known_revisions()[upstream].items():
        if facts["blobs"].get(file.base_name) in hashes:
            file.revisions += [revision, *facts.get("also", ())]
            patch = HERE / upstream / revision / f"{file.base_name}.patch"
            file.insertions = parse_patch(patch.read_text(encoding="utf-8"))[1]


def _read_patched(root: Path) -> Checkout:
    receipt = json.loads((root / RECEIPT).read_text(encoding="utf-8"))
    if receipt.get("format") == OLD_RECEIPT_FORMAT:
        facts = {key: receipt[key] for key in ("before", "after", "inserted")}
        receipt = {**receipt, "format": RECEIPT_FORMAT, "files": {receipt["file"]: facts}}
    if receipt.get("format") != RECEIPT_FORMAT:
        raise Refusal(f"{root / RECEIPT} has the format {receipt.get('format')!r}; this tool knows {RECEIPT_FORMAT}")
    layout = next(layout for layout in LAYOUTS if layout.upstream == receipt["upstream"])
    layout = replace(layout, beside=receipt.get("beside", ""))
    changed, trainers = [], {name: facts["after"] for name, facts in receipt["files"].items()}
    for name, digest in {**trainers, **receipt["copied"]}.items():
        content = (root / name).read_bytes() if (root / name).is_file() else None
        if content is None or blob_hash(content) != digest:
            changed.append(f"{name} ({'missing' if content is None else 'changed'})")
    if changed:
        raise Refusal(
            f"{root} was patched, and since then: {', '.join(changed)}. Undo those changes and try again. If the "
            f"checkout was updated over the patch, delete {RECEIPT}, {', '.join(_top_level(receipt['copied']))}, "
            f"restore {', '.join(trainers)} from git and apply again"
        )
    return Checkout(root, layout, [TrainerFile(name, (root / name).read_bytes()) for name in trainers], receipt)


def changed_since_commit(root: Path, file: TrainerFile) -> Optional[bool]:
    """Whether the file differs from the checkout's commit; None where git cannot tell."""
    command = ["git", "-c", "safe.directory=*", "-C", str(root), "rev-parse", f"HEAD:./{file.name}"]
    try:
        answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return None
    committed = answer.stdout.decode("ascii", "replace").strip()
    if answer.returncode != 0:
        return None
    return committed not in (blob_hash(file.content), blob_hash(with_lf(file.content)))


def _top_level(names: Iterable[str], beside: str = "") -> List[str]:
    """The files and folders that these names begin with below `beside`, each once."""
    start = f"{beside}/" if beside else ""
    return list(dict.fromkeys(start + name[len(start) :].split("/")[0] for name in names))


def _places(checkout: Checkout) -> str:
    """The insertions, one a line, for the person to look at, and the files without any."""
    shown = []
    for file in checkout.files:
        for insertion in file.insertions:
            code = " ".join(text.strip() for text in insertion.lines)
            shown.append(f"  {file.name}, after line {insertion.after_line}: {code}")
    return "\n".join([*shown, *_left_out(checkout)])


def _left_out(checkout: Checkout) -> List[str]:
    return [f"  left as it is: {name}: {reason}" for name, reason in checkout.left_out.items()]


def _find_by_structure(checkout: Checkout) -> None:
    """Insertions for files that no hash knows. Raises Refusal for local changes and for points
    that do not fit."""
    for file in [file for file in checkout.files if not file.revisions]:
        if changed_since_commit(checkout.root, file):
            raise Refusal(
                f"{checkout.root / file.name} has local changes; commit them, or put them aside (git stash), and try "
                "again"
            )
        try:
            source = with_lf(file.content).decode("utf-8-sig")
            file.insertions = find_insertions(checkout.layout.upstream, file.name, source)
        except (InsertionPointError, UnicodeDecodeError) as error:
            checkout.left_out[file.name] = str(error)
    clear = [file for file in checkout.files if file.name not in checkout.left_out]
    if checkout.left_out and not (checkout.layout.one_by_one and clear):
        reasons = "; ".join(checkout.left_out.values())
        raise Refusal(f"{checkout.title()}, and not every place for early stopping is clear. {reasons}")
    checkout.files = clear


# -------------------------------------------------------------------------------------------- doing


def apply(checkout: Checkout, yes: bool, dry_run: bool) -> str:
    copies = {f"{checkout.layout.beside}/{name}".lstrip("/"): path for name, path in COPIED.items()}
    if checkout.receipt is not None:
        put = checkout.receipt["copied"]
        stale = [name for name, path in copies.items() if blob_hash(path.read_bytes()) != put.get(name)]
        if not stale and put.keys() == copies.keys():
            return f"{checkout.title()}: already applied, nothing to do."
        raise Refusal(f"applied by another version ({', '.join(stale)} differ); run --reverse, then apply again")
    if not checkout.is_known:
        _find_by_structure(checkout)
        if not (yes or dry_run):
            told = all(changed_since_commit(checkout.root, file) is False for file in checkout.files)
            local = "" if told else " (or local changes: git cannot tell here)"
            raise NeedsConsent(
                f"{checkout.title()}{local}. Nothing is changed yet; it would insert\n{_places(checkout)}\n"
                "If these places are right, run the command again with --yes"
            )
    absent = [str(path) for path in copies.values() if not path.is_file()]
    if absent:
        raise Refusal(f"{', '.join(absent)} missing; run this tool from a whole copy of ES-LoRA")
    beside = _top_level(copies, checkout.layout.beside)
    taken = [name for name in beside if (checkout.root / name).exists()]
    if taken:
        raise Refusal(
            f"{checkout.root} already has {', '.join(taken)}, not put there by this tool; move them away first"
        )
    if dry_run:
        what = f"would insert\n{_places(checkout)}\nand copy in {', '.join(beside)}"
        return f"{checkout.title()}: {what}. Nothing is changed."
    _write(checkout, {name: path.read_bytes() for name, path in copies.items()})
    counts = [(file.name, sum(len(insertion.lines) for insertion in file.insertions)) for file in checkout.files]
    more = "\n".join([f"{name} has {count} more lines." for name, count in counts] + _left_out(checkout))
    return (
        f"{checkout.title()}: early stopping is in.\n{more}\n{', '.join(beside)} lie there too. "
        "Add --early_stop to your training command.\n"
        f"To take it out: python {Path(__file__).name} {checkout.root} --reverse"
    )


def _write(checkout: Checkout, copies: Dict[str, bytes]) -> None:
    """All of it or nothing; the trainers last: before that the new files do nothing."""
    patched, facts = {}, {}
    for file in checkout.files:
        patched[file.name], ranges = insert_lines(file.content, file.insertions)
        hashes = {"before": blob_hash(file.content), "after": blob_hash(patched[file.name])}
        facts[file.name] = {**hashes, "inserted": ranges}
    receipt = {
        "format": RECEIPT_FORMAT,
        "upstream": checkout.layout.upstream,
        "revision": checkout.revision,
        "beside": checkout.layout.beside,
        "files": facts,
        "copied": {name: blob_hash(content) for name, content in copies.items()},
    }
    with Transaction(checkout.root) as change:
        for name, content in copies.items():
            change.write(name, content)
        change.write(RECEIPT, (json.dumps(receipt, indent=1) + "\n").encode("utf-8"))
        for name, content in patched.items():
            change.write(name, content)


def reverse(checkout: Checkout, dry_run: bool) -> str:
    receipt = checkout.receipt
    if receipt is None:
        return f"{checkout.title()}: not patched, nothing to do."
    originals, trainers = {}, ", ".join(receipt["files"])
    for file in checkout.files:
        facts = receipt["files"][file.name]
        originals[file.name] = remove_lines(file.content, facts["inserted"])
        if blob_hash(originals[file.name]) != facts["before"]:
            raise Refusal(f"{checkout.root / RECEIPT} does not fit {file.name}; restore that file from git instead")
    if dry_run:
        return f"{checkout.title()}: would take early stopping out of {trainers}. Nothing is changed."
    with Transaction(checkout.root) as change:
        for name, original in originals.items():
            change.write(name, original)
        for name in (*receipt["copied"], RECEIPT):
            change.delete(name)
    for name in receipt["copied"]:
        compiled = (checkout.root / name).parent / "__pycache__"
        for file in compiled.glob(f"{Path(name).stem}.*.pyc"):
            file.unlink()
    remove_empty_folders(checkout.root, receipt["copied"])
    return f"{checkout.title()}: early stopping is out, and as before, byte for byte: {trainers}."


def check(checkout: Checkout) -> str:
    if checkout.receipt is not None:
        return f"{checkout.title()}: patched, and as the tool left it."
    if checkout.is_known:
        return f"{checkout.title()}: not patched; can be."
    _find_by_structure(checkout)
    return f"{checkout.title()}: not patched; can be with --yes. It would insert\n{_places(checkout)}"


def parse_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Put early stopping into a checkout of {_in_words(UPSTREAMS)}, or take it out.", allow_abbrev=False
    )
    parser.add_argument("checkout", type=Path, help="the folder of the checkout, or for diffusers of the scripts")
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
