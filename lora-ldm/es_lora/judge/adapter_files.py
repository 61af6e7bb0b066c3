"""The LoRA files that trainers write: PEFT, diffusers and kohya names, as down, up and scale."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from es_lora.files import read_text
from es_lora.history import is_number
from es_lora.inputs.json_text import parsed_json
from es_lora.judge.base_index import Key
from es_lora.weights import refuse_nonfinite

QLORA_FOLDER, PICKLE_NAME = "adapter_model", "adapter_model.bin"
PEFT_NAME, DIFFUSERS_NAME = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"


class LoraModule(NamedTuple):
    """down A (r, in, ...), up B (out, r, ...), and the factor (alpha / r) of their product."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


@dataclass
class Adapter:
    modules: Dict[Key, LoraModule]
    transposed: bool = False  # fan_in_fan_out: the base's weights are stored (in, out)
    left_out: List[str] = field(default_factory=list)  # tensors that are no part of a plain LoRA
    targets: List[str] = field(default_factory=list)  # ends of the names of all layers that it is of, if known

    def unjudged(self) -> str:
        """What CS does not see of this adapter, in words; empty where it sees all."""
        magnitudes = [name for name in self.left_out if "magnitude_vector" in name or name.endswith("dora_scale")]
        others = [name for name in self.left_out if name not in magnitudes]
        told = [f"the DoRA magnitudes of {len(magnitudes)} layers"] if magnitudes else []
        more = ", ..." if len(others) > 2 else ""
        told += [f"{len(others)} other tensors ({', '.join(others[:2])}{more})"] if others else []
        return f"Left out of the judgement: {' and '.join(told)}; CS is that of B A alone." if told else ""


_PEFT_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight$")
_DIFFUSERS_KEY = re.compile(
    r"^(?:(?P<part>unet|text_encoder_2|text_encoder|transformer|clip_l|clip_g)\.)?(?P<path>.+?)"
    r"(?:\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"
    r"|(?:\.lora\.|_lora\.|\.lora_linear_layer\.|\.lora_)(?P<plain>down|up)\.weight|\.alpha)$"
)
# How the layers of a diffusion model begin in PEFT's own files, which name no part.
_UNET_LAYER = re.compile(r"(?:down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)(?:\.|$)")
_PARTS_OF_FOLDERS = {"unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}
_KOHYA_KEY = re.compile(r"^lora_(?P<part>unet|te1|te2|te)_(?P<path>[^.]+)\.(?P<rest>.+)$")
_PARTS = {None: "unet", "unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2", "transformer": "transformer"}
_PARTS.update(clip_l="te1", clip_g="te2")  # OneTrainer's names with dots
_KOHYA_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}


def file_metadata(file: Path) -> Dict[str, str]:
    try:
        with safe_open(str(file), framework="pt") as handle:
            return handle.metadata() or {}
    except (SafetensorError, OSError):
        return {}  # named when its tensors are read


def _split_key(name: str, is_peft: bool, part: Optional[str] = None) -> Optional[Tuple[Key, str]]:
    """((component, path), "down" | "up" | "alpha"); None for others (DoRA magnitudes, heads).
    part: the component of a PEFT file, where its folder says it."""
    if is_peft:
        match = _PEFT_KEY.match(name)
        if match is None:
            return None
        component = part or ("unet" if _UNET_LAYER.match(match["path"]) else "lm")
        return (component, match["path"]), "down" if match["side"] == "A" else "up"
    match = _KOHYA_KEY.match(name)
    if match:
        if match["rest"] in _KOHYA_PARTS:
            return ("te1" if match["part"] == "te" else match["part"], match["path"]), _KOHYA_PARTS[match["rest"]]
        if match["rest"] == "dora_scale":
            return None
        raise ValueError(f"{name} is no part of a plain LoRA (LoHa, LoKr and Tucker convolutions cannot be judged)")
    match = _DIFFUSERS_KEY.match(name)
    if match is None:
        return None
    side = {"A": "down", "B": "up", None: match["plain"] or "alpha"}[match["peft"]]
    return (_PARTS[match["part"]], match["path"]), side


def _configuration(text: str, where: str) -> Dict[str, Any]:
    """A PEFT configuration. Raises ValueError where what a scale is made of is of another kind."""
    config = parsed_json(text)
    if not isinstance(config, dict):
        raise ValueError(f"{where} is no JSON object")
    for path, value in config.items():
        name = path.rsplit(".", 1)[-1]
        patterns = value if name == "alpha_pattern" and isinstance(value, dict) else {}
        if name == "lora_alpha" and value is not None and not is_number(value):
            raise ValueError(f"{where}: {path} is {value!r:.40}, where a number is needed")
        if name == "alpha_pattern" and not (isinstance(value or {}, dict) and all(map(is_number, patterns.values()))):
            raise ValueError(f"{where}: {path} is {value!r:.40}, where numbers by the names of layers are needed")
        for pattern in patterns:
            _compiled(pattern, where)
    return config


def _compiled(pattern: str, where: str) -> None:
    try:
        re.compile(f"({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: the alpha_pattern {pattern!r:.40} cannot be read ({error})") from None


def _peft_scale(config: Dict[str, Any], path: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    given = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)]
    alpha = given[0] if given else config.get("lora_alpha") or rank
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_adapter(file: Path) -> Adapter:
    """The LoRA of a file, in PEFT's, kohya's or diffusers' names. Raises ValueError if unusable."""
    try:
        tensors = load_file(str(file))
        config_file = file.with_name("adapter_config.json")
        is_peft = file.name == PEFT_NAME
        config = _configuration(read_text(config_file), config_file.name) if is_peft else {}
        diffusers_config = _configuration(file_metadata(file).get("lora_adapter_metadata", "{}"), "its metadata")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"it cannot be read: {error}") from error
    refuse_nonfinite(tensors.items(), file.name)
    parts: Dict[Key, Dict[str, torch.Tensor]] = {}
    left_out: List[str] = []
    for name, tensor in tensors.items():
        split = _split_key(name, is_peft, _PARTS_OF_FOLDERS.get(file.parent.name))
        if split is None:
            left_out.append(name)
        else:
            parts.setdefault(split[0], {})[split[1]] = tensor
    if not parts:
        raise ValueError("it holds no LoRA of PEFT's, kohya's or diffusers' naming")
    modules = {}
    for key, sides in parts.items():
        if "down" not in sides or "up" not in sides:
            raise ValueError(f"layer {key[1]} has no {'lora_up' if 'down' in sides else 'lora_down'} matrix")
        down, up = sides["down"], sides["up"]
        rank = down.shape[0] if down.ndim > 1 and up.ndim > 1 else 0
        if rank == 0 or up.flatten(1).shape[1] != rank:
            raise ValueError(f"layer {key[1]}: lora_down {tuple(down.shape)} and lora_up {tuple(up.shape)} do not fit")
        # diffusers keeps a PEFT configuration for each part, its names led by the part's.
        part_names = [name for name, component in _PARTS.items() if name and component == key[0]]
        parted = ((name.partition("."), value) for name, value in diffusers_config.items())
        own = {path: value for (part, _, path), value in parted if part in part_names}
        if "alpha" in sides and sides["alpha"].numel() != 1:
            raise ValueError(f"layer {key[1]}: its alpha is {tuple(sides['alpha'].shape)}, and no single number")
        scale = float(sides["alpha"]) / rank if "alpha" in sides else _peft_scale(config or own, key[1], rank)
        modules[key] = LoraModule(down, up, scale)
    return Adapter(modules, bool(config.get("fan_in_fan_out")), left_out, _targets(config))


def _targets(config: Dict[str, Any]) -> List[str]:
    """The layers that a PEFT configuration names, where it means all of these names."""
    targets = config.get("target_modules")
    chosen = any(config.get(name) for name in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    return [name for name in targets if isinstance(name, str)] if isinstance(targets, list) and not chosen else []
