"""A Stable Diffusion 1.5 with the real sizes and random weights: speed and memory do not depend on
the values."""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "lora-ldm"), str(ROOT / "tests" / "ldm")]

import quiet_libraries  # noqa: E402, F401  (before diffusers)
import torch  # noqa: E402
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402
from tiny_sd import tiny_tokenizer  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

from base.sd import SDModel  # noqa: E402
from base.single_file import CONFIG_ROOT  # noqa: E402

SD1 = Path(CONFIG_ROOT) / "sd1"


def config(part):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return json.loads((SD1 / part / name).read_text())


def sd15_unet(dtype=torch.float32, device="cpu"):
    """860M parameters, with random values."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(config("unet"))
    return unet.to(dtype).requires_grad_(False).eval()


def sd15_model(dtype=torch.float32, device="cpu"):
    """A whole SDModel; the tokenizer is a small stand-in with token ids inside CLIP's range."""
    unet = sd15_unet(dtype, device)
    with torch.device(device):
        vae = AutoencoderKL.from_config(config("vae")).to(dtype)
    text = CLIPTextModel(CLIPTextConfig(**config("text_encoder"))).to(device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_tokenizer(folder)
    parts = [part.requires_grad_(False).eval() for part in (unet, vae, text)]
    return SDModel(parts[0], parts[1], [parts[2]], [tokenizer], config("scheduler"), base_path="sd15-shaped")


def unet_only(unet):
    """An SDModel of nothing but the U-Net."""
    return SDModel(unet, None, [], [], config("scheduler"), base_path="sd15-shaped")
