"""Put a revision of an upstream into the table: its patch files, and the hashes of its trainers.

    python tests/patches/add_revision.py diffusers REPOSITORY v0.40.0
    python tests/patches/add_revision.py diffusers REPOSITORY HEAD --name main-2026-08-23

A file that is the same in a revision of the table already is not put there again."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

PATCHES = Path(__file__).resolve().parents[2] / "patches"
sys.path.insert(0, str(PATCHES))
import apply_patches  # noqa: E402
from checkouts import git, write_out  # noqa: E402
from insertion_points import InsertionPointError, find_insertions  # noqa: E402


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("upstream", choices=apply_patches.UPSTREAMS)
    parser.add_argument("repository", type=Path)
    parser.add_argument("revision")
    parser.add_argument("--name", help="what the table calls it")
    arguments = parser.parse_args(argv)
    name, table = arguments.name or arguments.revision, apply_patches.known_revisions()
    blobs = {}
    with tempfile.TemporaryDirectory() as folder:
        checkout = write_out(arguments.repository, arguments.revision, Path(folder))
        for file in apply_patches.read_checkout(checkout).files:
            if file.revisions:
                print(f"{file.name}: as in {file.revisions[0]}")
                continue
            try:
                insertions = find_insertions(arguments.upstream, file.name, file.content.decode("utf-8-sig"))
            except InsertionPointError as error:
                print(error)
                continue
            patch = PATCHES / arguments.upstream / name / f"{file.base_name}.patch"
            patch.parent.mkdir(parents=True, exist_ok=True)
            patch.write_text(apply_patches.write_patch(file.name, insertions))
            blobs[file.base_name] = apply_patches.blob_hash(file.content)
    date = git(arguments.repository, "log", "-1", "--format=%as", arguments.revision).decode().strip()
    table[arguments.upstream][name] = {"date": date, "blobs": blobs}
    (PATCHES / "revisions.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
