"""The kinds of base to train on, with one interface: load, check, encode text and images, predict.

A further kind is another class here; the trainer made for it passes it to `es_lora_ldm.main`."""

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator

from base.sd import SDModel, load_sd_model
from base.sdxl import TextConditions, load_sdxl_model
from base.text_cache import TextFiles, captions_of, conditions_of_all
from base.text_encoding import what_is_cut
from es_lora.command_line import is_out_of_memory
from images.batches import ImageBatches


class StableDiffusion:
    """SD 1.x or 2.x as a base to train on: the model, and how the settings of a run use it.

    args: the run's settings. weight_dtype: the U-Net's; trained weights are in float32.
    Raises ValueError / FileNotFoundError where the base cannot be loaded."""

    program = "es_lora_ldm"
    is_sdxl = False

    def __init__(self, args: Namespace, weight_dtype: torch.dtype):
        self.args, self.weight_dtype = args, weight_dtype
        self.model = self._load(torch.float32 if args.train_full_unet else weight_dtype)

    def _load(self, dtype: torch.dtype) -> SDModel:
        return load_sd_model(self.args.pretrained_model_name_or_path, v2=self.args.v2, **self._settings(dtype))

    def _settings(self, dtype: torch.dtype) -> dict[str, Any]:
        args = self.args
        return {
            "v_parameterization": args.v_parameterization,
            "vae": args.vae,
            "dtype": dtype,
            "tokenizer_cache_dir": args.tokenizer_cache_dir,
        }

    def check(self, batches: ImageBatches) -> None:
        """Refuse settings and pictures that do not fit this kind of base. Raises ValueError."""
        if self.args.zero_terminal_snr and self.model.prediction_type != "v_prediction":
            raise ValueError(
                "--zero_terminal_snr needs a base that predicts v: at the last timestep epsilon is the input"
            )

    def notices(self, batches: Iterable[ImageBatches], prompts: Iterable[str]) -> list[str]:
        """What is cut of captions and of the previews' prompts: lines before the first step."""
        texts = {"captions": [text for part in batches for text in part.whole_captions()], "prompts": list(prompts)}
        length, weighted = self.args.max_token_length, self.args.weighted_captions
        return [line for what in texts for line in what_is_cut(self.model, texts[what], length, what, weighted)]

    def cache_text(self, batches: Iterable[ImageBatches], prompts: Iterable[str], accelerator: Accelerator) -> None:
        """Encode once what is not trained, where asked for: here nothing, with SDXL captions."""

    def encode_text(self, captions: list[str]) -> Any:
        """What `predict_noise` takes of B captions."""
        args = self.args
        how = {
            "max_token_length": args.max_token_length,
            "clip_skip": args.clip_skip,
            "weighted": args.weighted_captions,
        }
        return self.model.encode_text(captions, **how)

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> latents (B, 4, H/8, W/8), float32.
        Raises ValueError for a VAE whose configuration and weights do not belong together."""
        try:
            return self.model.encode_images(pixels, generator).float()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            told = f"the VAE of {self.model.base_path} cannot encode a picture ({str(error).splitlines()[0][:200]})"
            raise ValueError(f"{told}: use another base, or another --vae") from error

    def predict_noise(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: Any, batch: dict) -> torch.Tensor:
        """The U-Net's prediction (B, 4, h, w). batch: further conditions (sizes, crops)."""
        return self.model.predict_noise(noisy.to(self.weight_dtype), timesteps, text)


class StableDiffusionXL(StableDiffusion):
    """SDXL as a base: both text encoders' conditions, cached where asked for; sizes and crops."""

    program = "es_lora_sdxl"
    is_sdxl = True

    def __init__(self, args: Namespace, weight_dtype: torch.dtype):
        super().__init__(args, weight_dtype)
        self.text_cache: dict[str, TextConditions] = {}  # of a caption alone, without the batch dimension, on the CPU

    def _load(self, dtype: torch.dtype) -> SDModel:
        return load_sdxl_model(self.args.pretrained_model_name_or_path, **self._settings(dtype))

    def check(self, batches: ImageBatches) -> None:
        super().check(batches)
        # Every U-Net level halves the latents; an uneven size would be padded in the middle.
        step_px = self.model.vae_scale * 2 ** (len(self.model.unet.config.block_out_channels) - 1)
        for settings in (dataset.settings for dataset in batches.datasets):
            flag, sides = "--resolution", settings.resolution
            if settings.enable_bucket:
                flag, sides = "--bucket_reso_steps", [settings.bucket_reso_steps]
            if any(side % step_px for side in sides):
                raise ValueError(f"{flag} {','.join(map(str, sides))}: this base needs multiples of {step_px} px")

    def cache_text(self, batches: Iterable[ImageBatches], prompts: Iterable[str], accelerator: Accelerator) -> None:
        """Encode every caption and prompt once, and take the text encoders off the device (not with
        --highvram)."""
        args = self.args
        if not args.cache_text_encoder_outputs:
            return
        captions = set().union(*map(captions_of, batches))

        @torch.no_grad()
        def encode(caption: str) -> TextConditions:
            with accelerator.autocast():
                conditions = self.encode_text([caption])
            return TextConditions(*(part[0].cpu() for part in conditions))

        files = None
        if args.cache_text_encoder_outputs_to_disk:
            how = f"{args.max_token_length}/{args.weighted_captions}/{args.mixed_precision}"
            files = TextFiles.of(self.model.text_encoders, how)
        found = conditions_of_all(captions, encode, files, accelerator)
        found.update({prompt: encode(prompt) for prompt in prompts if prompt not in found})
        self.text_cache.update(found)
        if not args.highvram:
            for encoder in self.model.text_encoders:
                encoder.to("cpu")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def encode_text(self, captions: list[str]) -> TextConditions:
        if not all(caption in self.text_cache for caption in captions):
            return super().encode_text(captions)
        parts = zip(*(self.text_cache[caption] for caption in captions))
        return TextConditions(*(torch.stack(part).to(self.model.unet.device) for part in parts))

    def predict_noise(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: Any, batch: dict) -> torch.Tensor:
        sizes_px = [batch[name] for name in ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")]  # (B, 2) each
        return self.model.predict_noise(noisy.to(self.weight_dtype), timesteps, text, torch.cat(sizes_px, dim=1))
