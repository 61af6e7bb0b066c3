"""Weights that are not dense matrices and B A: 4-bit, 8-bit, float8, LoHa, LoKr; and in files.

On a processor with AVX512-BF16, bitsandbytes (0.50) rewrites a 4-bit weight for a faster kernel in
the first forward pass in evaluation mode. That rounds its scales to bf16, and the kernel has no
backward pass: training that goes on after an evaluation would send no gradient through the layer,
without an error. `keep_as_loaded` prevents that and undoes it."""

import copy
import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Tuple, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cs_fluctuation import BLOCK_VALUES, DenseWeight


def _is_repacked(weight: Any) -> bool:
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)


def _unpacked(weight: Any) -> Tuple[torch.Tensor, Any]:
    """(data, quant state) of a 4-bit weight in the layout it was loaded in; scales in float32."""
    if not _is_repacked(weight):
        return weight.data, weight.quant_state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(weight.quant_state)  # the function writes into it
    state.original_nested = False  # quantising the scales once more would change W
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.float().flatten()
    return data, state


def keep_as_loaded(model: torch.nn.Module) -> None:
    """Make every 4-bit layer stay in, or return to, its loaded layout: gradients need it."""
    layer: Any
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
        weight = getattr(layer, "weight", None)
        if weight is not None and _is_repacked(weight):
            weight.data, weight.quant_state = _unpacked(weight)
            layer.quant_state = weight.quant_state


def dequantised(layer: Any) -> torch.Tensor:
    """W (out, in) of a bitsandbytes 4-bit or 8-bit layer, made for one use."""
    weight = layer.weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*_unpacked(weight))
    # Rows of integers and scales (out,): in the layer's state once used, before in the weight.
    holders = (getattr(layer, "state", None), weight)
    held: Any = next(holder for holder in holders if getattr(holder, "SCB", None) is not None)
    integers = held.CB if getattr(held, "CB", None) is not None else weight.data
    return integers * (held.SCB.to(integers.device).float() / 127).unsqueeze(1)


class QuantisedWeight(DenseWeight):
    """The weight of a quantised layer: dequantised for one use, one layer at a time."""

    def dense(self) -> torch.Tensor:
        return dequantised(self.weight)  # here `weight` is the whole layer


def frozen_weight(layer: Any) -> DenseWeight:
    """The frozen weight W (out, in) of an adapted layer's base layer, without a copy of it."""
    if type(layer.weight).__name__ in ("Params4bit", "Int8Params"):
        return QuantisedWeight(layer)
    return DenseWeight(layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight)  # GPT-2 holds (in, out)


class Float8Weight(DenseWeight):
    """A frozen weight in float8: widened for one use. Every float8 value is exact in bfloat16."""

    def dense(self) -> torch.Tensor:
        return self.weight.to(torch.bfloat16)


def dense_weight(weight: torch.Tensor) -> DenseWeight:
    """A frozen weight that is stored as a tensor, of any floating type."""
    return Float8Weight(weight) if "float8" in str(weight.dtype) else DenseWeight(weight)


class DenseUpdateLayer:
    """A layer whose update D has no down and up (LoHa, LoKr, ...), as a cs_fluctuation.LoraLayer.

    update: makes D (out, in) in float32, for one layer at a time. Seen as rank 1 it is A = (1),
    B[i] = ||D[i]||, and `project` gives <W[i], D[i]> / ||D[i]||: all products are those of D."""

    def __init__(self, name: str, component: str, weight: torch.Tensor, update: Callable[[], torch.Tensor]):
        self.name, self.component, self.weight = name, component, self
        self._frozen, self._update = dense_weight(weight), update
        self._update_norms: Optional[torch.Tensor] = None
        self._weight_norms: Optional[torch.Tensor] = None

    @property
    def down(self) -> torch.Tensor:
        return torch.ones(1, 1, device=self._frozen.dense().device)  # A (1, 1)

    @property
    def up(self) -> torch.Tensor:
        norms, self._update_norms = self._update_norms, None  # those of one measurement
        return self._update().norm(dim=1, keepdim=True) if norms is None else norms  # B (out, 1)

    @torch.no_grad()
    def project(self, _down: Any) -> torch.Tensor:
        """<W[i], D[i]> / ||D[i]|| (out, 1), and 0 for a row without update."""
        weight = self._frozen.dense().detach().flatten(1)  # (out, in)
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
            self._weight_norms = self._frozen.row_norms()
        return self._weight_norms


@torch.no_grad()
def without_dropout(module: torch.nn.Module, update: Callable[[], torch.Tensor]) -> torch.Tensor:
    """An update D as (out, in) in float32, made while the module's dropouts are off."""
    was_training = module.training
    module.eval()
    try:
        made = update()
    finally:
        module.train(was_training)
    made = made[0] if isinstance(made, tuple) else made
    return made.flatten(1).float()


def copies(live: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """{name: copy} of live tensors, on their device."""
    return {name: tensor.detach().clone() for name, tensor in live.items()}


@torch.no_grad()
def put_in(live: Dict[str, torch.Tensor], tensors: Dict[str, torch.Tensor]) -> None:
    """Copy tensors into the live ones of the same names. Raises KeyError for an unknown name."""
    for name, tensor in tensors.items():
        live[name].copy_(tensor)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor infinity, as integers and tensors without data never do."""
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    values = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no isfinite
    return bool(torch.isfinite(values).all())


def refuse_nonfinite(
    tensors: Iterable[Tuple[str, torch.Tensor]], where: Union[str, Path], fix: str = "take another checkpoint"
) -> None:
    """Raises ValueError by the name of the first tensor that holds NaN or infinity."""
    for name, tensor in tensors:
        if not is_finite(tensor):
            raise ValueError(f"{where}: the tensor {name} holds NaN or infinity; {fix}")


def quantisation_scales(model: torch.nn.Module) -> Iterator[Tuple[str, torch.Tensor]]:
    """(name of the weight, its scales) of every layer in 4 or 8 bits."""
    for name, weight in model.named_parameters():
        state = getattr(weight, "quant_state", None)
        nested = getattr(state, "state2", None)
        scales = [getattr(state, "absmax", None), getattr(weight, "SCB", None)]
        scales += [getattr(nested, "absmax", None), getattr(state, "offset", None)]
        yield from ((name, tensor) for tensor in scales if isinstance(tensor, torch.Tensor))


def stored_tensors(file: Union[str, Path]) -> Iterator[Tuple[str, torch.Tensor]]:
    """(name, tensor) of a safetensors file, one at a time. Raises ValueError for a damaged one."""
    try:
        with safe_open(str(file), framework="pt") as handle:
            for name in handle.keys():
                yield name, handle.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); take another, or make it anew") from error


def save_tensors(
    tensors: Dict[str, torch.Tensor], file: Union[str, Path], metadata: Optional[Dict[str, str]] = None
) -> None:
    """Write a safetensors file whose bytes depend on its content alone.

    The library writes metadata in an order of its own, another one each time; here it is sorted."""
    save_file(tensors, str(file), metadata=metadata)
    with open(file, "rb+") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8").ljust(length)
        if len(text) == length:  # else the library escapes otherwise: then its own order stays
            handle.seek(8)
            handle.write(text)


def pickle_advice(file: Union[str, Path]) -> str:
    """How to convert a file of pickled weights, which is not read."""
    target = Path(file).with_suffix(".safetensors")
    code = (
        f"import torch; from safetensors.torch import save_file; w = torch.load('{file}', weights_only=True); "
        f"save_file({{k: v.contiguous() for k, v in w.items()}}, '{target}')"
    )
    return f'{file} is a pickle file, which is not read; convert it: python -c "{code}"'
