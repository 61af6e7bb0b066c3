"""The tool on the real upstreams. SD_SCRIPTS_DIR, QLORA_DIR, MUSUBI_TUNER_DIR and DIFFUSERS_DIR
name git repositories that hold their revisions."""

import os
import re
from pathlib import Path

import apply_patches
import pytest
from checkouts import git, tree, write_out
from insertion_points import find_insertions

PATCHES = Path(apply_patches.__file__).parent
VARIABLES = {
    "sd-scripts": "SD_SCRIPTS_DIR",
    "qlora": "QLORA_DIR",
    "musubi-tuner": "MUSUBI_TUNER_DIR",
    "diffusers": "DIFFUSERS_DIR",
}
IN_GIT = {"main-2026-08-23": "58eb52c080"}  # what git calls a revision that the table names otherwise
KNOWN = [(upstream, revision) for upstream, table in apply_patches.known_revisions().items() for revision in table]
# The file of v0.9.0 is that of v0.9.1, so it is recognised; the others are in no table.
UNKNOWN = [
    *(("sd-scripts", revision) for revision in ("v0.7.0", "v0.8.0", "v0.10.0")),
    *(("musubi-tuner", revision) for revision in ("v0.2.0", "v0.2.8")),
    *(("diffusers", revision) for revision in ("v0.30.3", "v0.35.2", "v0.39.0")),
]
NEWEST = [(upstream, "HEAD") for upstream in VARIABLES] + [("sd-scripts", "v0.9.0")]


@pytest.fixture
def checkout(request, tmp_path):
    """(upstream, folder, touched files) of a committed tree of the files that matter, as in that
    revision."""
    upstream, revision = request.param
    repository = os.environ.get(VARIABLES[upstream])
    if not repository:
        pytest.skip(f"{VARIABLES[upstream]} names no {upstream} repository")
    folder = write_out(repository, IN_GIT.get(revision, revision), tmp_path / "checkout")
    return upstream, folder, [folder / file.name for file in apply_patches.read_checkout(folder).files]


def run(*arguments):
    return apply_patches.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("checkout", KNOWN + NEWEST, indirect=True, ids="-".join)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_known_revision_is_patched_checked_and_given_back(checkout, line_end, capsys):
    _, folder, files = checkout
    for file in files:
        file.write_bytes(file.read_bytes().replace(b"\n", line_end))
    before = tree(folder)
    assert run(folder) == 0
    patched = tree(folder)
    for file in files:
        compile(file.read_bytes(), str(file), "exec")
        assert b"es_lora" in file.read_bytes()
    capsys.readouterr()
    assert run(folder, "--check") == 0 and "patched, and as the tool left it" in capsys.readouterr().out
    assert run(folder) == 0 and "already applied" in capsys.readouterr().out
    assert tree(folder) == patched
    assert run(folder, "--reverse") == 0
    assert tree(folder) == before


@pytest.mark.parametrize("checkout", KNOWN, indirect=True, ids="-".join)
def test_local_change_is_refused(checkout, capsys):
    _, folder, files = checkout
    file = files[-1]
    file.write_bytes(file.read_bytes() + b"# mine\n")
    before = tree(folder)
    assert run(folder) == 2
    assert f"{file} has local changes" in capsys.readouterr().err
    assert tree(folder) == before


@pytest.mark.parametrize("checkout", UNKNOWN, indirect=True, ids="-".join)
def test_unknown_revision_is_patched_by_structure(checkout, capsys):
    _, folder, files = checkout
    before = tree(folder)
    assert run(folder) == 1 and "would insert" in capsys.readouterr().err
    assert tree(folder) == before
    assert run(folder, "--yes") == 0 and "left as it is" not in capsys.readouterr().out
    for file in files:
        compile(file.read_bytes(), str(file), "exec")
    assert run(folder, "--check") == 0 and run(folder, "--reverse") == 0
    assert tree(folder) == before


@pytest.mark.parametrize("checkout", KNOWN, indirect=True, ids="-".join)
def test_patch_files_hold_what_the_structure_gives_and_git_applies_them(checkout):
    upstream, folder, files = checkout
    patches = [patch_of(upstream, file) for file in files]
    for file, patch in zip(files, patches):
        name = file.relative_to(folder).as_posix()
        assert patch.read_text() == apply_patches.write_patch(name, find_insertions(upstream, name, file.read_text()))
    assert run(folder) == 0
    by_tool = [file.read_bytes() for file in files]
    assert run(folder, "--reverse") == 0
    for patch in patches:
        git(str(folder), "apply", "--unidiff-zero", str(patch))
    assert [file.read_bytes() for file in files] == by_tool


def patch_of(upstream, file):
    """The patch of the first revision in the table that has this very file."""
    blob = apply_patches.blob_hash(file.read_bytes())
    table = apply_patches.known_revisions()[upstream]
    revision = next(name for name, facts in table.items() if facts["blobs"].get(file.name) == blob)
    return PATCHES / upstream / revision / f"{file.name}.patch"


@pytest.mark.parametrize("checkout", KNOWN, indirect=True, ids="-".join)
def test_no_line_of_the_upstream_stands_in_its_patch(checkout):
    """Blank lines, brackets, lone keywords and lone keyword arguments aside."""
    upstream, _, files = checkout
    trivial = re.compile(r"[()\[\]{},:]*|\w+|\w+=\w+,?")
    for file in files:
        theirs = {line.strip() for line in file.read_text().split("\n")}
        patch = patch_of(upstream, file).read_text()
        added = [line[1:].strip() for line in patch.split("\n")[2:] if line.startswith("+")]
        assert [line for line in added if line in theirs and not trivial.fullmatch(line)] == []
        assert len(added) < 20
