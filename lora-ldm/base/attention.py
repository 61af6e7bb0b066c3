"""How a U-Net computes attention: the choice by device and flags, and setting it."""

from argparse import Namespace

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0


def choose_attention(args: Namespace, device: torch.device) -> str:
    """kohya's switches; else the device's fastest: PyTorch's fused attention; plain on a CPU."""
    if args.xformers:
        return "xformers"
    if args.mem_eff_attn:
        return "sliced"
    return "sdpa" if args.sdpa or device.type != "cpu" else "plain"


def set_attention(model: torch.nn.Module, kind: str) -> None:
    """Choose the attention of a U-Net or VAE: "sdpa", "xformers", "sliced" (small) or "plain".

    "plain" writes the products out; on a CPU and at small sizes its backward pass is the fastest.
    """
    if kind == "sdpa":
        model.set_attn_processor(AttnProcessor2_0())
    elif kind == "plain":
        model.set_attn_processor(AttnProcessor())
    elif kind == "sliced":
        model.set_attention_slice("auto")
    elif kind == "xformers":
        try:
            model.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, NotImplementedError) as error:
            raise ValueError(f"xformers cannot be used here ({error}); use --sdpa, which needs no package") from error
    else:
        raise ValueError(f"attention is {kind!r}; allowed are sdpa, xformers, sliced and plain")
