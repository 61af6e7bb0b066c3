"""A small random SDXL in diffusers layout, and the same in the original single-file layout, for
tests."""

import re
from pathlib import Path

import quiet_libraries  # noqa: F401  (before diffusers)
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from tiny_sd import _original_vae_name, tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from base.sdxl import SDXLModel, original_unet_name

WIDTHS = (16, 24)  # of the two text encoders


def tiny_sdxl(folder, seed=0, sample_px=32):
    """An SDXLModel with random weights and SDXL's structure: three levels, deeper transformers
    inside, text and sizes."""
    torch.manual_seed(seed)
    tokenizers = [tiny_tokenizer(Path(folder) / f"tokens_{n}", pad) for n, pad in enumerate(("<|endoftext|>", "!"))]
    encoders = []
    for encoder_class, width, tokenizer in zip((CLIPTextModel, CLIPTextModelWithProjection), WIDTHS, tokenizers):
        encoders.append(encoder_class(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=width, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )))  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=sample_px // 8, block_out_channels=(8, 8, 16), layers_per_block=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(1, 2, 2),
        cross_attention_dim=sum(WIDTHS), transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTHS[1] + 6 * 8,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=sample_px, block_out_channels=(4, 4, 4, 8), layers_per_block=2, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.13025,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for part in (unet, vae, *encoders):
        part.requires_grad_(False).eval()
    return SDXLModel(unet, vae, encoders, tokenizers, dict(scheduler.config), base_path=str(folder))


def original_layout(model):
    """The state dict of a tiny_sdxl in the layout of the original SDXL code: an OpenCLIP second
    text encoder."""
    config, tensors = model.unet.config, {}
    for name, value in model.unet.state_dict().items():
        original = original_unet_name(name, config.layers_per_block, config.up_block_types)
        tensors[f"model.diffusion_model.{original}"] = value
    for name, value in model.vae.state_dict().items():
        original = _original_vae_name(name, len(model.vae.config.block_out_channels))
        is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", original)
        tensors[f"first_stage_model.{original}"] = value[:, :, None, None] if is_projection else value
    for name, value in model.text_encoders[0].state_dict().items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    for name, value in _open_clip_layout(model.text_encoders[1].state_dict()).items():
        tensors[f"conditioner.embedders.1.model.{name}"] = value
    return {name: value.contiguous() for name, value in tensors.items()}


def _open_clip_layout(state):
    tensors = {}
    for name, value in state.items():
        name = name.removeprefix("text_model.")
        projection = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name)
        if projection:
            parts = [state[f"text_model.{name.replace('q_proj', f'{which}_proj')}"] for which in "qkv"]
            tensors[f"transformer.resblocks.{projection[1]}.attn.in_proj_{projection[2]}"] = torch.cat(parts)
            continue
        if re.search(r"self_attn\.[kv]_proj", name):
            continue
        for own, original in (
            ("encoder.layers.", "transformer.resblocks."), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
            ("self_attn.out_proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ("embeddings.token_embedding", "token_embedding"), ("final_layer_norm", "ln_final"),
            ("embeddings.position_embedding.weight", "positional_embedding"), ("text_projection.weight",
            "text_projection"),
        ):  # fmt: skip
            name = name.replace(own, original)
        tensors[name] = value.T if name == "text_projection" else value
    return tensors
