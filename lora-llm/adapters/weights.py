"""A LoRA put over a base, and what of it is trained."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

from base.layers import check_rank, lora_target_names


def attach_lora(
    base: torch.nn.Module, *, rank: int, alpha: float, dropout: float = 0.0, modules: str = "all", bias: str = "none"
) -> PeftModel:
    """The base with a fresh LoRA in the layers that `modules` chooses (lora_target_names).

    Only it is trained, and the biases that `bias` chooses: none, all or lora_only.
    """
    targets = lora_target_names(base, modules)
    check_rank(base, targets, rank, "--lora_r")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=dropout,
        bias=bias,
        task_type="CAUSAL_LM",
        fan_in_fan_out=all(isinstance(base.get_submodule(name), Conv1D) for name in targets),
    )
    return get_peft_model(base, config)


def trainable_parameters(model: torch.nn.Module) -> dict[str, Any]:
    """{"trainable", "total", "percent"}; a quantised weight counts its unpacked values."""
    trainable, total = 0, 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return {"trainable": trainable, "total": total, "percent": round(100 * trainable / max(1, total), 3)}
