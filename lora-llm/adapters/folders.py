"""Adapter folders that a run (or PEFT) left, and the base they belong to: what merge_adapter and
generate_text share."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

from base.loading import from_hub_or_folder, load_base
from base.origin import local_base
from base.spec import BaseSpec
from es_lora.command_line import nearest
from es_lora.files import read_text
from es_lora.inputs.bounds import bound_numbers
from es_lora.inputs.json_text import parsed_json
from es_lora.judge.adapter_files import PICKLE_NAME, QLORA_FOLDER
from es_lora.weights import pickle_advice, refuse_nonfinite, stored_tensors
from settings.checks import LARGEST
from text.hub import offline_if_unreachable

WEIGHTS_FILE = "adapter_model.safetensors"
PLAIN, CHAT = "plain", "chat"  # how a prompt goes in: as it is, or through the chat template


class OneLineParser(HfArgumentParser):
    """Mistakes on the command line end in one line and exit code 2; an unknown flag suggests the
    nearest."""

    def parse(self, argv: Optional[Sequence[str]]) -> argparse.Namespace:
        argv = list(sys.argv[1:] if argv is None else argv)
        bound_numbers(self, LARGEST)
        known = sorted(option for option in self._option_string_actions if option.startswith("--"))
        for word in argv:
            flag = word.split("=")[0]
            if flag.startswith("--") and flag not in known:
                self.error(f"{flag} is unknown{nearest(flag, known)}")
        return self.parse_args(argv)

    def error(self, message: str) -> None:
        self.exit(2, f"{Path(self.prog).stem}: {message}; see --help\n")


@dataclass
class AdapterFolder:
    """One adapter: where it lies, how much of it is used, PEFT's configuration, and what its
    training wrote into it."""

    path: Path
    weight: float
    config: dict[str, Any]
    facts: dict[str, Any]


def open_adapter(text: str) -> AdapterFolder:
    """The adapter of `FOLDER` or `FOLDER:WEIGHT`; a run's folder stands for the adapter that the
    run kept.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or the weight is no
    number.
    """
    folder, weight = _folder_and_weight(text)
    inside = [folder / name for name in (".", "adapter", QLORA_FOLDER)]  # a run's, and qlora.py's checkpoint-N
    folder = next((place for place in inside if (place / "adapter_config.json").is_file()), folder)
    if (folder / PICKLE_NAME).is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"--adapter {folder}: {pickle_advice(folder / PICKLE_NAME)}")
    for name in ("adapter_config.json", WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"--adapter {folder} holds no {name}; give the adapter folder that a run left")
    try:
        config = _object(read_text(folder / "adapter_config.json"), "adapter_config.json")
        with safe_open(str(folder / WEIGHTS_FILE), framework="pt") as handle:
            facts = _object((handle.metadata() or {}).get("es_lora", "{}"), "its metadata")
        if not isinstance(facts.get("base") or {}, dict):
            raise ValueError("its metadata says of the base what is no object")
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"--adapter {folder} is damaged ({error}); take another checkpoint of the run") from error
    refuse_nonfinite(stored_tensors(folder / WEIGHTS_FILE), f"--adapter {folder}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"--adapter {folder} is of type {config.get('peft_type')}; only LORA is supported")
    return AdapterFolder(folder, weight, config, facts)


def _object(text: str, what: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError for any other text."""
    value = parsed_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no JSON object")
    return value


def _folder_and_weight(text: str) -> tuple[Path, float]:
    folder, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(weight) or weight == 0:
        raise ValueError(f"--adapter {text}: the weight must be a finite number other than 0")
    return Path(folder), weight


def base_of(adapters: Sequence[AdapterFolder], given: Optional[str]) -> str:
    """Folder or hub name of the base: the one given, else the one all adapters were trained on.

    Raises ValueError, and as local_base.
    """
    if given:
        return local_base(given, torch.bfloat16)
    bases = sorted({str(adapter.config.get("base_model_name_or_path")) for adapter in adapters})
    if len(bases) != 1 or bases == ["None"]:
        named = " and ".join(bases) if bases else "none"
        raise ValueError(f"give the base model with --base; the adapters name {named}")
    return bases[0]


def trained_bits(adapters: Sequence[AdapterFolder]) -> Optional[dict[str, Any]]:
    """{"bits", "quant_type", "double_quant"} of the base in training, where an adapter tells."""
    return next((adapter.facts["base"] for adapter in adapters if adapter.facts.get("base")), None)


def prompt_of(facts: dict[str, Any], tokenizer: Any) -> str:
    """How an adapter was asked in training, by what its metadata says: CHAT or PLAIN.

    An adapter of another trainer says nothing: the chat template, where there is one.
    """
    known = facts.get("prompt_template") == CHAT if facts else bool(tokenizer.chat_template)
    return CHAT if known else PLAIN


def stored_dtype(base: str) -> torch.dtype:
    """What the base's weights are stored in; float32 where its configuration does not say. Raises
    FileNotFoundError."""
    if not Path(base).exists():
        offline_if_unreachable()
    try:
        dtype = AutoConfig.from_pretrained(base).dtype
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the base model {base} cannot be found; put it there again or name another by --base"
        ) from error
    return dtype or torch.float32


def load_frozen_base(base: str, bits: Optional[int], adapters: Sequence[AdapterFolder]) -> tuple[Any, int]:
    """(model, bits): the base in `bits` bits - by default as in training, else as stored - ready
    for a forward pass.

    Raises FileNotFoundError where it cannot be found, ValueError where it is no causal language
    model.
    """
    dtype, trained = stored_dtype(base), trained_bits(adapters) or {}
    bits = bits or trained.get("bits") or (32 if dtype == torch.float32 else 16)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    spec = BaseSpec(
        base,
        bits,
        compute=dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32,
        quant_type=trained.get("quant_type", "nf4"),
        double_quant=trained.get("double_quant", True),
        device=device,
        spread_MB=10**7,
        for_lora=False,  # nothing here is trained through the base
    )
    loaded = load_base(spec)
    if bits in (16, 32) and device is not None:
        loaded.to(device)
    loaded.config.use_cache = True
    return loaded.eval(), bits


def load_tokenizer_of(base: str, adapters: Sequence[AdapterFolder]) -> Any:
    """The tokenizer that the run saved beside its adapter, else the base's."""
    beside = [adapter.path for adapter in adapters if (adapter.path / "tokenizer_config.json").is_file()]
    flag, place = ("--adapter", str(beside[0])) if beside else ("--base", base)
    tokenizer = from_hub_or_folder(AutoTokenizer.from_pretrained, place, "tokenizer", flag)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
