"""Train a LoRA for Stable Diffusion XL and stop at its turning point.

    python es_lora_sdxl.py --pretrained_model_name_or_path BASE --train_data_dir IMAGES \
        --resolution 1024 --output_dir OUT --early_stop --max_train_epochs 15 \
        --network_train_unet_only --cache_text_encoder_outputs

Flags, folders and files are those of sd-scripts' sdxl_train_network.py. The rest: es_lora_ldm.py.
"""

import sys

from es_lora_ldm import main

from base.families import StableDiffusionXL

if __name__ == "__main__":
    sys.exit(main(family=StableDiffusionXL))
