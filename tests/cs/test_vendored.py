"""The vendored files are equal in both trees and run where they may be copied to."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "lora-llm"
FILES = [TREE / name for name in ("cs_fluctuation.py", "cs_replay.py", "judge_checkpoints.py", "starting.py")]
FILES += sorted((TREE / "es_lora").rglob("*.py"))
VENDORED = [file.relative_to(TREE).as_posix() for file in FILES]
ALLOWED_IMPORTS = {"torch", "numpy", "safetensors", "cs_fluctuation", "es_lora"}


@pytest.mark.parametrize("name", VENDORED)
def test_both_trees_hold_the_same_bytes(name):
    assert (ROOT / "lora-llm" / name).read_bytes() == (ROOT / "lora-ldm" / name).read_bytes()


def test_neither_tree_has_a_file_of_its_own_in_the_shared_folder():
    in_the_other = sorted((ROOT / "lora-ldm" / "es_lora").rglob("*.py"))
    assert [file.relative_to(ROOT / "lora-ldm").as_posix() for file in in_the_other] == VENDORED[4:]


@pytest.mark.parametrize("name", VENDORED)
def test_compiles_for_python_3_8(name):
    ast.parse((ROOT / "lora-llm" / name).read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize("name", VENDORED)
def test_imports_only_what_an_old_environment_has(name):
    """matplotlib is allowed inside functions only; built-in generics in annotations need Python
    3.9."""
    import sys

    tree = ast.parse((ROOT / "lora-llm" / name).read_text(encoding="utf-8"))
    top = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert top <= set(sys.stdlib_module_names) | ALLOWED_IMPORTS
    subscripted = [node.value for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
    assert not {value.id for value in subscripted if isinstance(value, ast.Name)} & {
        "list",
        "dict",
        "tuple",
        "set",
        "type",
    }
