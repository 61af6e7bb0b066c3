"""The blocks of a U-Net as kohya counts them: size and learning rate of each layer by its block."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch

from settings.network_args import Blocks, RateFactors

if TYPE_CHECKING:
    from network.lora import LoraModule

Size = tuple[int, float]  # rank, alpha
SD_NAME = re.compile(r"_(up|down)_blocks_(\d+)_(resnets|attentions|upsamplers|downsamplers)_(\d+)_")
SDXL_NAME = re.compile(r"lora_unet_(input|middle|output)_blocks?_(\d+)_")
FIRST_OF_SDXL = {"input": 1, "middle": 10, "output": 13}  # of 23, the first and the last without a LoRA
FIRST_OF_SD = {"down": 1, "mid": 12, "up": 13}  # of 25, the first without a LoRA


def block_of(name: str) -> Optional[int]:
    """The number of the block that a U-Net layer lies in, by its name in kohya's files; None for a
    layer in none of them."""
    if match := SDXL_NAME.match(name):
        return FIRST_OF_SDXL[match[1]] + int(match[2])
    if match := SD_NAME.search(name):
        inner = 2 if match[3].endswith("samplers") else int(match[4])
        return FIRST_OF_SD[match[1]] + 3 * int(match[2]) + inner
    return FIRST_OF_SD["mid"] if "_mid_block_" in name else None


def block_size(blocks: Blocks, name: str, common: Size, pointwise: bool) -> Optional[Size]:
    """(rank, alpha) of a U-Net layer, None for no LoRA.

    common: of layers of its kind, for what `blocks` says nothing of; rank 0: no LoRA.
    pointwise: a linear layer or a 1x1 convolution. An alpha of 0 means the rank."""
    number = block_of(name)
    if blocks.weights and not _at(blocks.weights, number, name):
        return None
    dims, alphas = (blocks.dims, blocks.alphas) if pointwise else (blocks.conv_dims, blocks.conv_alphas)
    rank = common[0] if dims is None else _at(dims, number, name)
    has_alphas = alphas and (pointwise or dims)  # kohya takes conv_block_alphas with conv_block_dims only
    alpha = _at(alphas, number, name) if has_alphas else common[1]
    return (rank, float(alpha or rank)) if rank else None


def _at(values, number, name):
    """The value of a block. Raises ValueError where the U-Net has more blocks than are counted."""
    if number is None or number >= len(values):
        fix = "leave the block settings of --network_args out"
        raise ValueError(f"{name} is in none of the {len(values)} blocks of this kind of U-Net: {fix}")
    return values[number]


def rate_groups(component: str, modules: Sequence["LoraModule"], rate: float, factors: RateFactors) -> list[dict]:
    """The optimizer's groups of a component, in the order and with the names of kohya's.

    rate: of the component; each group has its own, and one whose rate is 0 is left out."""
    ratio = factors.plus_unet if component == "unet" else factors.plus_text
    inside: dict[str, list] = {}
    rates: dict[str, float] = {}
    for module in modules:
        weights = factors.block_weights if component == "unet" else None
        number = block_of(module.name) if weights else None
        name = component if number is None else f"unet_block{number}"
        inside.setdefault(name, []).append(module)
        rates[name] = rate if number is None else rate * _at(weights, number, module.name)
    groups = [group for name, own in inside.items() for group in _groups(name, own, rates[name], ratio)]
    return [group for group in groups if group["lr"]]


def _groups(name, modules, rate, ratio) -> list[dict[str, Any]]:
    """One group, or with LoRA+ a second one of the up matrices."""
    down: list[torch.Tensor] = [module.down for module in modules]
    up: list[torch.Tensor] = [module.up for module in modules]
    if ratio is None:
        both = [weight for pair in zip(down, up) for weight in pair]
        return [{"params": both, "lr": rate, "name": name}]
    plus = {"params": up, "lr": rate * ratio, "name": f"{name} plus"}
    return [{"params": down, "lr": rate, "name": name}, plus]
