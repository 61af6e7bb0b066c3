"""PEFT models as the monitor sees them: LoRA layers, trained tensors, and adapters in a folder."""

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cs_fluctuation import LoraLayer
from es_lora.files import write_folder_whole
from es_lora.monitor import EarlyStopMonitor
from es_lora.weights import copies, frozen_weight, put_in, save_tensors


def peft_lora_layers(model: torch.nn.Module, component: str = "lm") -> List[LoraLayer]:
    """The LoRA layers of the model's active adapters, with live references to their matrices.
    Embeddings with a LoRA are left out: they are no matrix product. Of DoRA, B A is measured."""
    layers = []
    module: Any
    for name, module in model.named_modules():
        downs: Any = getattr(module, "lora_A", None)
        ups: Any = getattr(module, "lora_B", None)
        if not all(isinstance(side, torch.nn.ModuleDict) for side in (downs, ups)):
            continue
        for adapter in active_adapters(module):
            if adapter in downs:
                weight = frozen_weight(base_layer(module))
                layers.append(LoraLayer(name, component, weight, downs[adapter].weight, ups[adapter].weight))
    return layers


def active_adapters(module: torch.nn.Module) -> List[str]:
    """The names of a PEFT layer's active adapters; PEFT before 0.6 had one at most."""
    active = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None)
    return [active] if isinstance(active, str) else list(active or ())


def base_layer(module: Any) -> torch.nn.Module:
    """The layer under a PEFT layer; before PEFT 0.6 the layer itself held the frozen weight."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def trainable_tensors(model: torch.nn.Module) -> Dict[str, torch.Tensor]:
    """{name: live tensor} of everything that is trained: LoRA matrices, biases, modules_to_save."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_tensors(model: torch.nn.Module, tensors: Dict[str, torch.Tensor]) -> None:
    """Copy a snapshot's tensors into the model, in place. Raises KeyError for an unknown name."""
    put_in(dict(model.named_parameters()), tensors)


@contextmanager
def weights_swapped_in(model: torch.nn.Module, tensors: Dict[str, torch.Tensor]) -> Iterator[None]:
    """The model with the tensors of a snapshot, and with its own again afterwards."""
    own = copies(trainable_tensors(model))
    load_tensors(model, tensors)
    try:
        yield
    finally:
        load_tensors(model, own)


def restore_finite(model: torch.nn.Module, step: int, monitor: Optional[EarlyStopMonitor]) -> Optional[int]:
    """After a divergence at `step`: leave finite weights, the model's or the newest measured.

    Returns the step of the weights that the model then holds, None where no finite ones are known.
    """
    if all(bool(tensor.isfinite().all()) for tensor in trainable_tensors(model).values()):
        return step
    newest = monitor.latest_snapshot_step() if monitor is not None else None
    if monitor is not None and newest is not None:
        load_tensors(model, monitor.load_snapshot(newest))
    return newest


def _sort_sets(config: Path) -> None:
    """PEFT writes sets of module names in the order of their hashes, anew in each process."""
    content = json.loads(config.read_text(encoding="utf-8"))
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(content.get(name), list):
            content[name].sort()
    config.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def save_adapter(model: Any, folder: Path, facts: Dict[str, Any], also: Optional[Callable[[str], Any]] = None) -> None:
    """Save the active adapter as a folder, whole or not at all, with JSON facts in its metadata.
    The layout is PEFT's: an adapter not called "default" lies in a subfolder of its name.
    also: puts more into the folder, such as a tokenizer, before it gets its name."""
    from peft import PeftModel

    chosen = {"selected_adapters": list(model.active_adapters)} if isinstance(model, PeftModel) else {}

    def write(aside: Path) -> None:
        model.save_pretrained(str(aside), **chosen)
        for file in aside.rglob("adapter_model.safetensors"):
            with safe_open(str(file), framework="pt") as handle:
                metadata = handle.metadata() or {}
            save_tensors(load_file(str(file)), file, {**metadata, "es_lora": json.dumps(facts)})
        for file in aside.rglob("adapter_config.json"):
            _sort_sets(file)
        if also is not None:
            also(str(aside))

    write_folder_whole(folder, write)
