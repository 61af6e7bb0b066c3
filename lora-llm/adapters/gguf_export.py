"""GGUF files for llama.cpp and Ollama: a merged model, or the LoRA alone for use over a GGUF of its
base.

The package gguf gives the names and writes the bytes. llama.cpp turns q and k by rotations of
neighbours, Hugging Face of halves; the rows of q and k of the llama architecture are permuted for
it. A file appears whole or not at all.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    TensorNameMap,
    get_tensor_name_map,
)
from gguf.quants import quant_shape_to_byte_shape, quantize
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from adapters.folders import WEIGHTS_FILE, AdapterFolder
from base.gguf_vocabulary import Entry, add_vocabulary
from es_lora.files import write_whole

# {model type of transformers: (llama.cpp's architecture, whether the rows of q and k are permuted)}
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
ROPE_TYPES = ("default", "linear", "llama3")
TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
Q8_BLOCK = 32
LARGEST_F16 = 65504.0
MERGE = "write the merged model by --gguf"
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Layout:
    """How a model lies in a GGUF file: its architecture, its names, and what is permuted."""

    architecture: str
    names: TensorNameMap
    heads: dict[str, int]  # {"q_proj", "k_proj": heads}; empty where nothing is permuted

    def name(self, name: str) -> str:
        """llama.cpp's name of a tensor of transformers. Raises ValueError where it has none."""
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp has no place for {name} in the architecture {self.architecture}")
        return found

    def permuted(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """A weight (out, in), a bias (out,) or a LoRA's B (out, r), rows in llama.cpp's order."""
        heads = self.heads.get(name.split(".")[-2])
        return rows if heads is None else permute_rows(rows, heads)


def permute_rows(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Within every head the rows i and i + half become neighbours."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape).contiguous()


def layout_of(config: Any) -> Layout:
    """The layout of a model with that configuration. Raises ValueError, by name, on one that cannot
    be written."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"a model of the type {config.model_type} cannot be written as GGUF here; those that can: {known}"
        )
    architecture, permuted = ARCHITECTURES[config.model_type]
    rope, act = _rope(config)["rope_type"], config.hidden_act
    if rope not in ROPE_TYPES:
        raise ValueError(f"rope_type {rope} cannot be written as GGUF here; those that can: {', '.join(ROPE_TYPES)}")
    if act != "silu":
        raise ValueError(f"hidden_act {act} cannot be written as GGUF: llama.cpp has silu in {architecture}")
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if permuted else {}
    return Layout(architecture, get_tensor_name_map(MODEL_ARCH(number), config.num_hidden_layers), heads)


def _rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **(config.rope_parameters or {})}


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# ---------------------------------------------------------------------------- the merged model


def write_merged_gguf(folder: Path, config: Any, vocabulary: Sequence[Entry], kind: str, path: Path) -> None:
    """Write a model folder in Hugging Face format as GGUF; `kind` is f16 or q8_0, for matrices.

    vocabulary: as long as the model has embeddings. Tensors are read, converted and written one at
    a time. Raises ValueError on what cannot be written.
    """
    layout = layout_of(config)
    tensors = list(_tensors(folder, config, layout))
    quantised, file_type = TYPES[kind]

    def write(aside: Path) -> None:
        writer = GGUFWriter(str(aside), layout.architecture)
        _describe_model(writer, config, file_type)
        add_vocabulary(writer, vocabulary)
        kinds = [_kind_of(shape, quantised) for _, shape, _ in tensors]
        for (name, shape, _), stored in zip(tensors, kinds):
            _announce(writer, name, shape, stored)
        _write_header(writer)
        for (name, _, read), stored in zip(tensors, kinds):
            writer.write_tensor_data(_converted(name, read(), stored))
        writer.close()

    write_whole(path, write)


Tensor = tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]


def _tensors(folder: Path, config: Any, layout: Layout) -> Iterator[Tensor]:
    """(name, shape, how to read it) of all tensors, under llama.cpp's names."""
    if _rope(config)["rope_type"] == "llama3":
        factors = rope_factors(config)
        yield ROPE_FACTORS, tuple(factors.shape), lambda: factors
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as handle:
            for name in handle.keys():
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                shape = tuple(handle.get_slice(name).get_shape())
                yield layout.name(name), shape, partial(_read_permuted, layout, file, name)


def _read_permuted(layout: Layout, file: Path, name: str) -> torch.Tensor:
    with safe_open(str(file), framework="pt") as handle:
        return layout.permuted(name, handle.get_tensor(name).float())


def rope_factors(config: Any) -> torch.Tensor:
    """By what llama.cpp divides every frequency of a `llama3` rope: (head_dim / 2,).

    Source: the rope scaling of Llama 3.1, as the configuration of transformers describes it.
    """
    rope, size = _rope(config), _head_dim(config)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the first context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, scaled whole; 1: fast, left alone
    return (1 / ((1 - share) / rope["factor"] + share)).float()


def _describe_model(writer: GGUFWriter, config: Any, file_type: LlamaFileType) -> None:
    rope = _rope(config)
    writer.add_type(GGUFType.MODEL)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _kind_of(shape: tuple[int, ...], quantised: GGMLQuantizationType) -> GGMLQuantizationType:
    """Vectors stay in float32; rows that are no whole blocks of 8 bits are written in f16."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    whole = quantised != GGMLQuantizationType.Q8_0 or shape[-1] % Q8_BLOCK == 0
    return quantised if whole else GGMLQuantizationType.F16


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], stored: GGMLQuantizationType) -> None:
    if stored == GGMLQuantizationType.Q8_0:
        shape = quant_shape_to_byte_shape(shape, stored)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=stored)
        return
    dtype = np.dtype(np.float32 if stored == GGMLQuantizationType.F32 else np.float16)
    writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize)


def _converted(name: str, tensor: torch.Tensor, stored: GGMLQuantizationType) -> np.ndarray:
    """The bytes of a float32 tensor. Raises ValueError where f16 cannot hold it."""
    if stored != GGMLQuantizationType.F32 and not tensor.abs().max() <= LARGEST_F16:
        raise ValueError(f"{name} holds {tensor.abs().max():.3g}, and f16 ends at {LARGEST_F16:.0f}")
    return quantize(tensor.numpy(), stored)


def _write_header(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


# ------------------------------------------------------------------------- the adapter alone


def write_lora_gguf(adapters: Sequence[AdapterFolder], config: Any, path: Path) -> None:
    """Write adapters as one LoRA in float32, for `llama-cli --lora` or Ollama's ADAPTER.

    llama.cpp scales every layer by alpha / rank; what differs from that is multiplied into B.
    Several adapters are put side by side. Raises ValueError on what is no LoRA of a linear layer.
    """
    layout = layout_of(config)
    pairs = _lora_pairs(adapters, config)
    alpha = float(adapters[0].config["lora_alpha"])

    def write(aside: Path) -> None:
        writer = GGUFWriter(str(aside), layout.architecture)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for module, parts in pairs.items():
            down, up = _side_by_side(parts, alpha)
            name = layout.name(f"{module}.weight")
            writer.add_tensor(f"{name}.lora_a", down.numpy())
            writer.add_tensor(f"{name}.lora_b", layout.permuted(f"{module}.weight", up).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_whole(path, write)


@dataclass(frozen=True)
class LoraPart:
    """One adapter's part of a layer: down (r, in), up (out, r), and what their product is
    multiplied by."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


def check_lora_alone(adapters: Sequence[AdapterFolder]) -> None:
    """Raises ValueError where an adapter is more than a LoRA of linear layers."""
    problems = []
    for adapter in adapters:
        has = [name for name in ("use_dora", "modules_to_save", "lora_bias") if adapter.config.get(name)]
        has += ["trained biases"] if adapter.config.get("bias", "none") != "none" else []
        if has:
            problems.append(f"--adapter {adapter.path} has {' and '.join(has)}, which llama.cpp has no LoRA for")
    if problems:
        raise ValueError(f"{'; '.join(problems)}; {MERGE}")


def _lora_pairs(adapters: Sequence[AdapterFolder], config: Any) -> dict[str, list[LoraPart]]:
    """{layer: its parts}, by transformers' names."""
    check_lora_alone(adapters)
    pairs: dict[str, list[LoraPart]] = {}
    for adapter in adapters:
        with safe_open(str(adapter.path / WEIGHTS_FILE), framework="pt") as handle:
            tensors = {
                name.removeprefix("base_model.model."): handle.get_tensor(name).float() for name in handle.keys()
            }
        for name, down in tensors.items():
            module, found, _ = name.partition(".lora_A.weight")
            if name.startswith("lm_head.") and config.tie_word_embeddings:
                raise ValueError(
                    f"--adapter {adapter.path}: lm_head is the embeddings here, no layer of a GGUF; {MERGE}"
                )
            if not found and not name.endswith(".lora_B.weight"):
                raise ValueError(f"--adapter {adapter.path}: {name} is no LoRA of a linear layer; {MERGE}")
            if found:
                part = LoraPart(down, tensors[f"{module}.lora_B.weight"], _scale(adapter, module, down.shape[0]))
                pairs.setdefault(module, []).append(part)
    return pairs


def _scale(adapter: AdapterFolder, module: str, rank: int) -> float:
    """What PEFT multiplies B A by in a layer, times the adapter's weight."""
    config = adapter.config
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return adapter.weight * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _side_by_side(parts: Sequence[LoraPart], alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) of all parts together, so that alpha / rank scales their product as they ask."""
    rank = sum(part.down.shape[0] for part in parts)
    ups = []
    for part in parts:
        factor = part.scale * rank / alpha
        ups.append(part.up if math.isclose(factor, 1) else part.up * factor)
    return torch.cat([part.down for part in parts]).contiguous(), torch.cat(ups, 1).contiguous()
