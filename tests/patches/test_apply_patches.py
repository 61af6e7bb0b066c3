"""The tool on synthetic checkouts: apply, check, reverse, and everything that can be in its way."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import apply_patches
import file_transaction
import pytest
from checkouts import BESIDE, FILES, HOOKS, commit, make_checkout, make_table, tree
from insertion_points import InsertionPointError, find_insertions

PATCHES = Path(apply_patches.__file__).parent
UPSTREAMS = list(FILES)


@pytest.fixture(params=UPSTREAMS)
def upstream(request):
    return request.param


@pytest.fixture
def checkout(upstream, tmp_path, monkeypatch):
    """A synthetic checkout of a revision that the table knows."""
    monkeypatch.setattr(apply_patches, "HERE", make_table(tmp_path / "table", upstream))
    return make_checkout(upstream, tmp_path / "checkout")


@pytest.fixture
def unknown(upstream, tmp_path):
    """A committed synthetic checkout that no table knows."""
    return commit(make_checkout(upstream, tmp_path / "checkout"))


def run(*arguments):
    return apply_patches.main([str(argument) for argument in arguments])


def test_apply_check_and_reverse_give_back_every_byte(checkout, upstream, capsys):
    os.chmod(checkout / FILES[upstream], 0o755)
    before = tree(checkout)
    assert run(checkout) == 0
    patched = tree(checkout)
    assert patched[FILES[upstream]] != before[FILES[upstream]]
    beside = checkout / BESIDE[upstream]
    assert (beside / f"{HOOKS[upstream]}.py").is_file() and (beside / "cs_fluctuation.py").is_file()
    assert os.stat(checkout / FILES[upstream]).st_mode & 0o777 == 0o755
    compile((checkout / FILES[upstream]).read_text(), "patched", "exec")
    capsys.readouterr()
    assert run(checkout, "--check") == 0
    assert "v0: patched" in capsys.readouterr().out
    (beside / "__pycache__").mkdir()
    (beside / "__pycache__" / "es_lora_hook.cpython-311.pyc").touch()  # left by a training
    assert run(checkout, "--reverse") == 0
    assert tree(checkout) == before


def test_applying_twice_changes_nothing_the_second_time(checkout, capsys):
    assert run(checkout) == 0
    patched = tree(checkout)
    capsys.readouterr()
    assert run(checkout) == 0
    assert "already applied" in capsys.readouterr().out
    assert tree(checkout) == patched


def test_check_and_dry_run_change_nothing(checkout, upstream, capsys):
    before = tree(checkout)
    assert run(checkout, "--check") == 0 and run(checkout, "--dry-run") == 0 and run(checkout, "--reverse") == 0
    said = capsys.readouterr().out
    assert f"{upstream} v0: not patched; can be." in said
    assert "would insert" in said and f"import {HOOKS[upstream]}" in said
    assert "not patched, nothing to do" in said
    assert tree(checkout) == before
    run(checkout)
    patched = tree(checkout)
    assert run(checkout, "--reverse", "--dry-run") == 0
    assert tree(checkout) == patched


def test_crlf_checkout_is_recognised_and_stays_crlf(upstream, tmp_path, monkeypatch):
    monkeypatch.setattr(apply_patches, "HERE", make_table(tmp_path / "table", upstream))
    checkout = make_checkout(upstream, tmp_path / "checkout", line_end=b"\r\n")
    before = tree(checkout)
    assert run(checkout) == 0
    content = (checkout / FILES[upstream]).read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n")
    assert f"import {HOOKS[upstream]}\r\n".encode() in content
    assert run(checkout, "--reverse") == 0
    assert tree(checkout) == before


def test_local_change_is_refused_by_name(upstream, checkout, capsys):
    commit(checkout)
    file = checkout / FILES[upstream]
    file.write_text(file.read_text() + "# mine\n")
    before = tree(checkout)
    for arguments in ([], ["--yes"], ["--check"]):
        assert run(checkout, *arguments) == 2
        said = capsys.readouterr().err
        assert str(file) in said and "local changes" in said and said.count("\n") == 1
    assert tree(checkout) == before


def test_change_after_patching_is_refused_by_name(checkout, upstream, capsys):
    run(checkout)
    file = checkout / FILES[upstream]
    file.write_text(file.read_text() + "# mine\n")
    (checkout / BESIDE[upstream] / "es_lora" / "rules.py").unlink()
    before = tree(checkout)
    for arguments in ([], ["--check"], ["--reverse"]):
        capsys.readouterr()
        assert run(checkout, *arguments) == 2
        said = capsys.readouterr().err
        assert f"{FILES[upstream]} (changed)" in said and "es_lora/rules.py (missing)" in said
    assert tree(checkout) == before


def test_neither_upstream_and_no_folder(tmp_path, capsys):
    (tmp_path / "train.py").write_text("pass\n")
    assert run(tmp_path) == 2
    said = capsys.readouterr().err
    assert "is none of the checkouts that are known, by their files (sd-scripts: train_network.py, " in said
    assert run(tmp_path / "nowhere") == 2
    assert "is no folder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.py"]


def test_own_file_of_the_same_name_is_not_overwritten(checkout, upstream, capsys):
    own = checkout / BESIDE[upstream] / "es_lora"
    own.mkdir()
    (own / "mine.py").write_text("mine = 1\n")
    before = tree(checkout)
    assert run(checkout) == 2
    assert f"already has {own.relative_to(checkout)}," in capsys.readouterr().err
    assert tree(checkout) == before


def test_hook_of_another_version_asks_for_reverse(checkout, tmp_path, monkeypatch, capsys):
    run(checkout)
    newer = tmp_path / "newer" / "es_lora_hook.py"
    newer.parent.mkdir()
    newer.write_text("# newer\n")
    monkeypatch.setattr(apply_patches, "COPIED", {**apply_patches.COPIED, newer.name: newer})
    capsys.readouterr()
    assert run(checkout) == 2
    assert "run --reverse, then apply again" in capsys.readouterr().err
    assert run(checkout, "--reverse") == 0


# ------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("direction", [[], ["--reverse"]])
def test_interrupted_at_any_point_all_or_nothing_has_happened(checkout, direction, monkeypatch):
    if direction:
        run(checkout)
    before, replace, outcomes = tree(checkout), os.replace, []
    for stop_at in range(1, 100):
        calls = []

        def counted(source, target, calls=calls, stop_at=stop_at):
            calls.append(target)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(file_transaction.os, "replace", counted)
            try:
                run(checkout, *direction)
            except KeyboardInterrupt:
                assert tree(checkout) == before, f"interrupted at {calls[-1]}"
                outcomes.append(stop_at)
                continue
        break
    assert len(outcomes) > 3 and tree(checkout) != before  # and at last it went through


@pytest.mark.parametrize("at", [1, 2, 4, 8, 10])
def test_killed_run_is_rolled_back_by_the_next(upstream, tmp_path, at):
    table, checkout = make_table(tmp_path / "table", upstream), make_checkout(upstream, tmp_path / "checkout")
    before = tree(checkout)
    program = f"""
import os, sys
sys.path[:0] = [{str(PATCHES)!r}]
import apply_patches
apply_patches.HERE = apply_patches.Path({str(table)!r})
replace, calls = os.replace, []
def dying(source, target):
    calls.append(target)
    if len(calls) == {at}:
        os._exit(9)
    replace(source, target)
os.replace = dying
apply_patches.main([{str(checkout)!r}])
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    original = (checkout / FILES[upstream]).read_bytes()
    assert b"es_lora" not in original, "the trainer is changed last"
    file_transaction.roll_back_interrupted(checkout)
    assert tree(checkout) == before


def test_failure_while_writing_rolls_back(checkout, monkeypatch, capsys):
    before, write = tree(checkout), file_transaction._write_whole

    def full_disk(path, content, mode=None):
        if path.name == "rules.py":
            raise OSError("no space left")
        write(path, content, mode)

    monkeypatch.setattr(file_transaction, "_write_whole", full_disk)
    assert run(checkout) == 2
    assert "no space left" in capsys.readouterr().err
    assert tree(checkout) == before


# -------------------------------------------------------------------------------- unknown revisions


def test_unknown_revision_shows_its_places_and_waits_for_yes(unknown, upstream, capsys):
    before = tree(unknown)
    assert run(unknown) == 1
    said = capsys.readouterr().err
    assert "not in the table" in said and "--yes" in said
    assert f"import {HOOKS[upstream]}" in said and f"{FILES[upstream]}, after line" in said
    assert tree(unknown) == before
    assert run(unknown, "--check") == 0 and run(unknown, "--dry-run") == 0
    assert tree(unknown) == before
    assert run(unknown, "--yes") == 0
    assert HOOKS[upstream] in (unknown / FILES[upstream]).read_text()
    assert run(unknown, "--reverse") == 0
    assert tree(unknown) == before


def test_without_git_it_says_that_it_cannot_tell_a_local_change(upstream, tmp_path, capsys):
    checkout = make_checkout(upstream, tmp_path / "checkout")
    assert run(checkout) == 1
    assert "or local changes: git cannot tell here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "upstream, find, replace, problem",
    [
        ("sd-scripts", "global_step += 1", "global_step = global_step + 1", "step (after global_step is advanced"),
        (
            "sd-scripts",
            "    return parser\n",
            "    return argparse.Namespace()\n",
            "flags (before setup_parser returns",
        ),
        (
            "sd-scripts",
            "global_step += 1",
            "global_step += 1\n                global_step += 1",
            "found 2 times, at lines",
        ),
        ("sd-scripts", "train_util.resume_from_local_or_hf_if_specified(accelerator, args)", "pass", "monitor (after"),
        ("sd-scripts", "optimizer = torch", "optimiser = torch", "variables optimizer of the training function"),
        (
            "qlora",
            "SavePeftModelCallback)",
            "SaveAdapter)",
            "callback (after SavePeftModelCallback is registered): not",
        ),
        ("qlora", "class TrainingArguments(", "class Arguments(", "flags (first in TrainingArguments): not found"),
        ("musubi-tuner", "for epoch in range(epochs):", "while True:", "monitor (before the loop over epochs): not"),
        ("diffusers", "accelerator.wait_for_everyone()", "pass", "kept weights (after the loops"),
        ("diffusers", "unet_lora_layers=unet_lora_layers,", "unet_lora_layers={**unet_lora_layers},", "last save (bef"),
        ("diffusers", "def parse_args(", "def arguments(", "flags (before parse_args parses): not found"),
    ],
)
def test_missing_or_ambiguous_place_is_named_and_nothing_changes(upstream, find, replace, problem, tmp_path, capsys):
    checkout = make_checkout(upstream, tmp_path / "checkout")
    file = checkout / FILES[upstream]
    assert find in file.read_text()
    file.write_text(file.read_text().replace(find, replace))
    commit(checkout)
    before = tree(checkout)
    for arguments in ([], ["--yes"]):
        assert run(checkout, *arguments) == 2
        assert problem in capsys.readouterr().err
    assert tree(checkout) == before


def test_source_that_is_no_python_is_a_message():
    with pytest.raises(InsertionPointError, match="cannot be read by this Python"):
        find_insertions("qlora", "qlora.py", "def (:\n")


# -------------------------------------------------------------------------------------- patch files


def test_git_apply_takes_the_patch_files_too(checkout, upstream, tmp_path):
    commit(checkout)
    for patch in (tmp_path / "table" / upstream / "v0").iterdir():
        subprocess.run(["git", "-C", str(checkout), "apply", "--unidiff-zero", str(patch)], check=True)
    by_git = (checkout / FILES[upstream]).read_bytes()
    subprocess.run(["git", "-C", str(checkout), "checkout", "-q", "."], check=True)
    assert run(checkout) == 0
    assert (checkout / FILES[upstream]).read_bytes() == by_git


def test_committed_patches_hold_added_lines_only_and_fit_the_table():
    files = sorted(path.relative_to(PATCHES).as_posix() for path in PATCHES.glob("*/*/*.patch"))
    table = apply_patches.known_revisions()
    known = [(name, rev, facts) for name, revs in table.items() for rev, facts in revs.items()]
    assert files == sorted(f"{name}/{rev}/{file}.patch" for name, rev, facts in known for file in facts["blobs"])
    for file in files:
        text = (PATCHES / file).read_text()
        lines = text.rstrip("\n").split("\n")
        assert lines[0].startswith("--- a/") and lines[1].startswith("+++ b/")
        assert all(line.startswith(("@@ ", "+")) for line in lines[2:]), "a removed or a context line"
        name, insertions = apply_patches.parse_patch(text)
        assert apply_patches.write_patch(name, insertions) == text


def test_patch_round_trip_puts_lines_where_it_says():
    content = b"one\ntwo\nthree\n"
    text = "--- a/f.py\n+++ b/f.py\n@@ -0,0 +1,1 @@\n+zero\n@@ -2,0 +4,2 @@\n+a\n+b\n"
    name, insertions = apply_patches.parse_patch(text)
    patched, ranges = apply_patches.insert_lines(content, insertions)
    assert (name, patched) == ("f.py", b"zero\none\ntwo\na\nb\nthree\n")
    assert apply_patches.remove_lines(patched, ranges) == content


def test_everything_that_is_copied_or_run_there_is_python_3_8():
    for path in [*PATCHES.glob("*.py"), *apply_patches.COPIED.values()]:
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))


def test_tool_needs_the_standard_library_alone():
    allowed = set(sys.stdlib_module_names) | {"file_transaction", "insertion_points"}
    for name in ("apply_patches.py", "file_transaction.py", "insertion_points.py"):
        for node in ast.walk(ast.parse((PATCHES / name).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {found.split(".")[0] for found in names} <= allowed


# ------------------------------------------------------------------------------- several trainers


def test_a_script_that_is_not_clear_is_left_as_it_is_and_named(tmp_path, capsys):
    checkout = make_checkout("diffusers", tmp_path / "checkout")
    scripts = checkout / "examples" / "dreambooth"
    odd = scripts / "train_dreambooth_lora_odd.py"
    odd.write_text((scripts / "train_dreambooth_lora.py").read_text().replace("wait_for_everyone()", "end_training()"))
    commit(checkout)
    before = tree(checkout)
    assert run(checkout, "--check") == 0 and run(checkout, "--yes") == 0
    said = capsys.readouterr().out
    assert said.count("left as it is: examples/dreambooth/train_dreambooth_lora_odd.py: ") == 2
    assert "kept weights (after the loops" in said
    patched = tree(checkout)
    assert patched["examples/dreambooth/train_dreambooth_lora_odd.py"] == before[str(odd.relative_to(checkout))]
    assert b"es_lora_diffusers_hook" in (scripts / "train_dreambooth_lora.py").read_bytes()
    assert run(checkout, "--reverse") == 0
    assert tree(checkout) == before


def test_copies_of_scripts_in_a_folder_of_their_own_are_patched_there(tmp_path):
    scripts = make_checkout("diffusers", tmp_path / "checkout") / "examples" / "dreambooth"
    own = tmp_path / "own"
    shutil.copytree(scripts, own)
    before = tree(own)
    assert run(own, "--yes") == 0 and (own / "es_lora_diffusers_hook.py").is_file()
    assert run(own) == 0 and run(own, "--reverse") == 0
    assert tree(own) == before


def test_a_receipt_of_an_earlier_version_is_still_reversed(tmp_path, monkeypatch):
    monkeypatch.setattr(apply_patches, "HERE", make_table(tmp_path / "table", "qlora"))
    checkout = make_checkout("qlora", tmp_path / "checkout")
    before = tree(checkout)
    assert run(checkout) == 0
    path = checkout / apply_patches.RECEIPT
    receipt = json.loads(path.read_text())
    facts = receipt.pop("files")["qlora.py"]
    receipt.pop("beside")
    path.write_text(json.dumps({**receipt, **facts, "format": "es-lora-patch/1", "file": "qlora.py"}))
    assert run(checkout, "--check") == 0 and run(checkout, "--reverse") == 0
    assert tree(checkout) == before
