"""GGUF files as bases: dequantised once into a folder in Hugging Face format, which everything else
reads.

The library transformers knows the architectures and their tensor names. One tensor at a time is
dense while it is converted, and the model is held in the precision of the folder, never whole in
float32 unless that was asked for.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from gguf import Keys
from transformers import AutoTokenizer, GgufConfig
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from base.bases_folder import convert_once
from base.gguf_vocabulary import PRE_TOKENIZERS, SOURCE_NAME, copied_vocabulary, set_pre_tokenizer
from base.loading import from_hub_or_folder, whole_model
from es_lora.files import link_or_copy

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def gguf_architecture(file: Path) -> str:
    """The architecture that a GGUF file names. Raises ValueError where it is damaged or none."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(str(file)).get_field("general.architecture")
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ValueError(f"{file} is no readable GGUF file ({error}); fetch it again") from error
    if field is None:
        raise ValueError(f"{file} names no architecture: it holds no model")
    return str(field.contents())


def check_gguf(file: Path) -> None:
    """Raises FileNotFoundError or ValueError, naming the architecture, where a file cannot be
    read."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: check the path, or --gguf_file")
    architecture = gguf_architecture(file)
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES or architecture in ("general", "tokenizer", "t5", "umt5"):
        known = ", ".join(name for name in GGUF_SUPPORTED_ARCHITECTURES if name not in ("general", "tokenizer"))
        raise ValueError(
            f"{file}: transformers cannot read the GGUF architecture {architecture!r}; it reads {known}. Give the "
            "model in Hugging Face format"
        )


def load_gguf(file: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a GGUF file, every weight dequantised into dtype, on the CPU."""
    model = from_hub_or_folder(
        whole_model,
        str(file.parent),
        f"model {file.name}",
        gguf_file=file.name,
        quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
        dtype=dtype,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it is dense now
    return model


def load_gguf_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file, with its chat template, splitting words as llama.cpp does."""
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    name = next((entry.value for entry in copied_vocabulary(file) if entry.key == Keys.Tokenizer.PRE), None)
    if name in PRE_TOKENIZERS:  # transformers does not know all of them, and then splits as GPT-2 does
        set_pre_tokenizer(tokenizer.backend_tokenizer, name)
    return tokenizer


def convert_gguf(file: Path, dtype: torch.dtype, folder: Path) -> None:
    """Write model and tokenizer in Hugging Face format, and the file itself beside them.

    llama.cpp and Ollama put adapters over that file, and what it says of the tokenizer is copied
    into merged models. On the same disk it is a second name of the file and takes no room.
    """
    load_gguf(file, dtype).save_pretrained(folder)
    load_gguf_tokenizer(file).save_pretrained(folder)
    link_or_copy(file, folder / SOURCE_NAME)


def gguf_folder(file: Path, dtype: torch.dtype, root: Path) -> Path:
    """The folder in Hugging Face format made of a GGUF file, converted on first use.

    It is named by the file's content and the precision, so that a changed file is converted anew.
    Raises as check_gguf.
    """
    check_gguf(file)
    folder = root / f"{file.stem}-{DTYPE_NAMES[dtype]}-{_fingerprint(file)}"
    return convert_once(folder, file.name, lambda aside: convert_gguf(file, dtype, aside))


def _fingerprint(file: Path) -> str:
    """Twelve digits of the file's SHA-256."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:12]
