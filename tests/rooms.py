"""The rooms of a tree, read from its files: what imports what, and whose names are taken."""

import ast
import importlib.metadata
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Folders are layers: a room imports from those before it. es_lora/ and settings/ stand beside them.
LAYERS = {
    "lora-llm": ("text", "base", "adapters", "training", "early_stop_callback", "jobs", "grid"),
    "lora-ldm": ("images", "base", "network", "training", "grid", "demo"),
}


def modules(tree: Path) -> dict[str, Path]:
    """{dotted name: file} of a tree, without the scripts that made its embedded base."""
    files = [file for file in sorted(tree.rglob("*.py")) if "tiny_base" not in file.parts]
    return {".".join(file.relative_to(tree).with_suffix("").parts): file for file in files}


def room_of(module: str) -> str:
    """The folder of a module; the module itself at the top of the tree."""
    return module.split(".")[0]


def imported(file: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def room_imports(tree: Path) -> dict[str, set[str]]:
    """{room: the other rooms that it imports from}."""
    known, graph = modules(tree), {}
    for module, file in known.items():
        others = {room_of(name) for name in imported(file) if name in known}
        graph.setdefault(room_of(module), set()).update(others - {room_of(module)})
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Rooms that reach themselves again, each as the way that leads back."""
    found = []

    def follow(way: list[str]) -> None:
        for other in graph.get(way[-1], ()):
            if other == way[0]:
                found.append([*way, other])
            elif other not in way:
                follow([*way, other])

    for room in graph:
        follow([room])
    return found


def upward(tree: Path) -> list[tuple[str, str]]:
    """(room, room) where a layer imports from one above it."""
    order = LAYERS[tree.name]
    pairs = [(room, other) for room, others in room_imports(tree).items() for other in others]
    layered = [(room, other) for room, other in pairs if room in order and other in order]
    return [(room, other) for room, other in layered if order.index(other) > order.index(room)]


def taken_names(tree: Path) -> set[str]:
    """Names of the tree's folders and modules that an installed package or the standard library has
    as well."""
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    paths = [path for path in tree.rglob("*") if path.is_dir() or path.suffix == ".py"]
    names = {path.stem for path in paths if "__pycache__" not in path.parts}
    return names & installed


def crowded(tree: Path, most: int = 15) -> dict[str, int]:
    """{folder: number of Python files} of the rooms that hold more than `most`."""
    counts: dict[str, int] = {}
    for module in modules(tree):
        folder = module.rpartition(".")[0]
        counts[folder] = counts.get(folder, 0) + 1
    return {folder: count for folder, count in counts.items() if folder and count > most}
