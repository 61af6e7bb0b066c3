"""A base of either family, known by its files."""

from pathlib import Path

from base.files import local_path
from base.sd import SDModel, load_sd_model
from base.sdxl import load_sdxl_model
from base.single_file import SDXL_KEY
from base.tensor_files import tensor_names


def load_base_model(path: str | Path, *, v2: bool = False, **settings) -> SDModel:
    """An SDModel or SDXLModel, whichever the path holds; arguments, errors as load_sd_model."""
    location = local_path(path)
    if not is_sdxl(location):
        return load_sd_model(path, v2=v2, **settings)
    if v2:
        raise ValueError(f"{path} is an SDXL model; leave --v2 out")
    return load_sdxl_model(path, **settings)


def is_sdxl(location: Path) -> bool:
    """Whether a folder in diffusers layout or a single file holds an SDXL model."""
    if location.is_dir():
        return (location / "text_encoder_2").is_dir()
    return SDXL_KEY in tensor_names(location)
