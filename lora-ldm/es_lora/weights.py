"""The frozen weights of bitsandbytes layers: made dense for one use, and kept as they were loaded.

On a processor with AVX512-BF16, bitsandbytes (0.50) rewrites a 4-bit weight for a faster kernel in the first forward pass in
evaluation mode. That rounds its scales to bf16, and the kernel has no backward pass: training that goes on after an
evaluation would send no gradient through the layer, without an error. `keep_as_loaded` prevents that and undoes it.
"""

import copy
from typing import Tuple

import torch

from cs_fluctuation import DenseWeight


def _is_repacked(weight: torch.Tensor) -> bool:
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)


def _unpacked(weight: torch.Tensor) -> Tuple[torch.Tensor, object]:
    """(data, quant state) of a 4-bit weight in the layout it was loaded in; the scales in float32, not quantised again."""
    if not _is_repacked(weight):
        return weight.data, weight.quant_state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(weight.quant_state)  # the function writes into it
    state.original_nested = False  # quantising the scales once more would change W
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.float().flatten()
    return data, state


def keep_as_loaded(model: torch.nn.Module) -> None:
    """Make every 4-bit layer stay in the layout it was loaded in, or return to it: one that can be trained through."""
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
        weight = getattr(layer, "weight", None)
        if weight is not None and _is_repacked(weight):
            weight.data, weight.quant_state = _unpacked(weight)
            layer.quant_state = weight.quant_state


def dequantised(layer: torch.nn.Module) -> torch.Tensor:
    """W (out, in) of a bitsandbytes 4-bit or 8-bit layer, made for one use."""
    weight = layer.weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*_unpacked(weight))
    # After the first forward pass the scales of an 8-bit weight lie in the layer's state. (out,)
    scales = layer.state.SCB if layer.state.SCB is not None else weight.SCB
    return weight.data * (scales.to(weight.device).float() / 127).unsqueeze(1)


class QuantisedWeight(DenseWeight):
    """The weight of a quantised layer: dequantised for one use and dropped, so that one layer at a time is dense."""

    def dense(self) -> torch.Tensor:
        return dequantised(self.weight)  # here `weight` is the whole layer


def frozen_weight(layer: torch.nn.Module) -> DenseWeight:
    """The frozen weight W (out, in) of an adapted layer's base layer, without a copy of it."""
    if type(layer.weight).__name__ in ("Params4bit", "Int8Params"):
        return QuantisedWeight(layer)
    return DenseWeight(layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight)  # GPT-2 holds (in, out)
