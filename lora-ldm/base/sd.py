"""Stable Diffusion 1.x and 2.x as one object: load it, encode text and images, predict noise.

A base model is a folder in diffusers layout, a single .safetensors or .ckpt file in the original
layout, or a hub name. Only a hub name, or a tokenizer found nowhere here, is fetched."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import quiet_libraries  # noqa: F401  (before diffusers)
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from base.files import (
    hash_metadata,
    load_clip_tokenizer,
    load_from_folder,
    local_path,
    read_json,
    readable,
    write_clip_vocabulary,
)
from base.single_file import config_folder, load_components, load_single_file_vae, read_checkpoint
from base.text_encoding import encode_captions

TEXT_ENCODERS = {"text_encoder": CLIPTextModel}


@dataclass
class SDModel:
    """A frozen base model and the facts that training needs of it."""

    vae_family: ClassVar[str] = "sd1"  # whose configuration fits a VAE in a single file
    is_sdxl: ClassVar[bool] = False

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: list
    tokenizers: list
    scheduler_config: dict
    base_path: str
    base_hashes: dict = field(default_factory=dict)  # ss_sd_model_* and ss_vae_* metadata

    @property
    def prediction_type(self) -> str:
        """ "epsilon" or "v_prediction"."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """(1000,) float32: the share of the signal's variance left at each timestep."""
        return DDPMScheduler.from_config(self.scheduler_config).alphas_cumprod.float()

    @property
    def vae_scale(self) -> int:
        """Pixels per latent, 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_scaling(self) -> float:
        """What latents are multiplied by after encoding, 0.18215 for SD 1.x and 2.x."""
        return self.vae.config.scaling_factor

    def encode_text(
        self,
        captions: list[str],
        *,
        max_token_length: int | None = 75,
        clip_skip: int | None = None,
        weighted: bool = False,
    ) -> torch.Tensor:
        """B captions -> (B, 75 n + 2, D) states; see text_encoding.encode_captions."""
        settings = {"max_token_length": max_token_length, "clip_skip": clip_skip, "weighted": weighted}
        return encode_captions(self.text_encoders[0], self.tokenizers[0], captions, **settings)

    def encode_images(self, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, H/8, W/8), drawn from the VAE."""
        pixels = pixels.to(device=self.vae.device, dtype=self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.sample(generator) * self.latent_scaling
        if not torch.isfinite(latents).all():
            raise ValueError(
                f"the VAE gives NaN or Inf in {self.vae.dtype}; keep it in float32 with --no_half_vae, or give "
                "another --vae"
            )
        return latents

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, 4, h, w) -> pixels (B, 3, 8h, 8w), about [-1, 1]."""
        latents = latents.to(device=self.vae.device, dtype=self.vae.dtype)
        return self.vae.decode(latents / self.latent_scaling).sample

    def predict_noise(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, text_states: torch.Tensor
    ) -> torch.Tensor:
        """U-Net output (B, 4, h, w), noise or velocity (prediction_type). timesteps (B,) int64."""
        return self.unet(noisy_latents, timesteps, encoder_hidden_states=text_states).sample

    def lora_unet_name(self, module_name: str) -> str:
        """The name of a U-Net module in kohya's files, dots still in it; here diffusers' names."""
        return module_name

    def pipeline_prompts(self, positive: torch.Tensor, negative: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Arguments of the pipeline for ``encode_text``'s result; negative None: no guidance."""
        dtype = self.unet.dtype
        prompts = {"prompt_embeds": positive.to(dtype)}
        return prompts if negative is None else {**prompts, "negative_prompt_embeds": negative.to(dtype)}

    def to_pipeline(self) -> StableDiffusionPipeline:
        """A StableDiffusionPipeline of the live parts (no copies), without safety checker."""
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoders[0],
            tokenizer=self.tokenizers[0],
            unet=self.unet,
            scheduler=DDPMScheduler.from_config(self.scheduler_config, steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def save_pipeline(self, folder: str | Path) -> None:
        """Write a folder in diffusers layout. Detach or merge LoRA layers first."""
        self.to_pipeline().save_pretrained(folder)
        for index, tokenizer in enumerate(self.tokenizers):
            write_clip_vocabulary(tokenizer, Path(folder) / ("tokenizer" if index == 0 else f"tokenizer_{index + 1}"))


def load_sd_model(
    path: str | Path,
    *,
    v2: bool = False,
    v_parameterization: bool = False,
    vae: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer_cache_dir: str | Path | None = None,
) -> SDModel:
    """Load a base model in evaluation mode, without gradients.

    path: diffusers folder, single file in the original layout, or hub name (``owner/name``).
    v2: the base is SD 2.x. v_parameterization: it predicts velocity (the 768-pixel SD 2.x models).
    vae: another VAE: a file, a diffusers folder (with or without ``vae/``).
    tokenizer_cache_dir: where the CLIP vocabulary is looked for when the base is a single file.
    Raises FileNotFoundError, ValueError: one message with the value and the fix."""
    location = local_path(path)
    if location.is_dir():
        if (location / "text_encoder_2").is_dir():
            raise ValueError(f"{path} has two text encoders, as SDXL has; train it with es_lora_sdxl.py")
        parts = load_folder(location, dtype, TEXT_ENCODERS, with_vae=not vae)
    else:
        tensors = read_checkpoint(location, TEXT_ENCODERS, with_vae=not vae)
        config = config_folder(location, tensors, v_parameterization)
        components = load_components(location, tensors, config, dtype, TEXT_ENCODERS, with_vae=not vae)
        tokenizer = load_clip_tokenizer(config / "tokenizer", tokenizer_cache_dir)
        parts = *components, [tokenizer], read_json(config / "scheduler" / "scheduler_config.json")
    _check_version(path, parts[0], v2)
    return make_model(SDModel, parts, path, location, vae, v_parameterization, dtype)


def load_folder(folder: Path, dtype: torch.dtype, encoder_classes: dict[str, type], with_vae: bool = True) -> tuple:
    """(unet, vae or None, [text encoders], [tokenizers], scheduler configuration) of a folder.

    encoder_classes: {"text_encoder": its class, ...}; ``text_encoder_2`` has ``tokenizer_2``."""
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoder_classes]
    needed = ["unet", *(["vae"] if with_vae else []), *encoder_classes, *tokenizers, "scheduler"]
    missing = [name for name in needed if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a Stable Diffusion folder in diffusers layout: it lacks {', '.join(missing)}"
            + ("; give a VAE with --vae" if missing == ["vae"] else "")
        )
    return (
        load_from_folder(UNet2DConditionModel, folder / "unet", dtype),
        load_from_folder(AutoencoderKL, folder / "vae", dtype) if with_vae else None,
        [load_from_folder(encoder_class, folder / name, dtype) for name, encoder_class in encoder_classes.items()],
        [load_clip_tokenizer(folder / name) for name in tokenizers],
        read_json(folder / "scheduler" / "scheduler_config.json"),
    )


def make_model(
    model_class: type,
    parts: tuple,
    path: str | Path,
    location: Path,
    vae: str | Path | None,
    v_parameterization: bool,
    dtype: torch.dtype,
) -> SDModel:
    """A frozen model of ``load_folder``'s parts; another VAE, velocity prediction where asked.
    path: as the person gave it; location: where it lies."""
    unet, vae_model, text_encoders, tokenizers, scheduler_config = parts
    hashes = hash_metadata("sd_model", path, location)
    if vae:
        vae_model = load_vae(vae, dtype, model_class.vae_family)
        hashes |= hash_metadata("vae", vae, Path(vae))
    if v_parameterization:
        scheduler_config = {**scheduler_config, "prediction_type": "v_prediction"}
    for part in (unet, vae_model, *text_encoders):
        part.requires_grad_(False).eval()
    model = model_class(unet, vae_model, text_encoders, tokenizers, scheduler_config, str(path), hashes)
    with readable(f"{path}: its scheduler configuration"):
        model.alphas_cumprod.sum()
    return model


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32, family: str = "sd1") -> AutoencoderKL:
    """A VAE from a file in the original layout or a diffusers folder (VAE's or pipeline's)."""
    location = local_path(path)
    if location.is_file():
        return load_single_file_vae(location, dtype, family)
    folder = location / "vae" if (location / "vae").is_dir() else location
    return load_from_folder(AutoencoderKL, folder, dtype)


def _check_version(path, unet, v2):
    width = unet.config.cross_attention_dim
    if v2 and width == 768:
        raise ValueError(f"{path} is an SD 1.x model (text width 768); leave --v2 out")
    if not v2 and width == 1024:
        raise ValueError(
            f"{path} is an SD 2.x model (text width 1024); add --v2, and --v_parameterization for a 768-pixel v model"
        )
