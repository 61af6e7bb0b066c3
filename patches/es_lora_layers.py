"""The LoRA layers of a kohya, LyCORIS or PEFT network, as the CS metric wants them: frozen weight, down and up, live.

Copied into a patched trainer beside es_lora_hook.py. Python 3.8, torch 1.13.
"""

import re
from typing import Any, Dict, List, Optional, Tuple

import torch

from cs_fluctuation import BLOCK_VALUES, DenseWeight, LoraLayer

# ------------------------------------------------------------------------------------------------ kohya and LyCORIS


class Float8Weight(DenseWeight):
    """A base model in float8 (--fp8_base): widened for one use. Every float8 value is exact in bfloat16."""

    def dense(self) -> torch.Tensor:
        return self.weight.to(torch.bfloat16)


class DenseUpdateLayer:
    """A layer whose update D has no down and up (LoHa, LoKr, ...), in the shape of cs_fluctuation.LoraLayer.

    Seen as rank 1 it is A = (1) and B[i] = ||D[i]||, and `project` gives <W[i], D[i]> / ||D[i]||: all products are
    those of D itself. D is made for one layer at a time, by the module's own get_diff_weight, and dropped.
    """

    def __init__(self, name: str, component: str, weight: torch.Tensor, module: torch.nn.Module):
        self.name, self.component, self.weight = name, component, self
        self.frozen, self.module = as_weight(weight), module
        self._update_norms: Optional[torch.Tensor] = None
        self._weight_norms: Optional[torch.Tensor] = None

    @property
    def down(self) -> torch.Tensor:
        return torch.ones(1, 1, device=self.frozen.dense().device)  # A (1, 1)

    @property
    def up(self) -> torch.Tensor:
        if self._update_norms is None:
            self.project(None)
        norms, self._update_norms = self._update_norms, None  # of one measurement
        return norms  # B (out, 1)

    def project(self, _down: Any) -> torch.Tensor:
        """<W[i], D[i]> / ||D[i]|| (out, 1), and 0 for a row without update."""
        weight = self.frozen.dense().detach().flatten(1)  # (out, in)
        update = self._update().to(weight.device)  # (out, in)
        norms = update.norm(dim=1, keepdim=True)
        rows = max(1, BLOCK_VALUES // update.shape[1])
        starts = range(0, update.shape[0], rows)
        dots = [(weight[i : i + rows].float() * update[i : i + rows]).sum(1, keepdim=True) for i in starts]
        self._update_norms = norms
        return torch.cat(dots) / torch.where(norms > 0, norms, torch.ones_like(norms))

    def weight_norms(self) -> torch.Tensor:
        """||W[i]|| (out,), computed once: the weight is frozen."""
        if self._weight_norms is None:
            self._weight_norms = self.frozen.row_norms()
        return self._weight_norms

    @torch.no_grad()
    def _update(self) -> torch.Tensor:
        """D (out, in) in float32, without the dropouts of training."""
        was_training = self.module.training
        self.module.eval()
        try:
            update = self.module.get_diff_weight()
        finally:
            self.module.train(was_training)
        update = update[0] if isinstance(update, tuple) else update
        if type(self.module).__name__ in ("LohaModule", "LokrModule"):
            update = update * getattr(self.module, "scalar", 1)  # trained where use_scalar is on
        return update.flatten(1).float()


def as_weight(weight: torch.Tensor) -> DenseWeight:
    return Float8Weight(weight) if "float8" in str(weight.dtype) else DenseWeight(weight)


def _frozen_module(module: torch.nn.Module) -> Optional[torch.nn.Module]:
    """The layer that a LoRA module was put over: LyCORIS keeps it in a list, kohya only through its old forward."""
    held = getattr(module, "org_module", None)
    if held is None:
        return getattr(getattr(module, "org_forward", None), "__self__", None)
    return held[0] if isinstance(held, (list, tuple)) else held


def _layers_of_module(module: torch.nn.Module, component: str) -> List[Any]:
    """The measurable layers of one kohya or LyCORIS module: none, one, or one a part where a fused weight is split."""
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
            layers.append(LoraLayer(f"{name}.{number}", component, as_weight(rows), part_down.weight, part_up.weight))
            start += part_up.weight.shape[0]
        return layers
    if down is not None and up is not None and plain:
        fits = down.weight[0].numel() == weight[0].numel() and up.weight.shape[0] == weight.shape[0]
        return [LoraLayer(name, component, as_weight(weight), down.weight, up.weight)] if fits else []
    if hasattr(module, "get_diff_weight"):
        return [DenseUpdateLayer(name, component, weight, module)]
    return []


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


# ------------------------------------------------------------------------------------------------ PEFT


class QuantisedWeight(DenseWeight):
    """The weight of a bitsandbytes 4-bit or 8-bit layer: dequantised for one use, one layer at a time."""

    def dense(self) -> torch.Tensor:
        layer = self.weight  # here `weight` is the whole layer
        try:
            from peft.utils.integrations import dequantize_module_weight
        except ImportError:  # PEFT before 0.12
            return _dequantised(layer)
        return dequantize_module_weight(layer)


def _dequantised(layer: torch.nn.Module) -> torch.Tensor:
    if getattr(layer.weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    # 8 bit: rows of integers and their scales, in the layer's state once it has been used, in the weight before.
    held = [
        holder for holder in (getattr(layer, "state", None), layer.weight) if getattr(holder, "SCB", None) is not None
    ]
    integers = held[0].CB if getattr(held[0], "CB", None) is not None else layer.weight.data
    return integers.float() * held[0].SCB.float().unsqueeze(1) / 127


def _peft_weight(module: torch.nn.Module) -> DenseWeight:
    """The frozen weight of a PEFT LoRA layer: of its base layer, or its own where PEFT is older than 0.6."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if getattr(base, "support_avx512bf16_for_cpu", False):
        # The first evaluation would rewrite it, and bitsandbytes 0.50 then neither reads it nor trains through it.
        base.support_avx512bf16_for_cpu = False
    if getattr(base.weight, "quant_state", None) is not None or type(base.weight).__name__ == "Int8Params":
        return QuantisedWeight(base)
    return DenseWeight(base.weight.T if getattr(module, "fan_in_fan_out", False) else base.weight)


def peft_layers(model: torch.nn.Module, component: str = "lm") -> List[LoraLayer]:
    """The LoRA layers of a PEFT model's active adapters. Raises ValueError where it has none."""
    layers = []
    for name, module in model.named_modules():
        downs, ups = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if isinstance(downs, torch.nn.ModuleDict) and isinstance(ups, torch.nn.ModuleDict):
            active = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None)
            for adapter in [active] if isinstance(active, str) else list(active or ()):
                if adapter in downs:
                    layers.append(
                        LoraLayer(name, component, _peft_weight(module), downs[adapter].weight, ups[adapter].weight)
                    )
    if not layers:
        raise ValueError(
            "the model has no LoRA layer to measure (--full_finetune?); train without --calculate_cs and --early_stop"
        )
    return layers


def trained_tensors(model: torch.nn.Module) -> Dict[str, torch.Tensor]:
    """{name: live tensor} of everything in a model that is trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def all_tensors(network: torch.nn.Module) -> Dict[str, torch.Tensor]:
    """{name: live tensor} of a LoRA network: whatever its saved file is made of."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


@torch.no_grad()
def put_in(live: Dict[str, torch.Tensor], tensors: Dict[str, torch.Tensor]) -> None:
    """Copy tensors into the live ones of the same names. Raises KeyError for a name that is not there."""
    for name, tensor in tensors.items():
        live[name].copy_(tensor)


def copies(live: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in live.items()}
