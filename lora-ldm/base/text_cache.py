"""Text conditions encoded once a caption (--cache_text_encoder_outputs); encoders can be freed.

A file beside each image carries a key of all it depends on: a changed caption is encoded anew."""

import contextlib
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from base.files import weights_key
from base.sdxl import TextConditions
from es_lora.files import write_whole
from images.batches import ImageBatches
from images.captions import process_caption

FORMAT = "es-lora-text/1"
FEWEST_TO_SHOW = 50  # captions for which a progress bar is worth its line
VARYING = """
    shuffle_caption enable_wildcard caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate
    token_warmup_step
""".split()


@dataclass
class TextFiles:
    """The conditions of each image's caption as safetensors. key: text encoders and their use."""

    key: str

    @classmethod
    def of(cls, text_encoders: list[torch.nn.Module], how: str) -> "TextFiles":
        """Those of these text encoders; how: everything else that the conditions depend on."""
        return cls(f"{FORMAT}/{weights_key(*text_encoders)}/{how}")

    def path(self, image: Path) -> Path:
        return image.with_name(f"{image.name}_te_outputs.safetensors")

    def read(self, image: Path, caption: str) -> Optional[TextConditions]:
        """The conditions of this caption, or None where they are missing, stale or damaged."""
        try:
            with safe_open(self.path(image), "pt") as file:
                if (file.metadata() or {}).get("key") != self._key_of(caption):
                    return None
                return TextConditions(*(file.get_tensor(name).clone() for name in TextConditions._fields))
        except (OSError, SafetensorError):
            return None

    def write(self, image: Path, caption: str, conditions: TextConditions) -> None:
        """Raises ValueError with the way out where the folder cannot be written to."""
        tensors = {name: value.contiguous() for name, value in conditions._asdict().items()}
        path = self.path(image)
        try:
            write_whole(path, lambda aside: save_file(tensors, aside, {"key": self._key_of(caption)}))
        except OSError as error:
            message = f"text cache {path} cannot be written ({error.strerror}): use --cache_text_encoder_outputs"
            raise ValueError(f"{message} without _to_disk") from error

    def _key_of(self, caption):
        return hashlib.sha256(f"{self.key}/{caption}".encode()).hexdigest()


def conditions_of_all(
    captions: set[tuple[Path, str]],
    encode: Callable[[str], TextConditions],
    files: Optional[TextFiles],
    accelerator: Accelerator,
) -> dict[str, TextConditions]:
    """{caption: its conditions}. Processes share the files, if any: the first one writes.
    captions: (image path, caption), as captions_of gives them."""
    is_main, found = accelerator.is_main_process, {}
    hidden = not is_main or len(captions) < FEWEST_TO_SHOW
    with accelerator.main_process_first() if files else contextlib.nullcontext():
        for image, caption in tqdm(sorted(captions), desc="caching captions", disable=hidden):
            conditions = files.read(image, caption) if files else found.get(caption)
            if conditions is None:
                conditions = found.get(caption) or encode(caption)
                if files and is_main:
                    files.write(image, caption, conditions)
            found[caption] = conditions
    return found


def captions_of(batches: ImageBatches) -> set[tuple[Path, str]]:
    """{(image path, caption as it is trained on)}. Raises ValueError for captions that vary."""
    captions = set()
    for image in (image for dataset in batches.datasets for image in dataset.images):
        record = image.record
        varying = [name for name in VARYING if getattr(record.subset, name)]
        if varying:
            reason = f"{', '.join(varying)} varies it: leave one of them out"
            raise ValueError(f"--cache_text_encoder_outputs encodes each caption once, {reason}")
        captions.add((record.path, process_caption(record.caption, record.subset, random.Random(0), epoch=0, step=0)))
    return captions
