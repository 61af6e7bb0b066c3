"""The frozen base model and its tokenizer, in 4, 8, 16 or 32 bits."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from peft import prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import cached_file

from base.layers import check_dequantisation
from base.spec import BaseSpec
from es_lora.command_line import is_out_of_memory, plain_text
from es_lora.weights import keep_as_loaded, quantisation_scales, refuse_nonfinite, stored_tensors
from text.hub import offline_if_unreachable


def check_base_path(name: str) -> None:
    """Raises FileNotFoundError where `name` is meant as a folder and holds no model."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        found = ", ".join(sorted(file.name for file in path.glob("*.gguf")))
        fix = f"; of its GGUF files choose one by --gguf_file: {found}" if found else ""
        raise FileNotFoundError(f"--model_name_or_path {name}: the folder holds no config.json, so it is no model{fix}")
    looks_like_path = name.startswith((".", "/", "~")) or path.exists() or name.count("/") > 1
    if looks_like_path and not path.is_dir():
        raise FileNotFoundError(f"--model_name_or_path {name}: there is no such folder")


def compute_dtype(bf16: bool, fp16: bool) -> torch.dtype:
    """What the base computes in: bf16 or fp16 where asked for, float32 otherwise."""
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def from_hub_or_folder(load: Any, name: str, what: str, flag: str = "--model_name_or_path", **options: Any) -> Any:
    """`load(name)`, with one message in place of the hub's many where it cannot be had or read.

    flag: the one that named it.
    """
    offline = not Path(name).exists() and offline_if_unreachable()
    given = f"{flag} {name}"
    try:
        return load(name, **options)
    except OSError as error:
        reason = "the hub does not answer" if offline else _first_line(error)
        raise FileNotFoundError(
            f"{given}: no {what} there ({reason}); give a folder with a model in Hugging Face format, "
            "or a hub name where the hub can be reached"
        ) from error
    except ImportError as error:
        install = f": pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(
            f"{given}: its {what} needs a package that is not here ({_first_line(error)}){install}"
        ) from error
    except Exception as error:
        if is_out_of_memory(error) or type(error) is ValueError:  # this one is a setting that does not fit
            raise
        raise ValueError(
            f"{given}: its {what} cannot be read ({_first_line(error)}); copy or download it again"
        ) from error


def _first_line(error: BaseException) -> str:
    return (plain_text(str(error)).strip() or type(error).__name__).splitlines()[0]


def load_tokenizer(base: BaseSpec) -> Any:
    """The base model's tokenizer, padding on the right, with a pad token (its unknown or end token
    where it has none)."""
    check_base_path(base.name)
    options = {**base.hub_options, "padding_side": "right"}
    tokenizer = from_hub_or_folder(AutoTokenizer.from_pretrained, base.name, "tokenizer", **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"--model_name_or_path {base.name}: its tokenizer has no pad, unknown or end token; add a pad_token to it"
        )
    return tokenizer


def _device_map(spec: BaseSpec) -> dict[str, Any]:
    """The whole model on one device, or spread over all GPUs where there are several."""
    if spec.on_cpu or spec.spread_MB is None or torch.cuda.device_count() == 1:
        return {"device_map": {"": "cpu" if spec.on_cpu else spec.device}}
    memory = f"{spec.spread_MB}MB"
    return {"device_map": "auto", "max_memory": {index: memory for index in range(torch.cuda.device_count())}}


def _quantisation(spec: BaseSpec) -> Optional[BitsAndBytesConfig]:
    if spec.bits not in (4, 8):
        return None
    return BitsAndBytesConfig(
        load_in_4bit=spec.bits == 4,
        load_in_8bit=spec.bits == 8,
        bnb_4bit_compute_dtype=spec.compute,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_quant_type=spec.quant_type,
    )


def load_base(spec: BaseSpec) -> torch.nn.Module:
    """The base model in its bits, ready to be trained on (norms in float32 where quantised).

    Raises FileNotFoundError where it cannot be found, ValueError where it is no causal language
    model.
    """
    check_base_path(spec.name)
    options = spec.hub_options
    config = from_hub_or_folder(AutoConfig.from_pretrained, spec.name, "config.json", **options)
    if type(config) not in AutoModelForCausalLM._model_mapping and not spec.trust_remote_code:
        raise ValueError(f"--model_name_or_path {spec.name}: a {config.model_type} model is no causal language model")
    if spec.attention is not None:
        options["attn_implementation"] = spec.attention
    quantisation = _quantisation(spec)
    if quantisation is not None or not spec.on_cpu:
        options.update(_device_map(spec))
    options.update(dtype=spec.stored_dtype, quantization_config=quantisation)
    base = from_hub_or_folder(whole_model, spec.name, "weights", **options)
    base.config.use_cache = False
    _check_finite(base, spec)
    if quantisation is not None:
        keep_as_loaded(base)
        check_dequantisation(base)
        return prepare_model_for_kbit_training(base, spec.checkpointing is not None, spec.checkpointing)
    if spec.small_parts_in_float32:
        small_parts_in_float32(base)
    if spec.checkpointing is not None and spec.for_lora:
        base.enable_input_require_grads()
    return base


def whole_model(name: str, **options: Any) -> torch.nn.Module:
    """A causal language model of which every tensor was in its files, in the model's shape.

    transformers draws at random what is missing. Raises ValueError with the first names.
    """
    found = AutoModelForCausalLM.from_pretrained(
        name, **options, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, told = found
    where = f"--model_name_or_path {name}"
    refuse_names(where, "of its tensors are missing", told["missing_keys"])
    others = [f"{key} {tuple(given)} in place of {tuple(needed)}" for key, given, needed in told["mismatched_keys"]]
    others += [f"{key}.weight {given} in place of {needed}" for key, given, needed in _unfit_quantised(model)]
    refuse_names(where, "of its tensors have another shape than its config.json says", others)
    return model


def _unfit_quantised(model: torch.nn.Module) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(name, its shape, the layer's) of quantised weights, whose shape transformers does not look
    at."""
    for name, layer in model.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (layer.out_features, layer.in_features):
            yield name, tuple(state.shape), (layer.out_features, layer.in_features)


def refuse_names(where: str, what: str, names: Iterable[str]) -> None:
    """Raises ValueError, with the first names and how many, where there are any."""
    names = sorted(names)
    if names:
        more = ", ..." if len(names) > 3 else ""
        raise ValueError(f"{where}: {len(names)} {what} ({', '.join(names[:3])}{more}); copy or download it again")


def _check_finite(base: torch.nn.Module, spec: BaseSpec) -> None:
    """Raises ValueError by the name of the first tensor of the base that holds NaN or infinity.

    Quantised weights may hide it, so that their files are looked at too, of a folder or of the
    hub's cache.
    """
    where = f"--model_name_or_path {spec.name}"
    refuse_nonfinite(base.named_parameters(), where)
    if spec.bits in (4, 8):
        refuse_nonfinite(quantisation_scales(base), where)
        folder = Path(cached_file(spec.name, "config.json", **spec.hub_options)).parent
        for file in sorted(folder.glob("*.safetensors")):
            refuse_nonfinite(stored_tensors(file), where)


def small_parts_in_float32(base: torch.nn.Module) -> None:
    """Norms, biases and logits of a bf16 base on a CPU in float32: they cost little and round a
    lot.

    The matrices stay in bf16 and are multiplied in it, by AMX or AVX-512 where the processor has
    them.
    """
    for parameter in base.parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data.float()
    base.forward = torch.autocast("cpu", torch.bfloat16)(base.forward)  # matrices meet float32 biases and activations
    base.get_output_embeddings().register_forward_hook(lambda head, inputs, logits: logits.float())


def bf16_products() -> str:
    """What multiplies bf16 matrices on this processor, for the screen.

    Without such instructions a step in bf16 takes up to 60 times as long as one in float32.
    """
    able = torch.cpu.get_capabilities()
    for capability, words in (("amx_bf16", " (bf16 by AMX)"), ("avx512_bf16", " (bf16 by AVX-512)"), ("bf16", "")):
        if able.get(capability):
            return words
    return ", which has no bf16 instructions: --bits 32 without --bf16 is many times faster here"


def fit_embeddings(base: torch.nn.Module, tokenizer: Any) -> None:
    """Grow the embeddings where the tokenizer has more tokens than the model; new rows are the mean
    of the old."""
    weight = base.get_input_embeddings().weight
    if len(tokenizer) > weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer), mean_resizing=not weight.is_meta)
