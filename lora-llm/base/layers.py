"""The linear layers of a base: which take a LoRA, and their shapes."""

import copy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from es_lora.weights import dequantised


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
