"""The whole U-Net as what is trained (--train_full_unet): DreamBooth, before extract_lora.py.

It has the methods of LoraNetwork that a run needs: one training loop. No update is measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import quiet_libraries  # noqa: F401  (before diffusers)
import torch
from diffusers import UNet2DConditionModel

from base.sd import SDModel
from es_lora.files import write_folder_whole


class FullUnet:
    """All weights of a U-Net, trained in float32 unless ``to`` says otherwise."""

    components = ["unet"]

    def __init__(self, unet: UNet2DConditionModel):
        self.unet = unet.float().requires_grad_(True)

    def train(self, mode: bool = True) -> "FullUnet":
        """Nothing varies in training: diffusers' U-Nets of Stable Diffusion have no dropout."""
        return self

    def eval(self) -> "FullUnet":
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "FullUnet":
        self.unet.to(device, dtype)
        return self

    def parameter_groups(
        self, learning_rate: float, unet_lr: float | None = None, text_encoder_lr: float | list[float] | None = None
    ) -> list[dict[str, Any]]:
        rate = learning_rate if unet_lr is None else unet_lr
        return [{"params": list(self.unet.parameters()), "lr": rate, "name": "unet"}]

    def tensors(self) -> dict[str, torch.Tensor]:
        """{diffusers name: live weight}."""
        return dict(self.unet.named_parameters())

    def state_for_file(
        self, dtype: torch.dtype | None = None, tensors: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """{diffusers name: copy on the CPU} of the live weights, or of these ones."""
        return {name: value.detach().to("cpu", dtype, copy=True) for name, value in (tensors or self.tensors()).items()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set the weights from {diffusers name: tensor}. Raises ValueError for another U-Net."""
        live = self.tensors()
        if live.keys() != tensors.keys() or any(live[name].shape != value.shape for name, value in tensors.items()):
            raise ValueError("the saved U-Net is not the one of this base model: use the base that the run began with")
        for name, value in tensors.items():
            live[name].copy_(value)


def save_full_model(
    folder: str | Path, model: SDModel, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write the base with these U-Net weights as a diffusers folder, whole or not at all.

    tensors: {diffusers name: CPU tensor}. dtype: of the file, or None. Replaces a folder."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(model.unet.config)
    unet.load_state_dict({name: value.to(dtype) for name, value in tensors.items()}, assign=True)
    write_folder_whole(folder, replace(model, unet=unet).save_pipeline)
