"""Checkpoints in one file: original layouts of SD 1.x, 2.x and SDXL, by diffusers' loaders.

The model configurations ship in sd_configs/. A checkpoint of another shape (a fine-tune of a small
model) brings its
own: a diffusers folder of configurations, named like the file but for ``.config``."""

import re
from collections.abc import Iterable
from pathlib import Path

import quiet_libraries  # noqa: F401  (before diffusers)
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    create_diffusers_clip_model_from_ldm,
)

from base.files import readable
from base.tensor_files import named, read_tensors

CONFIG_ROOT = Path(__file__).resolve().parents[1] / "sd_configs"
CONTEXT_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
PART_PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": "conditioner.embedders.1.",
}
PART_NAMES = {"unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
# Some fine-tunes leave a level of CLIP's names out.
_TEXT_LEVEL = re.compile(
    r"^((?:cond_stage_model|conditioner\.embedders\.0)\.transformer\.)(embeddings|encoder|final_layer)"
)
SDXL_KEY = "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight"


def config_folder(path: str | Path, tensors: dict[str, torch.Tensor], v_parameterization: bool) -> Path:
    """The configurations of a checkpoint: its own ``.config`` folder, or the shipped ones."""
    own = Path(path).with_suffix(".config")
    if own.is_dir():
        return own
    if SDXL_KEY in tensors:
        raise ValueError(f"{path} is an SDXL checkpoint; train it with es_lora_sdxl.py")
    if CONTEXT_KEY not in tensors:
        raise ValueError(
            f"{path} is not a Stable Diffusion 1.x or 2.x checkpoint in the original layout (it lacks {CONTEXT_KEY}); "
            "give such a file, or a folder in diffusers layout"
        )
    if tensors[CONTEXT_KEY].shape[1] == 768:
        return CONFIG_ROOT / "sd1"
    return CONFIG_ROOT / ("sd2_v" if v_parameterization else "sd2")


def sdxl_config_folder(path: str | Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The same for an SDXL checkpoint."""
    own = Path(path).with_suffix(".config")
    if own.is_dir():
        return own
    if SDXL_KEY not in tensors:
        raise ValueError(f"{path} is not an SDXL checkpoint (it lacks {SDXL_KEY}); SD 1.x and 2.x: es_lora_ldm.py")
    return CONFIG_ROOT / "sdxl"


def load_components(
    path: str | Path,
    tensors: dict[str, torch.Tensor],
    config: Path,
    dtype: torch.dtype,
    encoder_classes: dict[str, type],
    with_vae: bool = True,
) -> tuple:
    """(unet, vae or None, [text encoders]) from a single file's tensors, in evaluation mode.
    encoder_classes: {"text_encoder": its class, ...} in order."""
    settings = {"config": str(config), "torch_dtype": dtype, "local_files_only": True}
    with readable(path):
        wrong = _other_shapes(tensors, config)
    if wrong:
        raise ValueError(
            f"{path} does not have the shape of {config.name} ({len(wrong)} tensors differ, e.g. {wrong[0]}); "
            f"inpainting and depth models are not supported. For a model of another size put its configurations in "
            f"{Path(path).with_suffix('.config')}"
        )
    with readable(path):
        parts = {"unet": _read(UNet2DConditionModel, tensors, "unet", settings)}
        if with_vae:
            parts["vae"] = _read(AutoencoderKL, tensors, "vae", settings)
        for name, encoder_class in encoder_classes.items():
            parts[name] = create_diffusers_clip_model_from_ldm(encoder_class, dict(tensors), subfolder=name, **settings)
    for name, part in parts.items():
        missing = [key for key, value in part.state_dict().items() if value.is_meta]
        if missing:
            raise ValueError(f"{path}: {len(missing)} tensors of the {name} are missing, the first is {missing[0]}")
        part.eval()
    return parts["unet"], parts.get("vae"), [parts[name] for name in encoder_classes]


def read_checkpoint(path: str | Path, encoders: Iterable[str], with_vae: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of a whole model, its text encoder's under their usual names.

    encoders: the text encoders that are needed. Raises ValueError for parts that it lacks."""
    tensors = {_TEXT_LEVEL.sub(r"\1text_model.\2", name): value for name, value in read_tensors(path).items()}
    needed = ["unet", *(["vae"] if with_vae else []), *encoders]
    missing = [part for part in needed if not any(name.startswith(PART_PREFIXES[part]) for name in tensors)]
    if missing:
        kind = "an SDXL" if "text_encoder_2" in needed else "a Stable Diffusion 1.x or 2.x"
        lack = " and ".join(f"no {PART_NAMES[part]}" for part in missing)
        raise ValueError(f"{path} is not {kind} checkpoint that is whole: {lack} in it; {_advice(missing, tensors)}")
    return tensors


def _advice(missing, tensors):
    """Where the missing parts are to be had."""
    if missing == ["vae"]:
        return "give a VAE with --vae, a file or a folder"
    if any(name.startswith(("lora_", "unet.", "base_model.")) for name in tensors):
        return "it is a LoRA; give the base that it was trained on"
    return "give the whole checkpoint, not a part of one, or a folder in diffusers layout"


def load_single_file_vae(path: str | Path, dtype: torch.dtype, family: str = "sd1") -> AutoencoderKL:
    """A VAE in the original layout, ``first_stage_model.`` or not. family: its configuration."""
    tensors = read_tensors(path)
    if not any(name.endswith("decoder.conv_in.weight") for name in tensors):
        raise ValueError(f"{path} holds no VAE (no decoder.conv_in.weight); give a VAE file or a diffusers VAE folder")
    own = Path(path).with_suffix(".config")
    config = own if own.is_dir() else CONFIG_ROOT / family
    with readable(path):
        return _read(
            AutoencoderKL, tensors, "vae", {"config": str(config), "torch_dtype": dtype, "local_files_only": True}
        )


def _read(model_class, tensors, part, settings):
    """The U-Net or VAE of a single file. Raises ValueError, by the first names, for holes in it."""
    try:
        return model_class.from_single_file(dict(tensors), subfolder=part, **settings)
    except NotImplementedError as error:  # diffusers moves what it did not find
        lacking = _lacking(model_class, tensors, part, settings["config"])
        raise ValueError(f"{len(lacking)} tensors of the {PART_NAMES[part]} are missing: {named(lacking)}") from error
    except KeyError as error:  # or looks for it
        raise ValueError(f"tensors of the {PART_NAMES[part]} are missing, such as {error.args[0]}") from error


def _lacking(model_class, tensors, part, config):
    """The names of a U-Net or VAE that a single file does not have, as diffusers calls them."""
    with torch.device("meta"):
        model = model_class.from_config(model_class.load_config(config, subfolder=part))
    convert = {"unet": convert_ldm_unet_checkpoint, "vae": convert_ldm_vae_checkpoint}[part]
    return model.state_dict().keys() - convert(dict(tensors), dict(model.config)).keys()


def unet_original_names(
    tensors: dict[str, torch.Tensor], layers_per_block: int = 2, addition_embed_type: str | None = None
) -> dict[str, str]:
    """{diffusers name: original name} of a U-Net. addition_embed_type: "text_time" for SDXL.
    The converter only renames: each tensor object leads from its new name to the old one."""
    originals = {id(value): name for name, value in tensors.items()}
    config = {"layers_per_block": layers_per_block, "addition_embed_type": addition_embed_type}
    converted = convert_ldm_unet_checkpoint(dict(tensors), config)
    return {name: originals[id(value)] for name, value in converted.items()}


def _other_shapes(tensors, config):
    """The tensors of the U-Net whose shapes differ from the configuration's, in words."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(str(config), subfolder="unet"))
    layout = unet_original_names(tensors, unet.config.layers_per_block, unet.config.addition_embed_type)
    return [
        f"{layout[name]} {tuple(tensors[layout[name]].shape)} instead of {tuple(value.shape)}"
        for name, value in unet.state_dict().items()
        if name in layout and tensors[layout[name]].shape != value.shape
    ]
