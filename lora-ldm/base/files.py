"""Base models: a path here or a hub name, folders in diffusers layout, the CLIP vocabulary.

Nothing is fetched unless a hub name is given or a single file's tokenizer is found nowhere here."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import quiet_libraries  # noqa: F401  (before diffusers)
import torch
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from base.tensor_files import file_hashes, first_line, refuse_not_finite
from es_lora.files import read_text
from es_lora.inputs.hub import hub_answers
from es_lora.inputs.json_text import parsed_json

CLIP_VOCABULARY = "openai/clip-vit-large-patch14"
SPECIAL_TOKENS = 3  # begin, end and padding, which a tokenizer without a vocabulary still has
PIPELINE_FILES = ["model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"]
diffusers_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()
for _library_logging in (diffusers_logging, transformers_logging):
    _library_logging.disable_progress_bar()


def local_path(path: str | Path) -> Path:
    """The Path of a file or folder, or of a hub name's local copy. Raises FileNotFoundError."""
    location = Path(path).expanduser()
    if location.exists():
        return location
    if str(path).count("/") == 1 and not str(path).startswith((".", "/", "~")):
        return _hub_folder(str(path))
    raise FileNotFoundError(f"{path} does not exist; give a diffusers folder, a .safetensors/.ckpt file or a hub name")


def load_from_folder(model_class: type, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """from_pretrained without the network; reads ``fp16`` files where a folder has no others."""
    weights = [file.name for file in folder.glob("*.safetensors")] + [file.name for file in folder.glob("*.bin")]
    if not weights:
        raise FileNotFoundError(f"{folder} holds no weights (*.safetensors or *.bin)")
    variant = "fp16" if all(".fp16." in name for name in weights) else None
    precision = "dtype" if issubclass(model_class, PreTrainedModel) else "torch_dtype"
    settings = {"local_files_only": True, "variant": variant, precision: dtype, "output_loading_info": True}
    with readable(folder):
        model, info = model_class.from_pretrained(folder, **settings)
    if info.get("missing_keys"):
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}; copy or download it again")
    refuse_not_finite(folder, model.state_dict())
    return model


@contextlib.contextmanager
def readable(source: str | Path) -> Iterator[None]:
    """Whatever a library stumbles on while it reads a file is a ValueError that names the file."""
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{source} cannot be loaded ({first_line(error)}); copy or download it again") from error


def load_clip_tokenizer(
    folder: str | Path | None = None, tokenizer_cache_dir: str | Path | None = None
) -> CLIPTokenizer:
    """The CLIP tokenizer from a folder, --tokenizer_cache_dir, transformers' cache or the hub.
    Raises FileNotFoundError: found nowhere; says which files to put where."""
    candidates = [Path(folder)] if folder else []
    if tokenizer_cache_dir:
        cache = Path(tokenizer_cache_dir)
        candidates += [cache, cache / CLIP_VOCABULARY.replace("/", "_"), cache / CLIP_VOCABULARY, cache / "tokenizer"]
    for candidate in candidates:
        if (candidate / "tokenizer.json").is_file() or (candidate / "vocab.json").is_file():
            with readable(candidate):
                return CLIPTokenizer.from_pretrained(candidate, local_files_only=True)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(CLIP_VOCABULARY, local_files_only=not hub_answers())
    except OSError:
        tokenizer = None
    if tokenizer is None or tokenizer.vocab_size <= SPECIAL_TOKENS:  # transformers 5 makes an empty one of no files
        where = tokenizer_cache_dir or "a folder of your choice, named with --tokenizer_cache_dir"
        raise FileNotFoundError(
            f"the CLIP vocabulary was not found: a single-file checkpoint does not contain it. Put vocab.json and "
            f"merges.txt of {CLIP_VOCABULARY} (SD 2.x uses the same ones) into {where}"
        )
    return tokenizer


def write_clip_vocabulary(tokenizer: CLIPTokenizer, folder: str | Path) -> None:
    """Write vocab.json and merges.txt beside tokenizer.json: some programs read only those."""
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    (Path(folder) / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False), encoding="utf-8")
    (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def hash_metadata(kind: str, name: str | Path, location: Path) -> dict[str, str]:
    """ss_sd_model_* or ss_vae_*: the name, and a file's two hashes by which WebUIs know it."""
    metadata = {f"ss_{kind}_name": Path(name).name if location.exists() else str(name)}
    if location.is_file():
        legacy, full = file_hashes(location)
        metadata |= {f"ss_{kind}_hash": legacy, f"ss_new_{kind}_hash": full}
    return metadata


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with readable(path):
        content = parsed_json(read_text(path))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content


def _hub_folder(name):
    import huggingface_hub

    offline = not hub_answers()
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=PIPELINE_FILES, local_files_only=offline))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = "which does not answer" if offline else first_line(error)
        raise FileNotFoundError(
            f"{name} is neither a file or folder here nor could it be read from the Hugging Face hub "
            f"({reason}); give a local path"
        ) from error


def weights_key(*networks) -> str:
    """Names a VAE or text encoders by their weights, so that a cache of others is noticed."""
    digest = hashlib.sha256()
    weights = [item for network in networks for item in network.state_dict().items()]
    for name, value in sorted(weights, key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else b"")
    return digest.hexdigest()[:16]
