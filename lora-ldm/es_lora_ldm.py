"""Train a LoRA for Stable Diffusion 1.x / 2.x and stop at its turning point.

    python es_lora_ldm.py --pretrained_model_name_or_path BASE --train_data_dir IMAGES --resolution 512 --output_dir OUT \
        --early_stop --max_train_epochs 15

Flags, folders and files are those of sd-scripts' train_network.py; `--help` lists them. `step` always means a completed
optimizer step. Exit codes: 0 trained or stopped early, 2 bad arguments or data, 3 diverged, 130 interrupted.
"""

import sys

import quiet_libraries  # noqa: F401  (before diffusers)

from training.loop import main

if __name__ == "__main__":
    sys.exit(main())
