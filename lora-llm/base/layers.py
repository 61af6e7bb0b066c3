"""The linear layers of a base: which take a LoRA, and their shapes."""

import copy
from dataclasses import dataclass
from typing import Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from es_lora.weights import dequantised

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


def answer_tokens(model: torch.nn.Module, prompt_tokens: int, most: int) -> int:
    """How many of `most` tokens the base has positions for after a prompt.

    Raises ValueError where a table of positions leaves none.
    """
    positions = positions_of(model)
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
