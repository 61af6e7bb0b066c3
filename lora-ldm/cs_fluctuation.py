"""CS and CS-Fluctuation: what the project measures.

The method is that of "Towards Personalized AI: Early-stopping Low-Rank Adaptation of Foundation
Models" (ICLR 2024 R2-FM workshop). CS is the cosine similarity between a frozen weight W and its
LoRA update B A. CS-Fluctuation tells how much that similarity still moves. This file knows no
trainer: it sees tensors and numbers.

The same file stands in lora-ldm/ and lora-llm/ and is copied into other trainers by the patches,
with the folder es_lora/. Both run on Python 3.8, torch 1.13 and numpy 1.24 as well.
"""

import importlib
import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch

BLOCK_VALUES = 4_000_000  # largest part of a weight that is held in float32 at once


class NonFiniteWeightsError(RuntimeError):
    """A LoRA weight is NaN or infinite: training has diverged."""


class DenseWeight:
    """A frozen weight held as a tensor (out, in) or, for a convolution, (out, in, kh, kw).
    A kind of weight that is stored otherwise (quantised, transposed) overrides `dense`."""

    def __init__(self, weight: Any):
        self.weight = weight

    def dense(self) -> torch.Tensor:
        """W as stored, or made for this one use and dropped after it."""
        return self.weight

    def _row_blocks(self):
        weight = self.dense().detach()
        rows = max(1, BLOCK_VALUES // max(1, weight[0].numel()))
        for start in range(0, weight.shape[0], rows):
            block = weight[start : start + rows].flatten(1)  # (rows, in)
            yield block.to(torch.promote_types(block.dtype, torch.float32))

    def project(self, down: torch.Tensor) -> torch.Tensor:
        """W A^T (out, r) for lora_down A (r, in)."""
        return torch.cat([block @ down.to(block).T for block in self._row_blocks()])

    def row_norms(self) -> torch.Tensor:
        """||W[i]|| for every row i (out,)."""
        return torch.cat([block.norm(dim=1) for block in self._row_blocks()])


class LoraLayer:
    """One adapted layer: the frozen weight and live references to its LoRA matrices.

    name: the layer's name in its model. component: "unet", "te", "te1", "te2", "lm", ...
    weight: a tensor (out, in) or (out, in, kh, kw), or an object with DenseWeight's methods.
    down: lora_down A (r, in) or (r, in, kh, kw). up: lora_up B (out, r) or (out, r, 1, 1)."""

    def __init__(self, name: str, component: str, weight: Any, down: torch.Tensor, up: torch.Tensor):
        self.name, self.component, self.down, self.up = name, component, down, up
        self.weight = DenseWeight(weight) if isinstance(weight, torch.Tensor) else weight
        self._weight_norms: Optional[torch.Tensor] = None

    def weight_norms(self) -> torch.Tensor:
        """||W[i]|| (out,), computed once: the weight is frozen."""
        if self._weight_norms is None:
            self._weight_norms = self.weight.row_norms()
        return self._weight_norms


@torch.no_grad()
def _row_products(layer: LoraLayer) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per row i: <W[i], (BA)[i]>, ||W[i]|| and ||(BA)[i]||, each (out,). B A is never formed."""
    dtype = torch.promote_types(layer.down.dtype, torch.float32)
    down = layer.down.detach().flatten(1).to(dtype)  # A (r, in)
    projected = layer.weight.project(down)  # U = W A^T (out, r)
    up = layer.up.detach().flatten(1).to(projected)  # B (out, r)
    gram = (down @ down.T).to(projected)  # G = A A^T (r, r)
    dots = (projected * up).sum(1)
    update_norms = ((up @ gram) * up).sum(1).clamp_min(0).sqrt()  # rounding may leave a tiny negative square
    return dots, layer.weight_norms().to(projected), update_norms


def _quotient(dots: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """dots / norms, and 0 where a norm is 0: a zero update or a zero weight has no direction."""
    return torch.where(norms > 0, dots / torch.where(norms > 0, norms, torch.ones_like(norms)), torch.zeros_like(dots))


def _cosines(layer: LoraLayer) -> torch.Tensor:
    """(matrix cosine, row cosine, squared norm of B A) as one tensor (3,) on the layer's device."""
    dots, weight_norms, update_norms = _row_products(layer)
    matrix = _quotient(dots.sum(), weight_norms.norm() * update_norms.norm())
    row = _quotient(dots, weight_norms * update_norms).mean()
    return torch.stack([matrix, row, update_norms.square().sum()])


def layer_cosine(layer: LoraLayer, reduction: str = "matrix") -> float:
    """CS of one layer (paper, section 3).

    "matrix": <W, BA> / (||W|| ||BA||). "row": the mean over rows i of cos(W[i], (BA)[i]).

    Raises ValueError for another reduction."""
    if reduction not in ("matrix", "row"):
        raise ValueError(f"CS reduction {reduction!r} is unknown; use 'matrix' (diffusion) or 'row' (language models)")
    return _cosines(layer)[0 if reduction == "matrix" else 1].item()


def measure_each(layers: Sequence[LoraLayer]) -> List[List[float]]:
    """[matrix cosine, row cosine, squared norm of B A] of every layer. One transfer from the
    device. Raises NonFiniteWeightsError where a LoRA matrix holds NaN or infinity."""
    values = [_cosines(layer) for layer in layers]
    table = torch.stack([value.to(values[0]) for value in values]).tolist()
    for layer, row in zip(layers, table):
        if not math.isfinite(sum(row)):
            raise NonFiniteWeightsError(
                f"the LoRA weights of layer {layer.name} are NaN or infinite: training has diverged"
            )
    return table


def measure_layers(layers: Sequence[LoraLayer]) -> Dict[str, Dict[str, float]]:
    """Both cosines and the update norm of all layers: {"cs_matrix", "cs_row", "delta_norm"}.

    A component's cosine is the mean over its layers, "all" over all layers; delta_norm is the root
    of the summed ||BA||^2. Raises NonFiniteWeightsError where a LoRA matrix is not finite."""
    table = measure_each(layers)
    result: Dict[str, Dict[str, float]] = {"cs_matrix": {}, "cs_row": {}, "delta_norm": {}}
    components = list(dict.fromkeys(layer.component for layer in layers))
    for component in [*components, "all"]:
        rows = [row for layer, row in zip(layers, table) if component in ("all", layer.component)]
        result["cs_matrix"][component] = math.fsum(row[0] for row in rows) / len(rows)
        result["cs_row"][component] = math.fsum(row[1] for row in rows) / len(rows)
        result["delta_norm"][component] = math.sqrt(math.fsum(row[2] for row in rows))
    return result


def mean_cosine(layers: Sequence[LoraLayer], reduction: str = "matrix") -> Dict[str, float]:
    """CS {component: mean over its layers, "all": mean over all layers}."""
    return measure_layers(layers)[f"cs_{reduction}"]


@dataclass(frozen=True)
class FluctuationPoint:
    """What the series knows after one measurement; None until enough measurements are there."""

    mean_cs: Optional[float]  # MA: mean of the last M values of CS
    difference: Optional[float]  # D: MA_k - MA_(k-1)
    mean_difference: Optional[float]  # X: mean of the last M values of D
    fluctuation: Optional[float]  # F: population variance of the last M values of X


class FluctuationSeries:
    """CS-Fluctuation of a stream of CS values in O(M) memory (paper, section 3).
    window: M, in measurements. The first F comes with measurement 3M-1."""

    def __init__(self, window: int):
        if window < 1:
            raise ValueError(f"window is {window}; it counts measurements and must be at least 1")
        self.window = window
        self._cs: deque = deque(maxlen=window)
        self._differences: deque = deque(maxlen=window)
        self._mean_differences: deque = deque(maxlen=window)
        self._previous_mean: Optional[float] = None

    def _mean_if_full(self, values: deque) -> Optional[float]:
        return math.fsum(values) / self.window if len(values) == self.window else None

    def update(self, cs: float) -> FluctuationPoint:
        """Take the next CS value; means are computed afresh: a constant series gives exactly 0."""
        self._cs.append(cs)
        mean_cs = self._mean_if_full(self._cs)
        difference = None
        if mean_cs is not None and self._previous_mean is not None:
            difference = mean_cs - self._previous_mean
            self._differences.append(difference)
        self._previous_mean = mean_cs
        mean_difference = self._mean_if_full(self._differences)
        fluctuation = None
        if mean_difference is not None:
            self._mean_differences.append(mean_difference)
            centre = self._mean_if_full(self._mean_differences)
            if centre is not None:
                fluctuation = math.fsum((x - centre) ** 2 for x in self._mean_differences) / self.window
        return FluctuationPoint(mean_cs, difference, mean_difference, fluctuation)


def __getattr__(name: str) -> Any:
    """EarlyStopMonitor, which earlier versions had here."""
    if name != "EarlyStopMonitor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("es_lora.monitor").EarlyStopMonitor
