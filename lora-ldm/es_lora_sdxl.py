"""Train a LoRA for Stable Diffusion XL and stop at its turning point.

    python es_lora_sdxl.py --pretrained_model_name_or_path BASE --train_data_dir IMAGES --resolution 1024 --output_dir OUT \
        --early_stop --max_train_epochs 15 --network_train_unet_only --cache_text_encoder_outputs

Flags, folders and files are those of sd-scripts' sdxl_train_network.py; `--help` lists them. All else is es_lora_ldm.py.
"""

import sys

import torch

from base.sdxl import TextConditions, load_sdxl_model
from base.text_cache import cache_text
from training.loop import NetworkTrainer, main


class SDXLNetworkTrainer(NetworkTrainer):
    """One training run of SDXL: its model, both text encoders' conditions (cached where asked for), sizes and crops."""

    program = "es_lora_sdxl"
    is_sdxl = True

    def __init__(self, args):
        super().__init__(args)
        self.text_cache = {}  # {caption: TextConditions of it alone, without the batch dimension, on the CPU}

    def load_model(self):
        args = self.args
        return load_sdxl_model(
            args.pretrained_model_name_or_path,
            v_parameterization=args.v_parameterization,
            vae=args.vae,
            dtype=self.base_dtype,
            tokenizer_cache_dir=args.tokenizer_cache_dir,
        )

    def assert_supported(self):
        super().assert_supported()
        # Every level of the U-Net halves the latents; what does not divide evenly would be padded in the middle of it.
        step_px = self.model.vae_scale * 2 ** (len(self.model.unet.config.block_out_channels) - 1)
        for settings in (dataset.settings for dataset in self.batches.datasets):
            flag, sides = "--resolution", settings.resolution
            if settings.enable_bucket:
                flag, sides = "--bucket_reso_steps", [settings.bucket_reso_steps]
            if any(side % step_px for side in sides):
                raise ValueError(f"{flag} {','.join(map(str, sides))}: this base needs multiples of {step_px} px")

    def fill_caches(self):
        if self.args.cache_text_encoder_outputs:
            cache_text(self)
        super().fill_caches()

    def encode_text(self, captions):
        if not all(caption in self.text_cache for caption in captions):
            return super().encode_text(captions)
        parts = zip(*(self.text_cache[caption] for caption in captions))
        return TextConditions(*(torch.stack(part).to(self.accelerator.device) for part in parts))

    def predict_noise(self, noisy, timesteps, text_states, batch):
        sizes_px = [batch[name] for name in ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")]  # (B, 2) each
        return self.model.predict_noise(noisy.to(self.weight_dtype), timesteps, text_states, torch.cat(sizes_px, dim=1))


if __name__ == "__main__":
    sys.exit(main(trainer_class=SDXLNetworkTrainer))
