"""What a base is loaded by: everything that `load_base` asks of a command line, and nothing
else."""

from dataclasses import dataclass
from typing import Any, Optional

import torch


@dataclass(frozen=True)
class BaseSpec:
    """A base model: which one, in how many bits, where, and what is to be done with it.

    name: a folder in Hugging Face format, or a hub name. bits: 4, 8, 16 or 32. compute: what it
    computes in; 16 bits in float32 are taken as bf16, or fp16 on a GPU that has none.
    device: None is the CPU. spread_MB: spread over several GPUs where there are, so many MB on
    each.
    checkpointing: the options of gradient checkpointing, None without it.
    for_lora: gradients go through it to a LoRA; False where it is trained itself, or not at all.
    attention: an implementation by transformers' name, None for the usual one.
    """

    name: str
    bits: int = 4
    compute: torch.dtype = torch.float32
    quant_type: str = "nf4"
    double_quant: bool = True
    device: Optional[torch.device] = None
    spread_MB: Optional[int] = None
    checkpointing: Optional[dict[str, Any]] = None
    for_lora: bool = True
    attention: Optional[str] = None
    cache_dir: Optional[str] = None
    trust_remote_code: bool = False
    token: bool = False

    @property
    def on_cpu(self) -> bool:
        return self.device is None or self.device.type == "cpu"

    @property
    def hub_options(self) -> dict[str, Any]:
        """What every download from the hub is told."""
        return {"cache_dir": self.cache_dir, "trust_remote_code": self.trust_remote_code, "token": self.token or None}

    @property
    def stored_dtype(self) -> torch.dtype:
        """What weights that are not quantised are kept in."""
        if self.bits == 32:
            return torch.float32
        if self.bits == 16 and self.compute == torch.float32:
            return torch.bfloat16 if self.on_cpu or torch.cuda.is_bf16_supported() else torch.float16
        return self.compute

    @property
    def small_parts_in_float32(self) -> bool:
        """Whether norms, biases and logits of a bf16 base on a CPU are kept in float32."""
        return self.bits == 16 and self.compute == torch.bfloat16 and self.on_cpu and self.for_lora
