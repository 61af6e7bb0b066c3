"""Files of named tensors: read them without running code, write them whole or not at all."""

import os
import pickle
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


def read_tensors(path):
    """The tensors of a .safetensors file or of a pickle, the latter with weights only. {name: tensor} on the CPU.

    Raises:
        FileNotFoundError: no such file. ValueError: damaged, or a pickle that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file; give a .safetensors or .ckpt file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix not in PICKLE_SUFFIXES:
            allowed = ", ".join((".safetensors", *PICKLE_SUFFIXES))
            raise ValueError(f"{path} ends in {path.suffix or 'nothing'}; allowed are {allowed}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); copy or download it again") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read as tensors only ({str(error).splitlines()[0]}). A pickle may carry code, so nothing "
            "else is read from it; convert the checkpoint to .safetensors with a tool you trust"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no named tensors; give a model checkpoint")
    return tensors


def tensor_names(path):
    """The names in a file of tensors; of .safetensors only the header is read. Raises as read_tensors."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return read_tensors(path).keys()
    try:
        with safe_open(path, "pt") as file:
            return file.keys()
    except SafetensorError:
        return read_tensors(path).keys()  # which says what is wrong


def write_whole(path, write):
    """Let ``write(aside)`` write a file in the same folder, flush it to disk, then rename it over ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)


def write_folder_whole(folder, write):
    """Let ``write(aside)`` fill a folder beside, then give it the name, in place of a folder that had it."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        write(aside)
        for file in filter(Path.is_file, aside.rglob("*")):
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        os.chmod(aside, 0o755)
        replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(aside, folder):
    """A folder cannot replace a full one in one step: the old one steps aside first."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)
