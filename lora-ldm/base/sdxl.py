"""Stable Diffusion XL as one object: SDModel's parts, two text encoders, sizes and crops.

A base is a folder in diffusers layout, a single file in the original one, or a hub name."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import quiet_libraries  # noqa: F401  (before diffusers)
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from base.files import load_clip_tokenizer, local_path, read_json
from base.sd import SDModel, load_folder, make_model
from base.single_file import load_components, read_checkpoint, sdxl_config_folder
from base.text_encoding import encode_captions

TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
SECOND_PADDING = "!"  # the second tokenizer is the first one with another padding
# The original U-Net's names outside its blocks, and of the parts of a residual block.
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESIDUAL_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


class TextConditions(NamedTuple):
    """What SDXL takes of B captions. states: of both (B, 75 n + 2, D1 + D2); pooled: (B, P)."""

    states: torch.Tensor
    pooled: torch.Tensor


@dataclass
class SDXLModel(SDModel):
    """A frozen SDXL base. ``text_encoders`` and ``tokenizers`` hold two each."""

    vae_family: ClassVar[str] = "sdxl"
    is_sdxl: ClassVar[bool] = True

    def encode_text(
        self,
        captions: list[str],
        *,
        max_token_length: int | None = 75,
        clip_skip: int | None = None,
        weighted: bool = False,
    ) -> TextConditions:
        """B captions -> TextConditions: both encoders' penultimate states; the second's pooled."""
        if clip_skip is not None:
            raise ValueError(
                f"clip_skip is {clip_skip}: SDXL always takes the penultimate layer; leave --clip_skip out"
            )
        settings = {"max_token_length": max_token_length, "weighted": weighted, "sdxl": True}
        encoders = zip(self.text_encoders, self.tokenizers)
        (first, _), (second, pooled) = (encode_captions(*pair, captions, **settings) for pair in encoders)
        return TextConditions(torch.cat([first, second], dim=-1), pooled)

    def predict_noise(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        text_conditions: TextConditions,
        sizes_px: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """U-Net output (B, 4, h, w).

        text_conditions: TextConditions of the B captions.
        sizes_px: (B, 6) original height and width, top and left of the crop, target height and
        width; None: whole pictures of the latents' size."""
        if sizes_px is None:
            height, width = (side * self.vae_scale for side in noisy_latents.shape[-2:])
            sizes_px = torch.tensor([[height, width, 0, 0, height, width]] * len(noisy_latents))
        conditions = {"text_embeds": text_conditions.pooled, "time_ids": sizes_px.to(noisy_latents.device)}
        return self.unet(
            noisy_latents, timesteps, encoder_hidden_states=text_conditions.states, added_cond_kwargs=conditions
        ).sample

    def lora_unet_name(self, module_name: str) -> str:
        """kohya names the modules of SDXL's U-Net after the original layout."""
        config = self.unet.config
        return original_unet_name(module_name, config.layers_per_block, config.up_block_types)

    def pipeline_prompts(
        self, positive: TextConditions, negative: TextConditions | None = None
    ) -> dict[str, torch.Tensor]:
        dtype = self.unet.dtype
        prompts = {"prompt_embeds": positive.states.to(dtype), "pooled_prompt_embeds": positive.pooled.to(dtype)}
        if negative is not None:
            prompts["negative_prompt_embeds"] = negative.states.to(dtype)
            prompts["negative_pooled_prompt_embeds"] = negative.pooled.to(dtype)
        return prompts

    def to_pipeline(self) -> StableDiffusionXLPipeline:
        """A StableDiffusionXLPipeline of the live parts (no copies), without watermark."""
        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoders[0],
            text_encoder_2=self.text_encoders[1],
            tokenizer=self.tokenizers[0],
            tokenizer_2=self.tokenizers[1],
            unet=self.unet,
            scheduler=EulerDiscreteScheduler.from_config(
                self.scheduler_config, timestep_spacing="leading", steps_offset=1
            ),
            add_watermarker=False,
        )


def load_sdxl_model(
    path: str | Path,
    *,
    v_parameterization: bool = False,
    vae: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer_cache_dir: str | Path | None = None,
) -> SDXLModel:
    """Load an SDXL base in evaluation mode, frozen; arguments and errors as load_sd_model."""
    location = local_path(path)
    if location.is_dir():
        if not (location / "text_encoder_2").is_dir():
            raise ValueError(f"{path} has no second text encoder, so it is not SDXL; train it with es_lora_ldm.py")
        parts = load_folder(location, dtype, TEXT_ENCODERS, with_vae=not vae)
    else:
        tensors = read_checkpoint(location, TEXT_ENCODERS, with_vae=not vae)
        config = sdxl_config_folder(location, tensors)
        components = load_components(location, tensors, config, dtype, TEXT_ENCODERS, with_vae=not vae)
        tokenizers = [load_clip_tokenizer(config / "tokenizer", tokenizer_cache_dir) for _ in TEXT_ENCODERS]
        tokenizers[1].pad_token = SECOND_PADDING
        parts = *components, tokenizers, read_json(config / "scheduler" / "scheduler_config.json")
    return make_model(SDXLModel, parts, path, location, vae, v_parameterization, dtype)


def original_unet_name(path: str, layers_per_block: int, up_block_types: list[str]) -> str:
    """The name of a U-Net module in the original layout: it counts resnets and downsamplers.

    >>> original_unet_name("down_blocks.1.attentions.0.proj_in", 2, ["UpBlock2D"] * 3)
    'input_blocks.4.1.proj_in'
    """
    for own, original in _OUTSIDE_BLOCKS.items():
        if path == own or path.startswith(f"{own}."):
            return original + path.removeprefix(own)
    match = _BLOCK.fullmatch(path)
    if match is None:
        return path
    side, kind, rest = match[1], match[3], match[5]
    block, index = int(match[2] or 0), int(match[4])
    if kind == "resnets":
        part, dot, tail = rest.partition(".")
        rest = _RESIDUAL_PARTS.get(part, part) + dot + tail
    place = 1 if kind == "attentions" else 0
    if side == "mid":
        return f"middle_block.{1 if place else 2 * index}.{rest}"
    first = block * (layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers_per_block + 1}.0.op{rest.removeprefix('conv')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers_per_block}.{1 + ('CrossAttn' in up_block_types[block])}.{rest}"
    if side == "down":
        return f"input_blocks.{first + index + 1}.{place}.{rest}"
    return f"output_blocks.{first + index}.{place}.{rest}"
