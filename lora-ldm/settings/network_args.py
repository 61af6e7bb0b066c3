"""What --network_args say to networks.lora: sizes of convolutions, dropouts, the blocks of the
U-Net, LoRA+. Names, counts and defaults are those of sd-scripts v0.10.1's networks/lora.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from es_lora.command_line import nearest
from es_lora.inputs.bounds import MOST
from settings.bounds import LARGEST_FLOAT, problem_of

NUMBERS = {"conv_dim": int, "conv_alpha": float, "rank_dropout": float, "module_dropout": float}
RATE_NUMBERS = "block_lr_zero_threshold loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio".split()
BLOCK_LISTS = {"block_dims": int, "block_alphas": float, "conv_block_dims": int, "conv_block_alphas": float}
WEIGHT_LISTS = "down_lr_weight mid_lr_weight up_lr_weight".split()
NAMES = [*NUMBERS, *BLOCK_LISTS, *WEIGHT_LISTS, *RATE_NUMBERS]
SHAPES = "cosine sine linear reverse_linear zeros".split()


@dataclass(frozen=True)
class BlockCount:
    """How many blocks kohya counts in a U-Net: down and up, in the middle, before and behind."""

    side: int
    middle: int
    ends: int

    @property
    def all(self) -> int:
        return 2 * (self.side + self.ends) + self.middle


SD_BLOCKS, SDXL_BLOCKS = BlockCount(12, 1, 0), BlockCount(9, 3, 1)


@dataclass(frozen=True)
class Blocks:
    """Ranks and alphas of the U-Net's blocks, each a list with one value a block, or None.

    dims, alphas: of linear layers and 1x1 convolutions; None: --network_dim, --network_alpha.
    conv_dims, conv_alphas: of 3x3 convolutions; None: conv_dim, conv_alpha. A rank of 0: no LoRA.
    weights: factors of the learning rate, or None; a block of weight 0 has no LoRA either."""

    dims: Optional[list[int]] = None
    alphas: Optional[list[float]] = None
    conv_dims: Optional[list[int]] = None
    conv_alphas: Optional[list[float]] = None
    weights: Optional[list[float]] = None


@dataclass(frozen=True)
class RateFactors:
    """Factors of the learning rates. block_weights: one a block of the U-Net, or None.
    plus_unet, plus_text: of the up matrices (LoRA+, Hayou et al. 2024), or None."""

    block_weights: Optional[list[float]] = None
    plus_unet: Optional[float] = None
    plus_text: Optional[float] = None


EQUAL_RATES = RateFactors()


@dataclass
class NetworkArgs:
    """--network_args read. options: further arguments of network.lora.create_network.
    notices: what is not as the words say, in sentences."""

    options: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def parse_network_args(arguments: Optional[Sequence[str]], sdxl: bool = False) -> NetworkArgs:
    """``["conv_dim=4", "block_dims=2,2,...", ...]`` for a U-Net of Stable Diffusion or SDXL.
    Raises ValueError, all problems in one message, for what networks.lora does not know."""
    texts, problems = {}, []
    for argument in arguments or []:
        name, separator, text = argument.partition("=")
        if separator and name in NAMES:
            texts[name] = text
        else:
            problems.append(f"{argument!r:.80}{nearest(name, NAMES)}")
    count = SDXL_BLOCKS if sdxl else SD_BLOCKS
    values = _read(texts, count, problems)
    if problems:
        raise ValueError(
            f"--network_args: {', '.join(problems)} not understood; networks.lora takes {', '.join(NAMES)} "
            "as NAME=VALUE"
        )
    own_name = {"conv_dim": "conv_rank"}
    read = NetworkArgs({own_name.get(name, name): values[name] for name in NUMBERS if name in values})
    if "conv_rank" in read.options:
        read.options.setdefault("conv_alpha", 1.0)
    weights = _weights(values, count, read.notices)
    if weights or "block_dims" in values:
        read.options["blocks"] = Blocks(*(values.get(name) for name in BLOCK_LISTS), weights)
    rates = RateFactors(weights, *(_plus(values, part) for part in ("unet", "text_encoder")))
    if rates != EQUAL_RATES:
        read.options["rates"] = rates
    read.notices += _without_effect(values, weights) + _untrained(read.options.get("blocks"))
    return read


def _read(texts, count, problems):
    """{name: value} of the words that can be read; what is wrong with the others -> problems."""
    values = {}
    for name, text in texts.items():
        try:
            if name in BLOCK_LISTS:
                values[name] = _block_list(name, text, count)
            elif name in WEIGHT_LISTS:
                values[name] = _weight_list(name, text, count)
            else:
                values[name] = _number(name, text, NUMBERS.get(name, float))
        except ValueError as error:
            problems.append(f"'{name}={text:.60}' ({error})")
    return values


def _number(name, text, kind):
    """One number within its bounds. Raises ValueError in words for another one."""
    try:
        value = kind(text)
    except (ValueError, OverflowError):
        raise ValueError("not a number" if kind is float else "not a whole number") from None
    if problem := problem_of(value):
        raise ValueError(problem)
    most = 1 if name.endswith("dropout") else MOST if kind is int or name in NUMBERS else LARGEST_FLOAT
    if not 0 <= value < most:
        raise ValueError(f"it must be at least 0 and below {most}")
    if name.endswith("_ratio") and value == 0:
        raise ValueError("it must be above 0")
    return value


def _block_list(name, text, count):
    values = [_number(name, part, BLOCK_LISTS[name]) for part in text.split(",")]
    if len(values) != count.all:
        raise ValueError(f"it has {len(values)} values, and this U-Net has {count.all} blocks")
    return values


def _weight_list(name, text, count):
    """The factors as given: a list, an empty place being 0, or a shape such as cosine+.25."""
    if name == "mid_lr_weight" or "," in text:
        return [_number(name, part, float) if part.strip() else 0.0 for part in text.split(",")]
    shape, plus, base = text.partition("+")
    if shape not in SHAPES:
        raise ValueError(
            f"{count.side} numbers with commas, or one of {', '.join(SHAPES)}, to which +0.25 may be added"
        )
    least = _number(name, base, float) if plus else 0.0
    return [value + least for value in _shape(shape, count.side)]


def _shape(shape, length):
    """So many factors from 0 to 1, or from 1 to 0, along a line or a sine."""
    if shape == "zeros":
        return [0.0] * length
    places = [number / (length - 1) for number in range(length)]
    if shape in ("cosine", "reverse_linear"):
        places.reverse()
    return places if shape.endswith("linear") else [math.sin(math.pi * place / 2) for place in places]


def _weights(values, count, notices):
    """The factor of every block, or None where the words give none. Those that lack are 1."""
    if not any(name in values for name in WEIGHT_LISTS):
        return None
    weights, threshold = [], values.get("block_lr_zero_threshold", 0.0)
    for name, length in zip(WEIGHT_LISTS, (count.side, count.middle, count.side)):
        given = values.get(name, [1.0] * length)
        if len(given) != length:
            what = f"the {len(given) - length} last are left out" if len(given) > length else "the others are 1"
            notices.append(f"--network_args {name} has {len(given)} values for {length} blocks: {what}")
        given = [value if value > threshold or name not in values else 0.0 for value in given[:length]]
        weights += given + [1.0] * (length - len(given))
    ends = [1.0] * count.ends
    return ends + weights + ends


def _plus(values, part):
    return values.get(f"loraplus_{part}_lr_ratio", values.get("loraplus_lr_ratio"))


def _without_effect(values, weights):
    """Sentences on words that networks.lora reads and that change nothing."""
    needed = []
    if weights is None:
        needed.append(("block_lr_zero_threshold", "down_lr_weight, mid_lr_weight or up_lr_weight"))
        if "block_dims" not in values:
            lists = ("block_alphas", "conv_block_dims", "conv_block_alphas")
            needed += [(name, "block_dims or a weight of the learning rate") for name in lists]
    elif "conv_block_dims" not in values:
        needed.append(("conv_block_alphas", "conv_block_dims"))
    if "conv_dim" not in values and "conv_block_dims" not in values:
        needed.append(("conv_alpha", "conv_dim"))
    return [f"--network_args {name} has no effect without {other}" for name, other in needed if name in values]


def _untrained(blocks):
    """A sentence on the blocks whose layers have no LoRA, neither linear ones nor convolutions."""
    if blocks is None:
        return []
    ranks = [blocks.dims, blocks.conv_dims]
    numbers = range(len(next(filter(None, [*ranks, blocks.weights]))))
    off = [
        number
        for number in numbers
        if (blocks.weights and not blocks.weights[number])
        or (blocks.dims and not any(own[number] for own in ranks if own))
    ]
    if not off:
        return []
    shown = f"block{'s' * (len(off) > 1)} {', '.join(map(str, off))}"
    return [f"--network_args: no LoRA in {shown} of the U-Net, by a rank or a learning rate of 0"]
