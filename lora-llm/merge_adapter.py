"""Fold LoRA adapters into their base: one ordinary model folder that needs no PEFT.

    python merge_adapter.py --adapter OUTPUT/adapter --output MERGED
    python merge_adapter.py --adapter RUN1/adapter:0.7 RUN2/adapter:0.3 --output MERGED
    python merge_adapter.py --adapter OUTPUT/adapter --gguf MODEL.gguf --modelfile Modelfile
    python merge_adapter.py --adapter OUTPUT/adapter --lora_gguf ADAPTER.gguf --modelfile Modelfile

Every layer is added up in float32 and cast once. The folder appears only after the model in it has
given the same logits as base and adapters apart. --gguf writes the merged model for llama.cpp and
Ollama; --lora_gguf the adapters alone, which run there over a GGUF of the base. Exit codes: 0
written; 2 bad input, or the logits differ (nothing is written).
"""

import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import quiet_libraries  # noqa: F401  (first, before the libraries speak)
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.fitting import check_adapters, put_adapters_on
from adapters.folders import (
    CHAT,
    PLAIN,
    WEIGHTS_FILE,
    AdapterFolder,
    OneLineParser,
    base_of,
    load_frozen_base,
    load_tokenizer_of,
    open_adapter,
    prompt_of,
    stored_dtype,
    trained_bits,
)
from adapters.gguf_export import TYPES, check_lora_alone, layout_of, write_lora_gguf, write_merged_gguf
from adapters.modelfile import licence_of, modelfile, path_from
from base.gguf_vocabulary import SOURCE_NAME, Entry, adds_bos, fitted_vocabulary, vocabulary_for
from es_lora.command_line import reported
from es_lora.files import write_text_whole
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
    parser.add_argument("--output", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--base", help="folder or hub name of the base (default: the one in the adapter's configuration)"
    )
    parser.add_argument("--bits", type=int, choices=(4, 8, 16, 32), help="the base's bits (default: as in training)")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="of the merged model (default: as the base is stored; finer for --gguf alone)",
    )
    parser.add_argument("--gguf", type=Path, help="write the merged model to this GGUF file, for llama.cpp and Ollama")
    parser.add_argument("--gguf_type", choices=list(TYPES), default="f16", help="of its matrices (default %(default)s)")
    parser.add_argument("--gguf_vocab", type=Path, help="a GGUF of the same base, to copy the tokenizer's keys from")
    parser.add_argument("--lora_gguf", type=Path, help="write the adapters alone to this GGUF file: llama-cli --lora")
    parser.add_argument("--modelfile", type=Path, help="write a Modelfile for `ollama create` to this file")
    parser.add_argument(
        "--modelfile_from", help="a GGUF or an Ollama model that the adapters run over (default: the base's GGUF)"
    )
    parser.add_argument(
        "--modelfile_prompt",
        choices=(CHAT, PLAIN),
        help="chat template or the prompt as typed (default: as in training)",
    )
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


def changes_embeddings(adapter: AdapterFolder) -> bool:
    """Whether a LoRA lies on the embeddings, or on the output head."""
    with safe_open(str(adapter.path / WEIGHTS_FILE), framework="pt") as handle:
        return any("lora_embedding_" in name or "lm_head.lora_" in name for name in handle.keys())


def untie(base: torch.nn.Module) -> None:
    """Give the output head weights of its own, where it shares those of the embeddings.

    A LoRA on one of both would be merged into the other too.
    """
    head = base.get_output_embeddings()
    if head is None or head.weight is not base.get_input_embeddings().weight:
        return
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    base.config.get_text_config().tie_word_embeddings = base.config.tie_word_embeddings = False
    print("The output head is written apart from the embeddings, which the adapter changes.")


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
    if any(changes_embeddings(adapter) for adapter in adapters):
        untie(base)
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


# ------------------------------------------------------------------------------ what is written


def check_files(arguments: Any) -> None:
    """Raises ValueError where nothing is asked for, a name is taken, or a Modelfile has no
    model."""
    problems = []
    files = {name: getattr(arguments, name) for name in ("output", "gguf", "lora_gguf", "modelfile")}
    if not any((arguments.output, arguments.gguf, arguments.lora_gguf)):
        problems.append("give --output FOLDER, --gguf FILE or --lora_gguf FILE")
    elif arguments.modelfile and not (arguments.gguf or arguments.lora_gguf):
        problems.append("--modelfile needs --gguf or --lora_gguf, the model that it names")
    for name, path in files.items():
        if path is not None and path.exists():
            problems.append(f"--{name} {path} exists; choose another name, nothing is written over")
    if problems:
        raise ValueError("; ".join(problems))


def ollama_text(
    arguments: Any, adapters: Sequence[AdapterFolder], base: str, tokenizer: Any, vocabulary: Sequence[Entry]
) -> str:
    """The Modelfile's text: the merged model where it is written, else the adapters over the base's
    GGUF. Raises ValueError where that is not known."""
    source, adapter = arguments.modelfile_from, None
    if arguments.gguf:
        source = path_from(arguments.modelfile, arguments.gguf)
    else:
        adapter = path_from(arguments.modelfile, arguments.lora_gguf)
        beside = Path(base) / SOURCE_NAME
        source = source or (path_from(arguments.modelfile, beside) if beside.is_file() else None)
    if source is None:
        raise ValueError("--modelfile: no GGUF of the base is known; name it, or Ollama's model, by --modelfile_from")
    return modelfile(
        tokenizer,
        arguments.modelfile_prompt or prompt_of(adapters[0].facts, tokenizer),
        source=source,
        adapter=adapter,
        adds_bos=adds_bos(vocabulary),
        context=AutoConfig.from_pretrained(base).max_position_embeddings,
        licence=licence_of(base),
    )


def merged_dtype(arguments: Any, adapters: Sequence[AdapterFolder], base: str) -> torch.dtype:
    """The precision to merge in: as the base is stored.

    A bf16 base of which only a GGUF is written is merged in f16, which a GGUF holds. Where it is
    loaded in 32 bits, it is merged in float32. By way of bf16 the difference is nine times as large
    (tests/benchmarks/gguf_export.md).
    """
    if arguments.dtype:
        return DTYPES[arguments.dtype]
    stored = stored_dtype(base)
    if arguments.output is not None or stored != torch.bfloat16:
        return stored
    bits = arguments.bits or (trained_bits(adapters) or {}).get("bits")
    return torch.float32 if bits == 32 else torch.float16


@contextmanager
def folder_for(arguments: Any) -> Iterator[Path]:
    """Where the merged folder goes: --output, or beside the GGUF file for as long as it is
    needed."""
    if arguments.output is not None:
        yield arguments.output
        return
    arguments.gguf.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.gguf.parent, prefix=f".{arguments.gguf.name}.") as scratch:
        yield Path(scratch) / "merged"


def write_all(arguments: Any, adapters: Sequence[AdapterFolder], base: str) -> None:
    """Everything that is asked for; what cannot be written is found before anything is merged."""
    vocabulary: list[Entry] = []
    text = None
    if arguments.gguf or arguments.lora_gguf:
        layout_of(AutoConfig.from_pretrained(base))
    if arguments.gguf or arguments.modelfile:
        tokenizer = load_tokenizer_of(base, adapters)
        vocabulary = vocabulary_for(tokenizer, base, arguments.gguf_vocab)
    if arguments.modelfile:
        text = ollama_text(arguments, adapters, base, tokenizer, vocabulary)
    if arguments.lora_gguf:
        check_lora_alone(adapters)
    if arguments.output or arguments.gguf:
        with folder_for(arguments) as folder:
            merge(adapters, base, arguments.bits, merged_dtype(arguments, adapters, base), folder)
            if arguments.gguf:
                config = AutoConfig.from_pretrained(folder)
                fitted = fitted_vocabulary(vocabulary, config.vocab_size, tokenizer)
                write_merged_gguf(folder, config, fitted, arguments.gguf_type, arguments.gguf)
    if arguments.lora_gguf:
        write_lora_gguf(adapters, AutoConfig.from_pretrained(base), arguments.lora_gguf)
    if text is not None:
        write_text_whole(arguments.modelfile, text)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command line; the exit code."""
    arguments = parse_arguments(argv)
    return reported("merge_adapter", lambda: _merge(arguments))


def _merge(arguments: Any) -> int:
    check_files(arguments)
    adapters = [open_adapter(text) for text in arguments.adapter]
    check_together(adapters)
    base = base_of(adapters, arguments.base)
    check_adapters(base, adapters)
    write_all(arguments, adapters, base)
    for name in ("output", "gguf", "lora_gguf", "modelfile"):
        if getattr(arguments, name) is not None:
            print(f"{'merged' if name == 'output' else name}: {getattr(arguments, name).resolve()}")
    if arguments.modelfile:
        print(f"next: ollama create NAME -f {arguments.modelfile}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
