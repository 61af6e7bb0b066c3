"""Adapters put over their base: whole, with names and shapes that it has, or refused.

PEFT loads what fits, and leaves the rest of an adapter as it was drawn at random."""

import warnings
from collections.abc import Sequence
from typing import Any, Optional

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.folders import WEIGHTS_FILE, AdapterFolder, load_tokenizer_of
from base.loading import fit_embeddings, refuse_names
from es_lora.command_line import is_out_of_memory, plain_text
from es_lora.history import is_whole


def put_adapters_on(base: torch.nn.Module, tokenizer: Any, adapters: Sequence[AdapterFolder]) -> PeftModel:
    """The base with every adapter loaded as `adapter0`, `adapter1`, ..., the first one active.

    PEFT's names cannot hold the dots and slashes of folders. Raises ValueError where an adapter
    does not fit the base, or is not whole.
    """
    fit_embeddings(base, tokenizer)
    return _with_adapters(base, adapters).eval()


def check_adapters(base: str, adapters: Sequence[AdapterFolder]) -> None:
    """The same over a base without weights, before anything large is loaded.

    Raises ValueError. A base that transformers cannot build from its configuration passes.
    """
    for adapter in adapters:
        _check_ranks(adapter)
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
            fit_embeddings(empty, load_tokenizer_of(base, adapters))
    except Exception:  # whatever it is, loading the base says it
        return
    plain = [adapter for adapter in adapters if not adapter.config.get("use_dora")]  # its norms need weights
    if plain and not any(adapter.config.get("modules_to_save") for adapter in plain):
        with warnings.catch_warnings():  # PEFT's own copy into what has no weights does nothing, and says so
            warnings.filterwarnings("ignore", message=".*non-meta parameter")
            _with_adapters(empty, plain)


def swap_adapter(model: PeftModel, adapter: AdapterFolder, before: str, name: str) -> None:
    """Put an adapter on as `name` in place of the one called `before`, which is taken off.

    Raises ValueError where it does not fit the base, or is not whole.
    """
    _check_ranks(adapter)
    _put_on(model, model, adapter, name)
    model.set_adapter(name)
    model.delete_adapter(before)
    model.eval()


def _with_adapters(base: torch.nn.Module, adapters: Sequence[AdapterFolder]) -> PeftModel:
    model = None
    for number, adapter in enumerate(adapters):
        model = _put_on(model, base, adapter, f"adapter{number}")
    return model


def _put_on(model: Optional[PeftModel], base: torch.nn.Module, adapter: AdapterFolder, name: str) -> PeftModel:
    """The model with an adapter more; without one yet, the base with its first."""
    where = f"--adapter {adapter.path}"
    try:
        if model is None:
            config = PeftConfig.from_pretrained(str(adapter.path), inference_mode=True)
            model = PeftModel(base, config, name)
        result = model.load_adapter(str(adapter.path), name)
    except Exception as error:  # by what its configuration says, which PEFT does not check
        if is_out_of_memory(error):
            raise
        lines = plain_text(str(error)).strip().splitlines() or [type(error).__name__]
        told = " ".join(line.strip() for line in lines[:2])
        raise ValueError(f"{where} does not fit its base: {told:.300}") from error
    refuse_names(where, "tensors that its base has a place for are missing", _short(result.missing_keys, name))
    refuse_names(where, "tensors of it have no place in the base", _short(result.unexpected_keys, name))
    return model


def _short(names: Sequence[str], adapter: str) -> list[str]:
    """PEFT's names as they stand in a file."""
    return [name.replace(f".{adapter}.", ".") for name in names]


def _check_ranks(adapter: AdapterFolder) -> None:
    """Raises ValueError where the configuration asks for ranks that the file does not have.

    PEFT makes the matrices as the configuration says, before it looks at the file.
    """
    where = f"--adapter {adapter.path}"
    with safe_open(str(adapter.path / WEIGHTS_FILE), framework="pt") as handle:
        shapes = {name: handle.get_slice(name).get_shape() for name in handle.keys()}
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name and shape}
    ranks |= {shape[0] for name, shape in shapes.items() if "lora_embedding_A" in name and shape}
    pattern = adapter.config.get("rank_pattern") or {}
    asked = [adapter.config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [None])]
    if not all(is_whole(rank, 1) for rank in asked):
        raise ValueError(f"{where}: its configuration has the ranks {asked!r:.80}, which are no whole numbers")
    if not ranks:
        raise ValueError(f"{where} holds no matrix of a LoRA among its {len(shapes)} tensors; take another checkpoint")
    if not set(asked) & ranks or max(asked) > max(ranks):
        told = ", ".join(map(str, sorted(ranks)[:3]))
        raise ValueError(f"{where}: its configuration says rank {max(asked)}, and its matrices have rank {told}")
