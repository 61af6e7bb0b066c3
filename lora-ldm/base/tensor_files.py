"""Files of named tensors, read without running code."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from es_lora.weights import is_finite

EARLIER_FILE = "the run that saved it had diverged, or it is damaged: use an earlier file"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or a pickle's by weights only. {name: tensor}, on CPU.

    Raises FileNotFoundError: no such file; ValueError: damaged, not finite, or a pickle that holds
    more than tensors."""
    tensors = _read(Path(path))
    refuse_not_finite(path, tensors)
    return tensors


def refuse_not_finite(source: str | Path, tensors: Mapping[str, torch.Tensor], advice: str = EARLIER_FILE) -> None:
    """Raise ValueError, by the first one's name, where tensors hold NaN or Inf. advice: the fix."""
    bad = [name for name, value in tensors.items() if not is_finite(value)]
    if bad:
        raise ValueError(f"{source}: {bad[0]} holds NaN or Inf ({len(bad)} of {len(tensors)} tensors do); {advice}")


def named(names: Iterable[str], shown: int = 3) -> str:
    """The first names of some, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:shown]) + (f" (and {len(names) - shown} more)" if len(names) > shown else "")


def differences(given: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> list[str]:
    """How tensors differ from those wanted, in words; empty where they are the same.
    given, wanted: {name: shape}."""
    lacking, foreign = wanted.keys() - given.keys(), given.keys() - wanted.keys()
    others = [
        f"{name} {tuple(given[name])} instead of {tuple(wanted[name])}"
        for name in given.keys() & wanted.keys()
        if tuple(given[name]) != tuple(wanted[name])
    ]
    lines = [f"it lacks {len(lacking)} of {len(wanted)} tensors: {named(lacking)}"] if lacking else []
    lines += [f"it has {len(foreign)} that do not belong there: {named(foreign)}"] if foreign else []
    return lines + ([f"{len(others)} have another shape: {named(others)}"] if others else [])


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple]:
    """{name: shape} of tensors."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file; give a .safetensors or .ckpt file")
    if path.suffix.lower() not in (".safetensors", *PICKLE_SUFFIXES):
        allowed = ", ".join((".safetensors", *PICKLE_SUFFIXES))
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}; allowed are {allowed}")
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); copy or download it again") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(
            f"{path} cannot be read as tensors only ({first_line(error)}). A pickle may carry code, so "
            "nothing else is read from it; convert the checkpoint to .safetensors with a tool you trust"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no named tensors; give a model checkpoint")
    return tensors


def tensor_names(path: str | Path) -> Iterable[str]:
    """The names in a file of tensors; .safetensors by its header. Raises as read_tensors."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return read_tensors(path).keys()
    try:
        with safe_open(path, "pt") as file:
            return file.keys()
    except SafetensorError:
        return read_tensors(path).keys()  # which says what is wrong


LEGACY_HASH_OFFSET_BYTES, LEGACY_HASH_LENGTH_BYTES = 0x100000, 0x10000


def file_hashes(path: str | Path) -> tuple[str, str]:
    """(legacy 8 digits, SHA-256) of a checkpoint file, the two hashes by which WebUIs know it."""
    with open(path, "rb") as file:
        file.seek(LEGACY_HASH_OFFSET_BYTES)
        legacy = hashlib.sha256(file.read(LEGACY_HASH_LENGTH_BYTES)).hexdigest()[:8]
        file.seek(0)
        return legacy, hashlib.file_digest(file, "sha256").hexdigest()
