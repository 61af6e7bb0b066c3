"""Synthetic checkouts, their git repositories, and tables of revisions that know them."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import apply_patches
from insertion_points import find_insertions

SYNTHETIC = Path(__file__).resolve().parent / "synthetic"
# The file that trains, the script that a person runs, and the folder that the copied files go to.
FILES = {
    "sd-scripts": "train_network.py",
    "qlora": "qlora.py",
    "musubi-tuner": "src/musubi_tuner/training/trainer_base.py",
    "diffusers": "examples/dreambooth/train_dreambooth_lora.py",
}
SCRIPTS = {**FILES, "musubi-tuner": "wan_train_network.py"}
BESIDE = {"sd-scripts": "", "qlora": "", "musubi-tuner": "src", "diffusers": "examples/dreambooth"}
HOOKS = {**dict.fromkeys(FILES, "es_lora_hook"), "diffusers": "es_lora_diffusers_hook"}


def make_checkout(upstream, folder, line_end=b"\n"):
    shutil.copytree(SYNTHETIC / upstream.replace("-", "_"), folder, ignore=shutil.ignore_patterns("__pycache__"))
    if upstream == "musubi-tuner":
        package, toys = folder / "src" / "musubi_tuner", SYNTHETIC / "sd_scripts"
        shutil.copyfile(toys / "library" / "train_util.py", package / "toy_accelerator.py")
        shutil.copyfile(toys / "networks" / "lora.py", package / "toy_network.py")
    for path in folder.rglob("*.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", line_end))
    return folder


def commit(folder):
    """Make the folder a git repository whose only commit holds what is there."""
    name = ["-c", "user.name=T", "-c", "user.email=t@example.invalid", "-c", "core.autocrlf=false"]
    for command in (["init", "-q"], ["add", "-A"], [*name, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder


def git(repository, *arguments):
    return subprocess.run(["git", "-C", repository, *arguments], check=True, stdout=subprocess.PIPE).stdout


def write_out(repository, revision, folder):
    """The files of a revision that tell its upstream, and its trainers, as a committed checkout."""
    for name in git(repository, "ls-tree", "-r", "--name-only", revision).decode().split("\n"):
        if any(fnmatch(name, pattern) for layout in apply_patches.LAYOUTS for pattern in layout.signs):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(git(repository, "show", f"{revision}:{name}"))
    return commit(folder)


def tree(folder):
    """{path: (hash, mode)} of every file outside .git."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".git" not in path.relative_to(folder).parts:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = (digest, stat.S_IMODE(os.stat(path).st_mode))
    return found


def make_table(folder, upstream, revision="v0"):
    """A folder as patches/, whose table knows the synthetic checkout: revisions.json and the patch
    file."""
    (folder / upstream / revision).mkdir(parents=True)
    blobs, root = {}, SYNTHETIC / upstream.replace("-", "_")
    for file in apply_patches.read_checkout(root).files:
        patch = apply_patches.write_patch(file.name, find_insertions(upstream, file.name, file.content.decode()))
        (folder / upstream / revision / f"{file.base_name}.patch").write_text(patch)
        blobs[file.base_name] = apply_patches.blob_hash(file.content)
    table = {**{name: {} for name in FILES}, upstream: {revision: {"blobs": blobs}}}
    (folder / "revisions.json").write_text(json.dumps(table))
    return folder
