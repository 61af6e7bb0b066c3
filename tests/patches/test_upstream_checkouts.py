"""The tool on the real upstreams. SD_SCRIPTS_DIR and QLORA_DIR name git repositories that hold
their revisions."""

import os
import re
import subprocess
from pathlib import Path

import apply_patches
import pytest
from checkouts import FILES, commit, tree
from insertion_points import find_insertions

PATCHES = Path(apply_patches.__file__).parent
VARIABLES = {"sd-scripts": "SD_SCRIPTS_DIR", "qlora": "QLORA_DIR"}
KNOWN = [(upstream, revision) for upstream, table in apply_patches.known_revisions().items() for revision in table]
# The file of v0.9.0 is that of v0.9.1, so it is recognised; the others are in no table.
UNKNOWN = [("sd-scripts", revision) for revision in ("v0.7.0", "v0.8.0", "v0.10.0")]
NEWEST = [("sd-scripts", "HEAD"), ("qlora", "HEAD"), ("sd-scripts", "v0.9.0")]


def git(repository, *arguments):
    return subprocess.run(["git", "-C", repository, *arguments], check=True, stdout=subprocess.PIPE).stdout


@pytest.fixture
def checkout(request, tmp_path):
    """(upstream, folder, touched file): a committed tree of the files that matter, as in that
    revision."""
    upstream, revision = request.param
    repository = os.environ.get(VARIABLES[upstream])
    if not repository:
        pytest.skip(f"{VARIABLES[upstream]} names no {upstream} repository")
    names = [FILES[upstream]]
    if upstream == "sd-scripts":
        names += ["library/train_util.py", "networks/lora.py"]
    folder = tmp_path / "checkout"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(git(repository, "show", f"{revision}:{name}"))
    return upstream, commit(folder), folder / FILES[upstream]


def run(*arguments):
    return apply_patches.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("checkout", KNOWN + NEWEST, indirect=True, ids="-".join)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_known_revision_is_patched_checked_and_given_back(checkout, line_end, capsys):
    upstream, folder, file = checkout
    file.write_bytes(file.read_bytes().replace(b"\n", line_end))
    before = tree(folder)
    assert run(folder) == 0
    patched = tree(folder)
    compile(file.read_bytes(), str(file), "exec")
    capsys.readouterr()
    assert run(folder, "--check") == 0 and "patched, and as the tool left it" in capsys.readouterr().out
    assert run(folder) == 0 and "already applied" in capsys.readouterr().out
    assert tree(folder) == patched
    assert run(folder, "--reverse") == 0
    assert tree(folder) == before


@pytest.mark.parametrize("checkout", KNOWN, indirect=True, ids="-".join)
def test_local_change_is_refused(checkout, capsys):
    _, folder, file = checkout
    file.write_bytes(file.read_bytes() + b"# mine\n")
    before = tree(folder)
    assert run(folder) == 2
    assert f"{file} has local changes" in capsys.readouterr().err
    assert tree(folder) == before


@pytest.mark.parametrize("checkout", UNKNOWN, indirect=True, ids="-".join)
def test_unknown_revision_is_patched_by_structure(checkout, capsys):
    _, folder, file = checkout
    before = tree(folder)
    assert run(folder) == 1 and "would insert" in capsys.readouterr().err
    assert tree(folder) == before
    assert run(folder, "--yes") == 0
    compile(file.read_bytes(), str(file), "exec")
    assert run(folder, "--check") == 0 and run(folder, "--reverse") == 0
    assert tree(folder) == before


@pytest.mark.parametrize("checkout", KNOWN, indirect=True, ids="-".join)
def test_patch_file_holds_what_the_structure_gives_and_git_applies_it(checkout, request):
    upstream, folder, file = checkout
    revision = request.node.callspec.params["checkout"][1]
    patch = PATCHES / upstream / revision / f"{file.name}.patch"
    assert patch.read_text() == apply_patches.write_patch(
        file.name, find_insertions(upstream, file.name, file.read_text())
    )
    assert run(folder) == 0
    by_tool = file.read_bytes()
    assert run(folder, "--reverse") == 0
    git(str(folder), "apply", "--unidiff-zero", str(patch))
    assert file.read_bytes() == by_tool


@pytest.mark.parametrize("checkout", KNOWN, indirect=True, ids="-".join)
def test_no_line_of_the_upstream_stands_in_its_patch(checkout, request):
    """Blank lines, brackets, lone keywords and lone keyword arguments aside."""
    upstream, _, file = checkout
    revision = request.node.callspec.params["checkout"][1]
    theirs = {line.strip() for line in file.read_text().split("\n")}
    patch = (PATCHES / upstream / revision / f"{file.name}.patch").read_text()
    added = [line[1:].strip() for line in patch.split("\n")[2:] if line.startswith("+")]
    trivial = re.compile(r"[()\[\]{},:]*|\w+|\w+=\w+,?")
    assert [line for line in added if line in theirs and not trivial.fullmatch(line)] == []
    assert len(added) < 20
