"""What a kill leaves at every write of one run, and whether each such folder can be gone on with.

    .venv-llm/bin/python tests/faults/write_boundaries.py text
    .venv-ldm/bin/python tests/faults/write_boundaries.py image
    .venv-llm/bin/python tests/faults/write_boundaries.py jobs

A run is watched: before each file of its output folder is opened for writing, renamed, linked,
removed, and before each folder is made, the folder is copied as it is. A kill there leaves exactly
that. Where a file was being written, there are copies with it torn at half and empty. Each copy is
gone on with as a person would, and compared with the undisturbed run. Exit code 1 where one
differs, or where a file under a final name is torn."""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

from run_kinds import KINDS, digest, left_over, settings_of
from tqdm import tqdm

# The rounds of kills.py whose settings are taken, and what makes their runs short.
RUNS = {
    "text": (2, ["--max_steps", 8, "--max_train_samples", 12]),
    "image": (2, ["--max_train_steps", 8, "--sample_every_n_steps", 5]),
    "jobs": (0, []),
}
WRITES = os.O_WRONLY | os.O_RDWR
PLACES = {"os.rename": (1, 3), "os.link": (1, 3), "os.remove": (0, 1), "os.rmdir": (0, 1), "os.mkdir": (0, 2)}


class Watch:
    """Copies `folder` into `copies` before each change; twins of the same content once."""

    def __init__(self, folder: Path, copies: Path):
        self.folder, self.copies = folder, copies
        self.seen, self.lock, self.busy, self.written = set(), threading.Lock(), threading.local(), None

    def start(self):
        """Called in the child that runs. safetensors writes past Python: it is wrapped."""
        import safetensors.torch
        import torch

        for module, name, place in ((safetensors.torch, "save_file", 1), (torch, "save", 1)):
            self._wrap(getattr(module, name), name, place)
        sys.addaudithook(self._hook)

    def _wrap(self, function, name, place):
        def watched(*words, **more):
            result = function(*words, **more)
            target = words[place] if len(words) > place else more.get("filename", more.get("f"))
            if isinstance(target, (str, os.PathLike)):
                self._changes(os.fsdecode(target), written=True)
            return result

        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is function:
                setattr(module, name, watched)

    def _hook(self, event, words):
        if event == "open" and isinstance(words[2], int) and words[2] & WRITES:
            reads = isinstance(words[1], str) and words[1].startswith("r")
            self._changes(words[0], written=not reads)
        elif event in PLACES:
            path, folder = PLACES[event]
            self._changes(words[path], words[folder] if len(words) > folder else -1)

    def _changes(self, path, folder=-1, written=False):
        if getattr(self.busy, "now", False) or not isinstance(path, (str, bytes, os.PathLike)):
            return
        path = os.fsdecode(path)
        if not os.path.isabs(path):
            beneath = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else os.getcwd()
            path = os.path.join(beneath, path)
        if not path.startswith(f"{self.folder}/"):
            return
        self.busy.now = True
        try:
            with self.lock:
                self._copy(os.path.relpath(path, self.folder))
                self.written = Path(path) if written else None
        finally:
            self.busy.now = False

    def _copy(self, changed):
        if not self.folder.is_dir():
            return
        torn = self.written
        self._keep(f"before {changed}", None, 0)
        if torn is not None and torn.is_file() and torn.stat().st_size:
            for size in sorted({0, torn.stat().st_size // 2}):
                self._keep(f"{torn.relative_to(self.folder)} torn at {size} bytes", torn, size)

    def _keep(self, label, torn, size):
        content = tuple(sorted((str(p), digest(p)) for p in self.folder.rglob("*"))) + (torn, size)
        if content in self.seen:
            return
        self.seen.add(content)
        target = self.copies / f"{len(self.seen):04d}"
        shutil.copytree(self.folder, target, symlinks=True)
        (self.copies / f"{target.name}.label").write_text(label)
        if torn is not None:
            os.truncate(target / torn.relative_to(self.folder), size)


def torn_files(folder):
    """Files under a final name that cannot be read."""
    from safetensors import safe_open

    wrong = []
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if not path.is_file() or "/." in f"/{name}":
            continue
        try:
            if path.suffix == ".safetensors":
                with safe_open(str(path), "pt") as handle:
                    [handle.get_tensor(key) for key in handle.keys()]
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".html":
                path.read_text().index("</html>")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}")
    return wrong


def gone_on_with(kind, words, folder, expected):
    """(verdict, detail) of one copy, which lies in the output folder."""
    torn = torn_files(folder)
    more = kind.resume(folder)
    for _ in range(3):
        ended = kind.forked.run(kind.program, [*words, "--output_dir", folder, *more])
        again = kind.anew(ended, folder) if ended.code == 2 else None
        if again is None:
            break
        more = again
    if ended.code != 0:
        return f"ended with {ended.code}", ended.last_line
    found = kind.facts(folder)
    different = {key: [expected[key], found[key]] for key in expected if expected[key] != found[key]}
    if torn:
        return "torn", torn
    if different or left_over(folder):
        return "different", different or left_over(folder)
    return "equal", ""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--every", type=int, default=1, help="go on with every n-th copy alone")
    arguments = parser.parse_args(argv)
    scratch = Path(tempfile.mkdtemp(prefix=f"writes-{arguments.kind}-"))
    kind, folder, copies = KINDS[arguments.kind](scratch), scratch / "run", scratch / "copies"
    copies.mkdir()
    number, shorter = RUNS[arguments.kind]
    words = [*settings_of(kind, 0, number), *shorter]
    kind.forked.run(kind.program, [*words, "--output_dir", folder])
    expected = kind.facts(folder)
    shutil.rmtree(folder)
    watched = Watch(folder, copies).start
    ended = kind.forked.run(kind.program, [*words, "--output_dir", folder], before=watched, longest_sec=900)
    if ended.code != 0 or kind.facts(folder) != expected:
        print(f"the watched run is not as the undisturbed one: {ended.last_line}")
        return 1
    counts, labels = Counter(), sorted(copies.glob("*.label"))[:: arguments.every]
    for label in tqdm(labels, desc="folders"):
        shutil.rmtree(folder)
        shutil.copytree(label.with_suffix(""), folder, symlinks=True)
        verdict, detail = gone_on_with(kind, words, folder, expected)
        counts[verdict] += 1
        if not verdict.startswith("equal"):
            print(json.dumps({"copy": label.stem, "at": label.read_text(), verdict: detail}, default=str), flush=True)
    print(f"{len(labels)} folders of {len(list(copies.glob('*.label')))}: {dict(counts)}")
    wrong = sum(count for verdict, count in counts.items() if not verdict.startswith("equal"))
    if not wrong:
        shutil.rmtree(scratch, ignore_errors=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
