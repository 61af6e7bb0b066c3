"""A small random Stable Diffusion in diffusers layout, and the same in the original single-file
layout, for tests."""

import json
import re
from pathlib import Path

import quiet_libraries  # noqa: F401  (before diffusers)
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from base.sd import SDModel

WORDS = ["a", "photo", "of", "cat", "dog", "red", "blue", "tree", "(", ")", "[", "]", ":"]


def tiny_tokenizer(folder, pad_token="<|endoftext|>"):
    """A CLIP tokenizer that knows single letters and a few words."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary, merges = [], []
    for letter in letters:
        vocabulary += [letter, letter + "</w>"]
    for word in WORDS:
        parts = list(word[:-1]) + [word[-1] + "</w>"]
        while len(parts) > 1:
            merge = " ".join(parts[:2])
            parts[:2] = ["".join(parts[:2])]
            if merge not in merges:
                merges.append(merge)
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = list(dict.fromkeys(vocabulary))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad_token}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


def tiny_sd(folder, seed=0, linear_projection=False, pad_token="<|endoftext|>"):
    """An SDModel with random weights: 8 latent pixels a side at 64 px, text width 32. About 0.3M
    parameters."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(Path(folder) / "tiny_tokenizer", pad_token)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=32, bos_token_id=bos, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, use_linear_projection=linear_projection,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=64, block_out_channels=(8, 8, 8, 16), layers_per_block=2, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    text_encoder = CLIPTextModel(text_config)
    torch.nn.init.constant_(text_encoder.final_layer_norm.bias, 0.2)  # trained encoders' states have a mean, too
    parts = [part.requires_grad_(False).eval() for part in (unet, vae, text_encoder)]
    return SDModel(parts[0], parts[1], [parts[2]], [tokenizer], dict(scheduler.config), base_path=str(folder))


def original_layout(model):
    """The state dict of a tiny_sd in the layout of the original latent-diffusion code (SD 1.x).

    Written from the published layout: input_blocks count the first convolution, each residual block
    and each downsampler; middle_block is residual, attention, residual; output_blocks hold
    residual, attention, upsampler.
    """
    tensors = {}
    for name, value in model.unet.state_dict().items():
        tensors["model.diffusion_model." + _original_unet_name(name, model.unet.config.layers_per_block)] = value
    levels = len(model.vae.config.block_out_channels)
    for name, value in model.vae.state_dict().items():
        original = _original_vae_name(name, levels)
        is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", original)
        tensors["first_stage_model." + original] = value[:, :, None, None] if is_projection else value
    for name, value in model.text_encoders[0].state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return {name: value.contiguous() for name, value in tensors.items()}


def _original_unet_name(name, layers):
    fixed = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    }  # fmt: skip
    for new, old in fixed.items():
        if name.startswith(new + "."):
            return old + name[len(new) :]
    if name.startswith("mid_block."):
        name = name.replace("mid_block.resnets.0", "middle_block.0").replace("mid_block.resnets.1", "middle_block.2")
        name = name.replace("mid_block.attentions.0", "middle_block.1")
    else:
        side, block, kind, index, rest = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name).groups()
        number = int(block) * (layers + 1) + int(index)
        if side == "down":
            place = {"resnets": 0, "attentions": 1}.get(kind)
            if kind == "downsamplers":
                return f"input_blocks.{(int(block) + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
            name = f"input_blocks.{number + 1}.{place}.{rest}"
        elif kind == "upsamplers":
            has_attention = int(block) > 0  # the first up block of this model has none
            return f"output_blocks.{int(block) * (layers + 1) + layers}.{2 if has_attention else 1}.{rest}"
        else:
            name = f"output_blocks.{number}.{ {'resnets': 0, 'attentions': 1}[kind] }.{rest}"
    if "transformer_blocks" in name or re.search(r"\.(norm|proj_in|proj_out)\.(weight|bias)$", name):
        return name
    for new, old in (
        ("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("norm2.", "out_layers.0."),
        ("conv2.", "out_layers.3."), ("time_emb_proj.", "emb_layers.1."), ("conv_shortcut.", "skip_connection."),
    ):  # fmt: skip
        name = name.replace(new, old)
    return name


def _original_vae_name(name, levels):
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.down.\1.block", name)
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    reverse = lambda match: str(levels - 1 - int(match.group(1)))  # noqa: E731  (decoder levels count backwards)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{reverse(match)}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{reverse(match)}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match.group(1)) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_shortcut", "nin_shortcut")
    for new, old in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f"attn_1.{new}.", f"attn_1.{old}.")
    return name.replace("conv_norm_out", "norm_out")
