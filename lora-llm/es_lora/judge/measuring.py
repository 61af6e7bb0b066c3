"""CS and the spectrum of saved adapters against their base on disk."""

import math
import re
from typing import Any, Dict, Sequence, Tuple

import torch

from cs_fluctuation import LoraLayer, measure_layers
from es_lora.judge.adapter_files import Adapter, LoraModule
from es_lora.judge.base_index import Base, BaseMismatchError, BlockBuffer, FileWeight, Key


@torch.no_grad()
def _spectrum(module: LoraModule) -> Tuple[float, float]:
    """(||BA||_F^2, stable rank ||BA||_F^2 / ||BA||_2^2) by the r x r core; 0, 0 for BA = 0."""
    _, up_core = torch.linalg.qr(module.up.flatten(1).float(), mode="r")  # (r, r)
    _, down_core = torch.linalg.qr(module.down.flatten(1).float().T, mode="r")
    squares = torch.linalg.svdvals(up_core @ down_core.T).square()
    total, largest = squares.sum().item(), squares.max().item()
    return total, total / largest if largest > 0 else 0.0


class Measurer:
    """Measures adapters against one base; the frozen weights' norms are computed once."""

    def __init__(self, base: Base):
        self.base = base
        self._weights: Dict[Key, FileWeight] = {}
        self._buffer = BlockBuffer()

    def measure(self, adapter: Adapter) -> Dict[str, Any]:
        """Columns cs_row, cs_matrix, delta_norm, stable_rank, update_norm ({component: value}).

        update_norm is the root of the summed squares of ||scale BA||, what is added to the weights.
        Raises BaseMismatchError where the base lacks a weight or has it in another shape, and
        ValueError where the adapter is not whole."""
        self._find_weights(adapter)
        self._check_whole(adapter)
        layers, spectra = [], []
        for key, module in adapter.modules.items():
            component = self.base.component(key[0])
            layers.append(LoraLayer(key[1], component, self._weights[key], module.down, module.up))
        measured = dict(measure_layers(layers))
        for layer, module in zip(layers, adapter.modules.values()):
            spectra.append((layer.component, module.scale, *_spectrum(module)))
        measured["stable_rank"], measured["update_norm"] = {}, {}
        for component in measured["cs_row"]:
            mine = [row for row in spectra if component in ("all", row[0])]
            measured["stable_rank"][component] = math.fsum(row[3] for row in mine) / len(mine)
            measured["update_norm"][component] = math.sqrt(math.fsum(row[1] ** 2 * row[2] for row in mine))
        return measured

    def _check_whole(self, adapter: Adapter) -> None:
        """Raises ValueError where layers of the base are missing that its configuration names."""
        found = {self.base.find(*key) for key in adapter.modules}
        paths = [key[1] for key in found if key is not None]
        kinds = {re.sub(r"\d+", "N", path) for path in paths}

        def is_one(path: str, targets: Sequence[str]) -> bool:
            return any(path == target or path.endswith("." + target) for target in targets)

        missing = [target for target in adapter.targets if not any(is_one(path, [target]) for path in paths)]
        for key in self.base.stored:  # of the same layers in other blocks
            if key not in found and re.sub(r"\d+", "N", key[1]) in kinds and is_one(key[1], adapter.targets):
                missing.append(key[1])
        if missing:
            missing = sorted(dict.fromkeys(missing))
            raise ValueError(
                f"it is not whole: {len(missing)} layers that its configuration names are missing "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"
            )

    def _find_weights(self, adapter: Adapter) -> None:
        missing, unfit = [], []
        for key, module in adapter.modules.items():
            if key in self._weights:
                continue
            found = self.base.find(*key)
            if found is None:
                missing.append(f"{key[0]} layer {key[1]}")
                continue
            shape, wanted = self.base.shapes[found], (module.up.shape[0], module.down.flatten(1).shape[1])
            flat = (shape[0], math.prod(shape[1:])) if shape else ()
            transposed = len(shape) == 2 and flat == wanted[::-1] and (adapter.transposed or flat != wanted)
            if not transposed and flat != wanted:
                unfit.append(f"{key[1]} is {flat} in the base and {wanted} in the adapter")
                continue
            self._weights[key] = FileWeight(self.base.stored[found], *wanted, transposed, self._buffer)
        if missing:
            raise BaseMismatchError(
                f"the base {self.base.path} has no weight for {len(missing)} of {len(adapter.modules)} LoRA layers: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; is it the model they were trained on?"
            )
        if unfit:
            raise BaseMismatchError(
                f"{len(unfit)} weights of the base {self.base.path} have another shape: {'; '.join(unfit[:3])}; give "
                "the unquantised base that the adapters were trained on"
            )
