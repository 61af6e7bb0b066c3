"""The linear layers of a base: which take a LoRA, and their shapes."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from es_lora.weights import dequantised

TRAINED_BYTES = 16  # of a LoRA parameter: weight, gradient and two moments in float32
_FAR_BEYOND = 8  # times the positions of a base: nothing it writes there is of use
_SPARE_POSITIONS = 8  # OPT's table has two more than it has positions


def linear_layers(base: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every linear layer (nn.Linear and its quantised kinds, GPT-2's Conv1D) but the output head,
    by its full name.

    Where PEFT has wrapped a layer, that is the layer inside, under the name that it had before.
    """
    head, wrapped, layers = base.get_output_embeddings(), [], {}
    for name, module in base.named_modules():
        if name.startswith(tuple(wrapped)):
            continue
        layer = module
        if isinstance(module, BaseTunerLayer):
            wrapped.append(f"{name}.")
            layer = module.get_base_layer()
        if isinstance(layer, (torch.nn.Linear, Conv1D)) and module is not head:
            layers[name] = layer
    return layers


def lora_target_names(base: torch.nn.Module, lora_modules: str) -> list[str]:
    """Full names of the layers that --lora_modules chooses: all, attention, or NAME,NAME (a name or
    the end of one).

    Attention layers are those inside a module whose class has Attention in its name.
    Raises ValueError, naming what there is, where a name matches nothing.
    """
    names = list(linear_layers(base))
    if lora_modules == "all":
        return names
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    if lora_modules == "attention":
        blocks = [name for name, module in base.named_modules() if "attention" in type(module).__name__.lower()]
        chosen = [name for name in names if any(name.startswith(f"{block}.") for block in blocks)]
        if not chosen:
            raise ValueError(
                f"--lora_modules attention: found no attention block; name the layers, of {', '.join(short)}"
            )
        return chosen
    wanted = [part.strip() for part in lora_modules.split(",") if part.strip()]
    missing = [part for part in wanted if not any(name == part or name.endswith(f".{part}") for name in names)]
    if missing or not wanted:
        names_missing = ", ".join(missing) or "nothing"
        raise ValueError(
            f"--lora_modules {lora_modules}: no linear layer is called {names_missing}; there are {', '.join(short)}"
        )
    return [name for name in names if any(name == part or name.endswith(f".{part}") for part in wanted)]


@dataclass(frozen=True)
class Positions:
    """How many positions a base has been trained on. hard: there are no others to compute."""

    count: int
    hard: bool


def positions_of(model: torch.nn.Module) -> Optional[Positions]:
    """The positions of a base, None where it counts none.

    A table of positions (GPT-2, OPT, GPT-J) ends; rotary positions go on, untrained.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    count = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if not count:
        return None
    tables = [module.num_embeddings for module in base.modules() if isinstance(module, torch.nn.Embedding)]
    tables.remove(base.get_input_embeddings().num_embeddings)
    tables += [len(buffer) for name, buffer in base.named_buffers() if name.endswith("embed_positions")]
    return Positions(count, any(count <= rows <= count + _SPARE_POSITIONS for rows in tables))


def positions_notices(positions: Optional[Positions], longest: int, flags: str) -> list[str]:
    """The notice on rows beyond rotary positions. Raises ValueError beyond a table of positions."""
    if positions is None or longest <= positions.count:
        return []
    told = f"the longest example has {longest} tokens, and the base has {positions.count} positions"
    if positions.hard:
        raise ValueError(f"{told}: lower {flags} to {positions.count} together")
    return [f"Beyond its positions: {told}. It computes others too, but has not been trained on them."]


def check_rank(base: torch.nn.Module, names: Iterable[str], rank: int, flag: str) -> None:
    """Raises ValueError, with the rank that would do, for a LoRA of these layers that is larger
    than any of them, or that this machine's memory cannot hold in training."""
    layers = linear_layers(base)
    sizes = [linear_shape(layers[name]) for name in names]
    largest = max(min(size) for size in sizes)
    if rank > largest:
        raise ValueError(
            f"{flag} {rank}: the layers have {largest} rows or columns at most, and a LoRA of that rank already holds "
            f"any change of them; give {largest} or less"
        )
    a_rank = TRAINED_BYTES * sum(map(sum, sizes))
    free = free_bytes(base.device)
    if free is not None and rank * a_rank > free:
        raise ValueError(
            f"{flag} {rank}: training it takes {rank * a_rank / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free; give "
            f"{max(1, free // a_rank)} or less, or fewer layers"
        )


def free_bytes(device: torch.device) -> Optional[int]:
    """Memory of a device that is free; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def answer_tokens(model: torch.nn.Module, prompt_tokens: int, most: int) -> int:
    """How many of `most` tokens the base has positions for after a prompt.

    Raises ValueError where a table of positions leaves none, and for many times what a base
    without a table has been trained on.
    """
    positions = positions_of(model)
    if positions is not None and not positions.hard and most > _FAR_BEYOND * positions.count:
        raise ValueError(
            f"--max_new_tokens {most}: the base was trained on {positions.count} positions; give "
            f"{_FAR_BEYOND * positions.count} or less"
        )
    if positions is None or not positions.hard:
        return most
    if prompt_tokens >= positions.count:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens, and the base has {positions.count} positions: shorten the prompt"
        )
    return min(most, positions.count - prompt_tokens)


def linear_shape(layer: torch.nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; a 4-bit weight is packed, so its tensor does not tell."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


def check_dequantisation(model: torch.nn.Module) -> None:
    """Raises ValueError where this machine's bitsandbytes gets a 4-bit weight wrong.

    Its AVX512 kernel (0.50) starts every row with a new scale, also where rows are not whole blocks
    of values.
    """
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in model.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is None or layer.weight.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
            continue
        flat_state = copy.copy(state)
        flat_state.shape = torch.Size([state.shape.numel()])  # one row: the blocks are counted through
        flat = dequantize_4bit(layer.weight.data, flat_state)
        if not torch.equal(dequantised(layer).flatten(), flat.flatten()):
            raise ValueError(
                f"--bits 4: on this processor bitsandbytes reads layer {name} wrongly, because "
                f"its {state.shape[-1]} inputs are "
                f"no multiple of {state.blocksize}; use --bits 8, 16 or 32"
            )
