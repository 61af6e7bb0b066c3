"""The LoRA layers of a kohya, LyCORIS or PEFT network, as the CS metric wants them: frozen weight,
down and up, live.

Copied into a patched trainer beside es_lora_hook.py. Python 3.8, torch 1.13.
"""

import re
from typing import Any, Dict, List, Optional, Tuple

import torch

from cs_fluctuation import LoraLayer
from es_lora.hugging_face.peft_models import peft_lora_layers
from es_lora.weights import DenseUpdateLayer, dense_weight, keep_as_loaded, without_dropout

# -------------------------------------------------------------------------------- kohya and LyCORIS


def _frozen_module(module: torch.nn.Module) -> Optional[torch.nn.Module]:
    """The layer that a LoRA module was put over: LyCORIS keeps it in a list, kohya only through its
    old forward."""
    held = getattr(module, "org_module", None)
    if held is None:
        return getattr(getattr(module, "org_forward", None), "__self__", None)
    return held[0] if isinstance(held, (list, tuple)) else held


def _layers_of_module(module: torch.nn.Module, component: str) -> List[Any]:
    """The measurable layers of one kohya or LyCORIS module: none, one, or one a part where a fused
    weight is split."""
    name = getattr(module, "lora_name", type(module).__name__)
    weight = getattr(_frozen_module(module), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() < 2 or weight.device.type == "meta":
        return []
    down, up = getattr(module, "lora_down", None), getattr(module, "lora_up", None)
    plain = getattr(module, "lora_mid", None) is None and not isinstance(
        getattr(module, "scalar", None), torch.nn.Parameter
    )
    if isinstance(down, torch.nn.ModuleList):  # fused projections: one LoRA for each block of rows
        layers, start = [], 0
        for number, (part_down, part_up) in enumerate(zip(down, up)):
            rows = weight[start : start + part_up.weight.shape[0]]
            layers.append(
                LoraLayer(f"{name}.{number}", component, dense_weight(rows), part_down.weight, part_up.weight)
            )
            start += part_up.weight.shape[0]
        return layers
    if down is not None and up is not None and plain:
        fits = down.weight[0].numel() == weight[0].numel() and up.weight.shape[0] == weight.shape[0]
        return [LoraLayer(name, component, dense_weight(weight), down.weight, up.weight)] if fits else []
    if hasattr(module, "get_diff_weight"):
        return [DenseUpdateLayer(name, component, weight, lambda: without_dropout(module, lambda: _update_of(module)))]
    return []


def _update_of(module: torch.nn.Module) -> Any:
    """D of a LyCORIS module, with its scalar, which is trained where use_scalar is on."""
    update = module.get_diff_weight()
    if type(module).__name__ not in ("LohaModule", "LokrModule"):
        return update
    update = update[0] if isinstance(update, tuple) else update
    return update * getattr(module, "scalar", 1)


def network_layers(network: torch.nn.Module) -> Tuple[List[Any], int]:
    """(measurable layers, number of modules that are not) of a kohya or LyCORIS network.

    Components are "unet" and "te", or "te1", "te2", ... as the modules' names say.
    Raises ValueError where nothing can be measured.
    """
    layers, left_out = [], 0
    parts = (("te", getattr(network, "text_encoder_loras", [])), ("unet", getattr(network, "unet_loras", [])))
    for part, modules in parts:
        for module in modules:
            numbered = re.match(r"lora_(te\d+)_", getattr(module, "lora_name", ""))
            found = _layers_of_module(module, numbered.group(1) if part == "te" and numbered else part)
            layers += found
            left_out += not found
    if not layers:
        raise ValueError(
            f"CS cannot be measured for the network {type(network).__module__}.{type(network).__name__}: it has no "
            "layer with lora_down and lora_up, or get_diff_weight, over a frozen weight; train without --calculate_cs "
            "and --early_stop"
        )
    return layers, left_out


# --------------------------------------------------------------------------------------------- PEFT


def peft_layers(model: torch.nn.Module, component: str = "lm") -> List[LoraLayer]:
    """The LoRA layers of a PEFT model's active adapters. Raises ValueError where it has none."""
    keep_as_loaded(model)
    layers = peft_lora_layers(model, component)
    if not layers:
        raise ValueError(
            "the model has no LoRA layer to measure (--full_finetune?); train without --calculate_cs and --early_stop"
        )
    return layers


def all_tensors(network: torch.nn.Module) -> Dict[str, torch.Tensor]:
    """{name: live tensor} of a LoRA network: whatever its saved file is made of."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}
