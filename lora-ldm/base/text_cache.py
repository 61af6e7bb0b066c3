"""Text conditions encoded once a caption (--cache_text_encoder_outputs), so that the text encoders can leave the device.

On disk a file beside each image carries a key of everything it depends on, so that a changed caption is encoded anew.
"""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from base.files import weights_key
from base.sdxl import TextConditions
from es_lora.files import write_whole
from images.captions import process_caption

FORMAT = "es-lora-text/1"
VARYING = """
    shuffle_caption enable_wildcard caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate
    token_warmup_step
""".split()


@dataclass
class TextFiles:
    """The conditions of each image's caption as safetensors. key: names the text encoders and how they are used."""

    key: str

    def path(self, image: Path) -> Path:
        return image.with_name(f"{image.name}_te_outputs.safetensors")

    def read(self, image, caption):
        """The conditions of this caption, or None where they are missing, stale or damaged."""
        try:
            with safe_open(self.path(image), "pt") as file:
                if (file.metadata() or {}).get("key") != self._key_of(caption):
                    return None
                return TextConditions(*(file.get_tensor(name).clone() for name in TextConditions._fields))
        except (OSError, SafetensorError):
            return None

    def write(self, image, caption, conditions):
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


def cache_text(trainer):
    """Fill trainer.text_cache with every caption and prompt of the run; the text encoders leave the device afterwards
    (not with --highvram). Several processes share the files of --cache_text_encoder_outputs_to_disk: the first writes."""
    args, model = trainer.args, trainer.model
    captions = captions_of(trainer.batches) | captions_of(trainer.validation_batches)
    prompts = [text for prompt in trainer.prompts for text in (prompt.prompt, prompt.negative_prompt)]

    @torch.no_grad()
    def encode(caption):
        with trainer.accelerator.autocast():
            conditions = trainer.encode_text([caption])
        return TextConditions(*(part[0].cpu() for part in conditions))

    files = None
    if args.cache_text_encoder_outputs_to_disk:
        how = f"{args.max_token_length}/{args.weighted_captions}/{args.mixed_precision}"
        files = TextFiles(f"{FORMAT}/{weights_key(*model.text_encoders)}/{how}")
        if not trainer.is_main:
            trainer.accelerator.wait_for_everyone()
    found = {}
    for image, caption in tqdm(sorted(captions), desc="caching captions", disable=not trainer.is_main or len(captions) < 50):
        conditions = files.read(image, caption) if files else found.get(caption)
        if conditions is None:
            conditions = found.get(caption) or encode(caption)
            if files and trainer.is_main:
                files.write(image, caption, conditions)
        found[caption] = conditions
    if files and trainer.is_main:
        trainer.accelerator.wait_for_everyone()
    found.update({prompt: encode(prompt) for prompt in prompts if prompt not in found})
    trainer.text_cache = found
    if not args.highvram:
        for encoder in model.text_encoders:
            encoder.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def captions_of(batches):
    """{(image path, caption as it is trained on)}. Raises ValueError where captions vary from one time to the next."""
    captions = set()
    for image in (image for dataset in batches.datasets for image in dataset.images) if batches else ():
        record = image.record
        varying = [name for name in VARYING if getattr(record.subset, name)]
        if varying:
            reason = f"{', '.join(varying)} varies it: leave one of them out"
            raise ValueError(f"--cache_text_encoder_outputs encodes each caption once, {reason}")
        captions.add((record.path, process_caption(record.caption, record.subset, random.Random(0), epoch=0, step=0)))
    return captions
