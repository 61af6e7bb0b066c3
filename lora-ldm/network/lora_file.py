"""LoRA files in kohya's format: read them (and diffusers' key names), write them, hash them.

One module is three tensors: ``NAME.lora_down.weight`` (r, in, ...), ``NAME.lora_up.weight`` (out,
r, ...) and the scalar ``NAME.alpha``; the update is ``alpha / r * up @ down``. NAME is
``lora_unet_`` or ``lora_te_`` (``lora_te1_`` and ``lora_te2_`` where there are two text encoders)
and the module's path with underscores."""

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open

from base.files import read_json
from base.tensor_files import LEGACY_HASH_LENGTH_BYTES, LEGACY_HASH_OFFSET_BYTES, named, read_tensors
from es_lora.files import write_whole
from es_lora.inputs.json_text import parsed_json
from es_lora.judge.base_index import unet_layer_name
from es_lora.weights import save_tensors

logger = logging.getLogger(__name__)
DTYPES = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# diffusers' and PEFT's keys; OneTrainer's with dots, where clip_l and clip_g are text encoders.
_DIFFUSERS_KEY = re.compile(
    r"^(?P<part>unet|text_encoder|text_encoder_2|clip_l|clip_g)\.(?P<module>.+?)"
    r"(?:\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"
    r"|(?:\.lora\.|_lora\.|\.lora_linear_layer\.|\.lora_)(?P<plain>down|up)\.weight"
    r"|\.(?P<kept>alpha|dora_scale|hada_\w+|lokr_\w+)|\.(?P<magnitude>lora_magnitude_vector)(?:\.\w+)*)$"
)
_TEXT_NAME = re.compile(r"lora_te([12]?)_(?:text_model_)?(.+)")
# How the modules of a part begin where PEFT's file does not name the part.
_UNET_MODULE = re.compile(r"(?:down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\.")
_TEXT_MODULE = re.compile(r"(?:text_model|encoder|embeddings|text_projection)\.")
PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "lora_adapter_metadata"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
BUNDLED = "bundle_emb."
UNET_NAME = "lora_unet_"
_PREFIXES = {"unet": UNET_NAME, "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
_PREFIXES |= {"clip_l": "lora_te_", "clip_g": "lora_te2_"}
# What diffusers' older attention processors call the four projections, for the text encoder.
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def save_lora(
    path: str | Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a LoRA, whole or not at all.

    path: ``.safetensors``, or ``.pt`` / ``.ckpt`` (tensors only; those formats carry no metadata).
    tensors: {kohya key: tensor}, any device; dtype: of the saved tensors, None keeps theirs.
    metadata: {name: text}; ``sshs_model_hash`` and ``sshs_legacy_hash`` are added."""
    path = Path(path)
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in tensors.items()}
    if path.suffix == ".safetensors":
        metadata = {name: str(value) for name, value in (metadata or {}).items()}
        metadata["sshs_model_hash"], metadata["sshs_legacy_hash"] = lora_hashes(tensors, metadata)
        write_whole(path, lambda aside: save_tensors(tensors, aside, metadata))
    elif path.suffix in (".pt", ".ckpt"):
        write_whole(path, lambda aside: aside.write_bytes(_pickled(tensors)))
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}; a LoRA is saved as .safetensors, .pt or .ckpt")


def _pickled(tensors):
    """torch.save's bytes; to a path it would write the file's name into them."""
    content = io.BytesIO()
    torch.save(tensors, content)
    return content.getvalue()


def load_lora(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a LoRA as ({kohya key: tensor}, metadata); diffusers' and PEFT's keys are renamed.
    Raises FileNotFoundError: no such file; ValueError: damaged, empty, no LoRA, or half of one."""
    path = Path(path)
    files = _files_in(path) if path.is_dir() else [path]
    tensors, metadata = {}, {}
    for file in files:
        part, told = _read_file(file)
        tensors, metadata = {**tensors, **part}, {**metadata, **told}
    if not any(name.startswith("lora_") for name in tensors):
        first = next(iter(tensors), "no tensors")
        raise ValueError(f"{path} is not a LoRA of kohya's or diffusers' naming (its first key: {first})")
    _refuse_half(path, tensors)
    return tensors, metadata


def _files_in(folder):
    """The LoRA of a folder: PEFT's or diffusers' file, or PEFT's in a folder for each part."""
    parts = [folder / part / PEFT_FILE for part in ("unet", "text_encoder", "text_encoder_2")]
    known = [folder / PEFT_FILE, folder / DIFFUSERS_FILE, *parts]
    found = [file for file in known if file.is_file()]
    return found if found and found[0] in parts else found[:1] or known[:1]


def _read_file(path):
    """One file as ({kohya key: tensor}, metadata)."""
    tensors = {_with_part(name, path): value for name, value in _without_embeddings(path, read_tensors(path)).items()}
    metadata = {}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    if any(_DIFFUSERS_KEY.match(name) for name in tensors):
        tensors = from_diffusers_names(tensors, {**_peft_settings(path), **metadata})
    return tensors, metadata


def _refuse_half(path, tensors):
    """Raise ValueError, by the first names, where modules lack a part of what makes an update."""
    modules = group_modules(tensors)
    missing = [f"{name}.{part}" for name, parts in modules.items() for part in _missing_parts(set(parts))]
    if missing:
        lack = f"{path} is not whole: of {len(modules)} layers, {len(missing)} tensors are missing: {named(missing)}"
        raise ValueError(f"{lack}; copy or download it again")
    alphas = [name for name, value in tensors.items() if name.endswith(".alpha") and value.numel() != 1]
    if alphas:
        raise ValueError(f"{path}: {len(alphas)} alphas are not one number: {named(alphas)}; download it again")


def _missing_parts(parts):
    """The parts that a module lacks; none for kinds that are not known here."""
    if any(part.startswith("hada_") for part in parts):
        return sorted({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} - parts)
    if any(part.startswith("lokr_") for part in parts):
        halves = [name for name in ("lokr_w1", "lokr_w2") if name not in parts]
        return [f"{name}_{side}" for name in halves for side in "ab" if f"{name}_{side}" not in parts]
    if any(part.startswith("lora_") for part in parts) or parts <= {"alpha", "dora_scale"}:
        return sorted({"lora_down.weight", "lora_up.weight"} - parts)
    return []


def _without_embeddings(path, tensors):
    """The tensors without the embeddings that OneTrainer bundles, which are said."""
    names = [name for name in tensors if name.startswith(BUNDLED)]
    if not names:
        return tensors
    embeddings = ", ".join(dict.fromkeys(name.removeprefix(BUNDLED).partition(".")[0] for name in names))
    logger.warning("%s: the embeddings bundled in it (%s) are left out, only its LoRA is used", path, embeddings)
    return {name: value for name, value in tensors.items() if name not in names}


def _with_part(name, path):
    """A key of PEFT's with the part of the model in front, as diffusers writes it."""
    name = name.replace("base_model.model.", "", 1)
    if path.name == PEFT_FILE and path.parent.name in _PREFIXES and not name.startswith(f"{path.parent.name}."):
        return f"{path.parent.name}.{name}"
    for part, module in (("unet", _UNET_MODULE), ("text_encoder", _TEXT_MODULE)):
        if module.match(name) and _DIFFUSERS_KEY.match(f"{part}.{name}"):
            return f"{part}.{name}"
    return name


def _peft_settings(path):
    """What adapter_config.json beside PEFT's file says, under the name that diffusers gives it."""
    config = path.with_name("adapter_config.json")
    if not path.name.startswith("adapter_model") or not config.is_file():
        return {}
    settings = read_json(config)
    return {PEFT_SETTINGS: json.dumps({f"{part}.{key}": settings[key] for part in _PREFIXES for key in settings})}


def from_diffusers_names(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """{diffusers or PEFT key: tensor} -> {kohya key: tensor}.

    Without alphas alpha = rank, unless ``lora_adapter_metadata`` gives ``lora_alpha``.
    Raises ValueError for keys of no known form."""
    converted, unknown, modules = {}, [], {}
    for name, value in tensors.items():
        match = _DIFFUSERS_KEY.match(name)
        if match is None:
            unknown.append(name)
            continue
        kohya_name = _PREFIXES[match["part"]] + _module_path(match["part"], match["module"]).replace(".", "_")
        if match["kept"]:
            converted[f"{kohya_name}.{match['kept']}"] = value
            continue
        if match["magnitude"]:  # PEFT's DoRA: one number an output
            converted[f"{kohya_name}.dora_scale"] = value.flatten()
            continue
        is_down = match["peft"] == "A" or match["plain"] == "down"
        converted[f"{kohya_name}.lora_{'down' if is_down else 'up'}.weight"] = value
        modules[kohya_name] = (match["part"], match["module"])
    if unknown:
        raise ValueError(
            f"{len(unknown)} keys are neither kohya's nor diffusers' LoRA names, the first is {unknown[0]}"
        )
    adapter = parsed_json((metadata or {}).get(PEFT_SETTINGS, "{}"))
    for kohya_name, (part, module) in modules.items():
        down, scale = converted.get(f"{kohya_name}.lora_down.weight"), converted.get(f"{kohya_name}.dora_scale")
        if scale is not None and scale.dim() == 1 and down is not None:
            converted[f"{kohya_name}.dora_scale"] = scale.reshape(-1, *[1] * (down.dim() - 1))  # LyCORIS' shape
        alpha = (adapter.get(f"{part}.alpha_pattern") or {}).get(module, adapter.get(f"{part}.lora_alpha"))
        if alpha is not None:
            if adapter.get(f"{part}.use_rslora"):  # whose scale is alpha over the root of the rank
                alpha *= len(converted[f"{kohya_name}.lora_down.weight"]) ** 0.5
            converted.setdefault(f"{kohya_name}.alpha", torch.tensor(float(alpha)))
    return converted


def group_modules(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """{kohya key: tensor} -> {module name: {"lora_down.weight", "lora_up.weight", "alpha"}}."""
    modules = {}
    for key, value in tensors.items():
        name, _, part = key.partition(".")
        modules.setdefault(name, {})[part] = value
    return modules


def rename_text_encoder(tensors: dict[str, torch.Tensor], known_names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Give text encoder modules the names that the network has for them.

    Programs disagree on the first text encoder's prefix and on the level ``text_model``."""
    known, renamed = set(known_names), {}
    for key, value in tensors.items():
        name, dot, part = key.partition(".")
        renamed[_known_spelling(name, known) + dot + part] = value
    return renamed


def rename_unet(
    tensors: dict[str, torch.Tensor], known_names: Iterable[str], layers_per_block: int = 2
) -> dict[str, torch.Tensor]:
    """Give U-Net modules the names that the network has for them.

    Programs name them after diffusers' layout or after the original one, for either family."""
    known = {name for name in known_names if name.startswith(UNET_NAME)}

    def canonical(name):
        return unet_layer_name(name.removeprefix(UNET_NAME), layers_per_block)

    own, renamed = {canonical(name): name for name in known}, {}
    for key, value in tensors.items():
        name, dot, part = key.partition(".")
        if name.startswith(UNET_NAME) and name not in known:
            name = own.get(canonical(name), name)
        renamed[name + dot + part] = value
    return renamed


def _known_spelling(name, known):
    match = _TEXT_NAME.match(name)
    if name in known or match is None:
        return name
    numbers = ["2"] if match[1] == "2" else ["", "1"]
    spellings = [f"lora_te{number}_{level}{match[2]}" for number in numbers for level in ("text_model_", "")]
    return next((spelling for spelling in spellings if spelling in known), name)


def lora_hashes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """(sshs_model_hash, sshs_legacy_hash): how WebUIs recognise a LoRA.

    The first: SHA-256 of the safetensors file after its header, so that edits of metadata keep it.
    The second: 8 digits of the SHA-256 of 64 KiB from 1 MiB on, with only ``ss_`` metadata."""
    training_facts = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    content = safetensors.torch.save(tensors, training_facts)
    header_bytes = int.from_bytes(content[:8], "little")
    legacy = content[LEGACY_HASH_OFFSET_BYTES : LEGACY_HASH_OFFSET_BYTES + LEGACY_HASH_LENGTH_BYTES]
    model_hash = hashlib.sha256(memoryview(content)[8 + header_bytes :]).hexdigest()
    return model_hash, hashlib.sha256(legacy).hexdigest()[:8]


def _module_path(part, module):
    module = module.replace(".processor.", ".")
    if part == "unet":
        # Old attention processors say to_out where the module is to_out.0.
        return re.sub(r"\.to_out$", ".to_out.0", module)
    head, _, last = module.rpartition(".")
    module = f"{head}.{_TEXT_PROJECTIONS.get(last, last)}"
    return module if module.startswith("text_model.") else f"text_model.{module}"
