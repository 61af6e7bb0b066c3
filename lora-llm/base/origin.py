"""Where a base comes from: a folder, a hub name, the name of a packaged base, or a GGUF file.

The last two are converted once into folders in Hugging Face format, under `.bases` in the project.
"""

from pathlib import Path
from typing import Any, Optional

import torch
from transformers.utils import cached_file

from base.bases_folder import BASES_FOLDER
from base.packaged import PACKAGED_BASES, packaged_base

GGUF_SUFFIX = ".gguf"


def local_base(name: str, dtype: torch.dtype, gguf_file: Optional[str] = None, **hub_options: Any) -> str:
    """What transformers can load: `name` itself, or the folder that was made of it.

    dtype: the precision that a GGUF file is dequantised into. gguf_file: its name in the folder or
    hub repository `name`. Raises FileNotFoundError where it cannot be had, ValueError where it is
    damaged or of an architecture that cannot be read.
    """
    if gguf_file is None and name in PACKAGED_BASES and not Path(name).exists():
        return str(packaged_base(name, BASES_FOLDER))
    if gguf_file is None and not name.endswith(GGUF_SUFFIX):
        return name
    from base.gguf_files import gguf_folder

    return str(gguf_folder(_gguf_path(name, gguf_file, hub_options), dtype, BASES_FOLDER))


def _gguf_path(name: str, gguf_file: Optional[str], hub_options: dict[str, Any]) -> Path:
    if gguf_file is None:
        return Path(name)
    if Path(name).is_file():
        raise ValueError(f"--gguf_file {gguf_file}: the base {name} is a file itself; leave --gguf_file out")
    if Path(name).is_dir() or name.startswith((".", "/", "~")):
        return Path(name) / gguf_file
    try:
        return Path(cached_file(name, gguf_file, **hub_options))
    except OSError as error:
        told = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"--gguf_file {gguf_file}: not to be had from {name} ({told})") from error
