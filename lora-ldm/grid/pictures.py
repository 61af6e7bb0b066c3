"""Pictures of a base with a LoRA laid on for one picture at a time: several compare at one seed."""

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import PngImagePlugin
from PIL.Image import Image

from base.loading import load_base_model
from base.memory import best_device
from base.sampling import Prompt, Sampler
from base.sd import SDModel
from network.folding import fold_lora
from network.lora import find_modules, rename_modules
from network.lora_file import group_modules, load_lora


@contextlib.contextmanager
def lora_applied(model: SDModel, path: str | Path | None, strength: float = 1.0) -> Iterator[None]:
    """A LoRA file folded into a model's weights inside the block; undone after it, bit for bit.

    path: LoRA, LoCon, LoHa or LoKr; None or strength 0 leaves the model as it is.
    Raises ValueError: the file does not fit the model."""
    if path is None or strength == 0:
        yield
        return
    tensors = load_lora(path)[0]
    candidates = find_modules(model, everywhere=True)
    layers = {name: layer for _, _, name, layer in candidates}
    touched = [layers[name] for name in group_modules(rename_modules(tensors, candidates)) if name in layers]
    before = [layer.weight.detach().clone() for layer in touched]
    try:
        fold_lora(model, tensors, strength, path)
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(touched, before):
                layer.weight.copy_(weight)


class PictureMaker:
    """A base model (SD 1.x, 2.x or SDXL) that makes pictures for one caller at a time.
    Raises ValueError, FileNotFoundError: the base cannot be loaded."""

    def __init__(
        self, base: str | Path, *, v2: bool = False, v_parameterization: bool = False, clip_skip: int | None = None
    ):
        device = best_device()
        dtype = torch.float16 if device == "cuda" else torch.float32
        self.model = load_base_model(str(base), v2=v2, v_parameterization=v_parameterization, dtype=dtype)
        for part in (self.model.unet, self.model.vae, *self.model.text_encoders):
            part.to(device)
        self.model.vae.float()  # that of SDXL gives NaN in fp16
        self.lock = threading.Lock()
        self.sampler = Sampler(
            self.model, lambda texts: self.model.encode_text(texts, clip_skip=clip_skip), device=device
        )

    @property
    def native_px(self) -> int:
        """The side of the pictures that the base was made for."""
        return self.model.unet.config.sample_size * self.model.vae_scale

    def picture(self, prompt: Prompt, lora: str | Path | None = None, strength: float = 1.0) -> Image:
        """A PIL image of a sample_images.Prompt whose seed is set."""
        (picture,) = self.pictures([prompt], lora, strength)
        return picture

    def pictures(
        self, prompts: Sequence[Prompt], lora: str | Path | None = None, strength: float = 1.0
    ) -> Iterator[Image]:
        """The same of several prompts one by one, with the LoRA laid on once."""
        with self.lock, lora_applied(self.model, lora, strength):
            for prompt in prompts:
                yield self.sampler.picture(prompt)


def png_with_settings(picture: Image, settings: dict[str, Any]) -> bytes:
    """PNG bytes that carry {name: value} as text, so that a picture says how it was made."""
    facts = PngImagePlugin.PngInfo()
    for name, value in settings.items():
        facts.add_text(name, str(value))
    buffer = io.BytesIO()
    picture.save(buffer, format="png", pnginfo=facts)
    return buffer.getvalue()
