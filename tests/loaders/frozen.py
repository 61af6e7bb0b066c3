"""What the loaders are compared by, in every environment: needs torch and safetensors alone.

A base is a list of layers without weights on disk: each weight is made of its name. What a file
does to a layer is told by a short vector, so that no environment has to import another's code."""

import argparse
import json
import logging
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

NORMS = ("GroupNorm", "LayerNorm")


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def frozen_weight(name: str, shape: Iterable[int]) -> torch.Tensor:
    """The weight of a layer: each output row is one number, so that it takes no memory.
    name: kohya's; shape: (out, in, ...)."""
    shape = list(shape)
    rows = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator(name))
    return rows.expand(shape)


def effect(name: str, change: torch.Tensor) -> torch.Tensor:
    """A change (out, in, ...) of a layer's weight, seen along one random input: (out,)."""
    change = change.detach().float().reshape(len(change), -1)
    return change @ torch.randn(change.shape[1], generator=generator(f"{name} input"))


def is_compared(name: str, every: int) -> bool:
    """Whether a layer is one of those whose change is compared: about one of ``every``."""
    return zlib.crc32(name.encode()) % every == 0


class Read(dict):
    """Tensors by key that note which were looked at."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        if key in self:
            self.read.add(key)
        return super().get(key, default)


class Records(logging.Handler):
    """What a program logs while it is open, as texts."""

    def __init__(self, logger: logging.Logger):
        super().__init__()
        self.logger, self.texts = logger, []

    def emit(self, record):
        self.texts.append(record.getMessage())

    def __enter__(self):
        self.logger.addHandler(self)
        return self.texts

    def __exit__(self, *_):
        self.logger.removeHandler(self)


class Base:
    """The layers of a folder's base. layers: {kohya name: what ``shaped_files`` says of it}."""

    def __init__(self, folder: Path, family: str):
        self.family = family
        self.layers = {layer["name"]: layer for layer in json.loads((folder / f"{family}.base.json").read_text())}

    def weight(self, name: str) -> torch.Tensor:
        return frozen_weight(name, self.layers[name]["shape"])


def loader_main(loader: Callable) -> None:
    """Command line of a loader: FOLDER --every N --out FILE, for all LoRA files of the folder.

    loader(base) -> {tool: function(path, every) -> (unread keys, {layer: effect})}; a tool that
    refuses a file raises ValueError. Result: {file: {tool: {"unread", "effects", "refused"}}}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = {}
    for family in sorted({path.name.partition(".")[0] for path in args.folder.glob("*.base.json")}):
        base = Base(args.folder, family)
        tools = loader(base)
        for path in sorted(args.folder.glob(f"{family}.*.safetensors")):
            results[path.name] = {tool: _reading(function, path, args.every) for tool, function in tools.items()}
    torch.save(results, args.out)


def _reading(function, path, every):
    try:
        unread, effects = function(path, every)
    except ValueError as error:
        return {"refused": str(error), "unread": [], "effects": {}}
    return {"refused": "", "unread": sorted(unread), "effects": effects}
