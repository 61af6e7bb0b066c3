"""LoRA, LoCon, LoHa, LoKr files folded into the frozen weights of a model or of a checkpoint."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import torch

from base.tensor_files import first_line
from network.lora_file import group_modules, load_lora, rename_text_encoder, rename_unet

if TYPE_CHECKING:
    from base.sd import SDModel

MOST_STRENGTH = 1000
UNET_PREFIX = "model.diffusion_model."
# {prefix in a single file: component} of text encoders in CLIP's and in OpenCLIP's layout.
CLIP_PREFIXES = {"cond_stage_model.transformer.": "te", "conditioner.embedders.0.transformer.": "te1"}
OPEN_CLIP_PREFIXES = {
    "cond_stage_model.model.transformer.resblocks.": "te",
    "conditioner.embedders.1.model.transformer.resblocks.": "te2",
}


@torch.no_grad()
def fold_lora(
    model: SDModel, tensors: dict[str, torch.Tensor], weight: float = 1.0, name: str | Path = "the LoRA"
) -> None:
    """Add ``weight`` times a LoRA to a model's weights, in place. Before LoRA layers go in.

    model: SDModel. tensors: {kohya key: tensor}, as load_lora gives them. name: for messages.
    Raises ValueError, before any change: the modules that the model lacks or that do not fit."""
    from network.lora import find_modules, rename_modules

    candidates = find_modules(model, everywhere=True)
    weights = {name: layer.weight.data for _, _, name, layer in candidates}
    _fold(rename_modules(tensors, candidates), weight, weights, name)


@torch.no_grad()
def fold_into_tensors(
    checkpoint: dict[str, torch.Tensor],
    tensors: dict[str, torch.Tensor],
    weight: float = 1.0,
    layers_per_block: int = 2,
    name: str | Path = "the LoRA",
) -> None:
    """The same for the tensors of a single file in the original layout, in place."""
    weights = original_weights(checkpoint, layers_per_block)
    _fold(rename_unet(tensors, weights, layers_per_block), weight, weights, name)


def original_weights(checkpoint: dict[str, torch.Tensor], layers_per_block: int = 2) -> dict[str, torch.Tensor]:
    """{kohya module name: weight} of a single file's U-Net and text encoders; views, not copies."""
    from base.single_file import SDXL_KEY, unet_original_names

    if SDXL_KEY in checkpoint:  # kohya's names for SDXL are those of the original layout
        unet = {name.removeprefix(UNET_PREFIX): name for name in checkpoint if name.startswith(UNET_PREFIX)}
    else:
        unet = unet_original_names(checkpoint, layers_per_block)
    weights = {}
    for name, original in unet.items():
        if name.endswith(".weight"):
            weights["lora_unet_" + name.removesuffix(".weight").replace(".", "_")] = checkpoint[original]
    for name, value in checkpoint.items():
        for prefix, component in CLIP_PREFIXES.items():
            if name.startswith(prefix) and name.endswith(".weight"):
                path = name.removeprefix(prefix).removesuffix(".weight")
                path = path if path.startswith("text_model.") else f"text_model.{path}"
                weights[f"lora_{component}_" + path.replace(".", "_")] = value
        for prefix, component in OPEN_CLIP_PREFIXES.items():
            if name.startswith(prefix):
                weights |= _open_clip_weights(component, name.removeprefix(prefix), value)
    return weights


def update_of(parts: dict[str, torch.Tensor]) -> Optional[torch.Tensor]:
    """The dense update alpha / r * B A of a module in float32, or None for an unknown kind.
    parts: {"lora_down.weight": ..., "alpha": ...} or LyCORIS' ``hada_*`` / ``lokr_*``."""
    parts = {name: value.float() for name, value in parts.items()}
    alpha = parts.pop("alpha", None)

    def scale(rank):
        return 1.0 if alpha is None else alpha.item() / rank

    if parts.keys() == {"lora_down.weight", "lora_up.weight"}:
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        return scale(down.shape[0]) * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    if parts.keys() == {"lora_down.weight", "lora_up.weight", "lora_mid.weight"}:  # a convolution in Tucker form
        down, up, middle = (parts[f"lora_{name}.weight"] for name in ("down", "up", "mid"))
        return scale(down.shape[0]) * torch.einsum("or,rskl,si->oikl", up.flatten(1), middle, down.flatten(1))
    if parts.keys() == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
        first, second = parts["hada_w1_a"] @ parts["hada_w1_b"], parts["hada_w2_a"] @ parts["hada_w2_b"]
        return scale(parts["hada_w1_b"].shape[0]) * first * second
    if parts and all(name.startswith("lokr_") for name in parts):
        ranks = [parts[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in parts]
        first, second = (_lokr_factor(parts, name) for name in ("lokr_w1", "lokr_w2"))
        first = first.reshape(*first.shape, *[1] * (second.dim() - 2))
        return (scale(ranks[-1]) if ranks else 1.0) * torch.kron(first, second.contiguous())
    return None


def _fold(tensors, weight, weights, lora):
    if not abs(weight) <= MOST_STRENGTH:
        raise ValueError(f"{lora} cannot be laid on with strength {weight}: give a number up to {MOST_STRENGTH}")
    modules = group_modules(rename_text_encoder(tensors, weights))
    updates, problems = {}, []
    for name, parts in modules.items():
        target = weights.get(name)
        if target is None:
            problems.append(f"{name} is not in the model")
            continue
        problem = _misfit(name, parts, target)
        if problem is None:
            updates[name] = update_of(parts)
        else:
            problems.append(problem)
    if problems:
        more = f" (and {len(problems) - 3} more of {len(modules)} layers)" if len(problems) > 3 else ""
        raise ValueError(f"{lora} does not fit the model: {'; '.join(problems[:3])}{more}")
    for name, update in updates.items():
        target = weights[name]
        target.copy_(target.float() + weight * update.to(target.device).reshape(target.shape))


def _misfit(name, parts, target):
    """Why a module's update is none of this layer, in words; None where it is. Takes no memory."""
    try:
        update = update_of({part: value.to("meta") for part, value in parts.items() if part != "alpha"})
    except (RuntimeError, IndexError, ValueError) as error:
        return f"the parts of {name} do not fit each other ({first_line(error)})"
    if update is None:
        return f"{name} has {', '.join(sorted(parts))}, which is no LoRA, locon, loha or lokr"
    if update.numel() != target.numel() or update.shape[0] != target.shape[0]:
        return f"{name} is {tuple(update.shape)}, the model's layer {tuple(target.shape)}"
    return None


def _lokr_factor(parts, name):
    if name in parts:
        return parts[name]
    if f"{name}_a" not in parts or f"{name}_b" not in parts:
        raise ValueError(f"the LoRA has a lokr module without {name} (and without {name}_a and {name}_b)")
    left, right = parts[f"{name}_a"], parts[f"{name}_b"]
    if "lokr_t2" in parts and name == "lokr_w2":
        return torch.einsum("rskl,ra,sb->abkl", parts["lokr_t2"], left, right)
    return (left @ right.flatten(1)).reshape(left.shape[0], *right.shape[1:])


def _open_clip_weights(component, name, value):
    """The kohya names of a tensor of an OpenCLIP block; query, key and value share one."""
    number, _, part = name.partition(".")
    stem = f"lora_{component}_text_model_encoder_layers_{number}_"
    single = {
        "attn.out_proj.weight": "self_attn_out_proj",
        "mlp.c_fc.weight": "mlp_fc1",
        "mlp.c_proj.weight": "mlp_fc2",
    }
    if part == "attn.in_proj_weight":
        return {f"{stem}self_attn_{which}_proj": block for which, block in zip("qkv", value.chunk(3))}
    return {stem + single[part]: value} if part in single else {}


def fold_base_weights(args: Namespace, model: SDModel) -> None:
    """Fold the LoRA files of --base_weights into the model, each by its multiplier."""
    paths = args.base_weights or []
    for path, multiplier in zip(paths, args.base_weights_multiplier or [1.0] * len(paths)):
        fold_lora(model, load_lora(path)[0], multiplier, path)
