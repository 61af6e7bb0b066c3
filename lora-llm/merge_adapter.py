"""Fold LoRA adapters into their base: one ordinary model folder that needs no PEFT.

    python merge_adapter.py --adapter OUTPUT/adapter --output MERGED
    python merge_adapter.py --adapter RUN1/adapter:0.7 RUN2/adapter:0.3 --output MERGED

Every layer is added up in float32 and cast once. The folder appears only after the model in it has
given the same logits as base and adapters apart. Exit codes: 0 merged; 2 bad input, or the logits
differ (nothing is written).
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import quiet_libraries  # noqa: F401  (first, before the libraries speak)
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from adapters.folders import (
    AdapterFolder,
    OneLineParser,
    base_of,
    load_frozen_base,
    load_tokenizer_of,
    open_adapter,
    put_adapters_on,
    stored_dtype,
)
from text.collator import encode_source, pad_batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference of two logits, as a share of the largest logit: a few roundings of the coarser
# of the two models (what is computed apart, what is written), added up over its layers.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
TOLERANCE_8_BIT = 8e-2  # layers of 8 bits round the activations to 8 bits too, which the merged ones do not
PROBES = (
    "How do I keep rice from sticking to the pan?",
    "The river rose in the night, and by morning the lower fields were under water. Nobody had expected it so early.",
    "def mean(values):\n    return sum(values) / len(values)",
    "1, 2, 3, 5, 8, 13, 21",
)


def parse_arguments(argv: Optional[Sequence[str]] = None) -> Any:
    parser = OneLineParser([], description="Fold LoRA adapters into their base.", allow_abbrev=False)
    parser.add_argument("--adapter", nargs="+", required=True, help="adapter folders, each as FOLDER or FOLDER:WEIGHT")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--base", help="folder or hub name of the base (default: the one in the adapter's configuration)"
    )
    parser.add_argument("--bits", type=int, choices=(4, 8, 16, 32), help="the base's bits (default: as in training)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the folder written (default: as the base is stored)")
    return parser.parse(argv)


def check_together(adapters: Sequence[AdapterFolder]) -> None:
    """Raises ValueError where weights make no sense: what is not an added matrix cannot be taken by
    halves."""
    if len(adapters) == 1 and adapters[0].weight == 1:
        return
    problems = []
    for adapter in adapters:
        has = [name for name in ("modules_to_save", "use_dora") if adapter.config.get(name)]
        has += ["trained biases"] if adapter.config.get("bias", "none") != "none" else []
        if has:
            problems.append(f"--adapter {adapter.path} has {' and '.join(has)}: merge it alone and with weight 1")
    if problems:
        raise ValueError("; ".join(problems))


@torch.no_grad()
def probe_logits(model: torch.nn.Module, tokenizer: Any) -> torch.Tensor:
    """Logits at every token of the probe sentences, one after the other. (tokens, vocabulary),
    float32, on the CPU."""
    batch = pad_batch([encode_source(tokenizer, text) for text in PROBES], tokenizer.eos_token_id)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}  # (N, T)
    logits = model(**batch).logits.float()  # (N, T, vocabulary)
    return logits[batch["attention_mask"].bool()].cpu()


def activate_weighted(model: PeftModel, adapters: Sequence[AdapterFolder]) -> list[str]:
    """All adapters active at once, each scaled by its weight; their names in the model."""
    names = [f"adapter{number}" for number in range(len(adapters))]
    model.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, adapter in zip(names, adapters):
                if name in module.scaling:
                    module.scaling[name] *= adapter.weight
    return names


@torch.no_grad()
def merge_layers(model: PeftModel, names: list[str], dtype: torch.dtype) -> torch.nn.Module:
    """The base with the active adapters added into its layers in float32, each cast once to
    `dtype`; one layer at a time."""
    for module in tqdm([module for module in model.modules() if isinstance(module, LoraLayer)], desc="Merging"):
        module.get_base_layer().float()
        module.merge(safe_merge=True, adapter_names=names)  # refuses what is not finite
        module.get_base_layer().to(dtype)
    with warnings.catch_warnings():  # nothing is left to merge: this only takes PEFT's wrappers away
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        return model.merge_and_unload().to(dtype)


def dequantised_base(base: torch.nn.Module) -> torch.nn.Module:
    """The quantised base with ordinary layers that hold the same (dequantised) weights."""
    base = base.dequantize()
    if hasattr(base.config, "quantization_config"):
        del base.config.quantization_config
    return base


def tolerance_share(bits: int, dtypes: Sequence[torch.dtype]) -> float:
    """The tolerance as a share of the largest logit: that of the coarsest arithmetic that takes
    part."""
    return max([TOLERANCE[dtype] for dtype in dtypes] + [TOLERANCE_8_BIT] * (bits == 8))


def merge(
    adapters: Sequence[AdapterFolder], base_name: str, bits: Optional[int], dtype: torch.dtype, output: Path
) -> dict:
    """Merge, write aside, compare the logits of what was written, and only then give the folder its
    name.

    Returns the facts written to `merge.json`. Raises ValueError where the logits differ or an
    adapter does not fit.
    """
    tokenizer = load_tokenizer_of(base_name, adapters)
    base, bits = load_frozen_base(base_name, bits, adapters)
    computed_in = base.dtype if bits in (16, 32) else stored_dtype(base_name)
    plain = probe_logits(base, tokenizer)
    model = put_adapters_on(base, tokenizer, adapters)
    activate_weighted(model, adapters)
    apart = probe_logits(model, tokenizer)  # base and adapters side by side, as in training
    if bits in (4, 8):
        print(f"The base is dequantised from {bits} bits: the adapters are merged into the dequantised weights.")
        model = put_adapters_on(dequantised_base(model.unload()), tokenizer, adapters)
        activate_weighted(model, adapters)
    names = [f"adapter{number}" for number in range(len(adapters))]
    merged = merge_layers(model, names, dtype)

    aside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        merged.save_pretrained(str(aside))
        tokenizer.save_pretrained(str(aside))
        del merged, model, base
        written = AutoModelForCausalLM.from_pretrained(str(aside), dtype=dtype)
        written = written.to("cpu" if not torch.accelerator.is_available() else torch.accelerator.current_accelerator())
        largest = (probe_logits(written.eval(), tokenizer) - apart).abs().max().item()
        tolerance = tolerance_share(bits, (dtype, computed_in)) * apart.abs().max().item()
        moved = (apart[:, : plain.shape[1]] - plain).abs().max().item()
        print(
            f"Base in {bits} bits, written as {dtype}. Logits, merged against apart: largest difference {largest:.3g},"
        )
        print(f"tolerance {tolerance:.3g}; the adapters themselves move the logits by up to {moved:.3g}.")
        if not largest <= tolerance:
            raise ValueError(f"the merged model differs from base and adapters by {largest:.3g}; nothing was written")
        facts = {
            "base": base_name,
            "bits": bits,
            "dtype": str(dtype).removeprefix("torch."),
            "adapters": [{"folder": str(adapter.path), "weight": adapter.weight} for adapter in adapters],
            "logits": {"largest_difference": largest, "tolerance": tolerance, "moved_by_adapters": moved},
        }
        (aside / "merge.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for file in aside.iterdir():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        os.rename(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return facts


def main(argv: Optional[Sequence[str]] = None) -> int:
    arguments = parse_arguments(argv)
    try:
        if arguments.output.exists():
            raise ValueError(f"--output {arguments.output} exists; choose another name, nothing is written over")
        adapters = [open_adapter(text) for text in arguments.adapter]
        check_together(adapters)
        base = base_of(adapters, arguments.base)
        dtype = DTYPES[arguments.dtype] if arguments.dtype else stored_dtype(base)
        merge(adapters, base, arguments.bits, dtype, arguments.output)
    except (ValueError, FileNotFoundError) as error:
        print(f"merge_adapter: {error}", file=sys.stderr)
        return 2
    print(f"merged: {arguments.output.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
