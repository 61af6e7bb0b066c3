#!/usr/bin/env bash
# Train a LoRA for Stable Diffusion 1.x, 2.x or XL that stops at its turning point.
# Edit the settings, then run:  bash early_stop_lora_ldm.sh
# Further flags go to the trainer and win over the settings:  bash early_stop_lora_ldm.sh --unet_lr 1e-4 --flip_aug
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# ------------------------------------------------------------------ settings
# As they stand, everything is in this project: a small base model and a few pictures, minutes on a CPU.
model_type=sd                               # sd (Stable Diffusion 1.x and 2.x) or sdxl
base_model="$here/lora-ldm/tiny_base"       # a diffusers folder, a .safetensors/.ckpt file, or a hub name
is_v2=0                                     # 1: the base is Stable Diffusion 2.x
predicts_v=0                                # 1: the base predicts v (SD 2.x for 768 px)
train_data="$here/dataset/portraits/train"  # a folder of <repeats>_<name> folders with pictures and .txt captions
trigger_word=""                             # comes first in every caption, for instance "CUS statue"; "" for none
reg_data=""                                 # regularisation (class) pictures, folders of the same kind; "" for none
class_pictures=0                            # generate so many of class_prompt into reg_data where they are missing; 0: none
class_prompt=""                             # for instance "a photo of a statue"
resolution="64,64"                          # width,height in px: that of the base
prompts="$here/lora-ldm/preview_prompts.txt"  # pictures are made of these prompts at the end; "" for none

name="portraits"                            # name of the LoRA file
output="$here/output/ldm-$(date +%Y%m%d-%H%M%S)" # where everything goes; a new folder for every run
resume=""                                   # a state folder of an interrupted run (its output folder is then used)
continue_from=""                            # a LoRA file to start from: its layers and ranks are trained on, no others

rank=16                                     # LoRA rank (kohya: network dim)
alpha=16                                    # LoRA alpha; half the rank is usual
train_parts=both                            # both, unet, or text
lycoris=""                                  # algo of LyCORIS instead of LoRA: locon, loha, lokr; "" for LoRA
epochs=15                                   # the budget: training stops earlier, at the turning point
batch_size=2                                # pictures at once
accumulation=1                              # optimizer steps see batch_size x accumulation pictures
unet_rate=1e-3                              # learning rate of the U-Net
text_rate=1e-4                              # learning rate of the text encoders
scheduler=cosine_with_restarts              # constant, constant_with_warmup, linear, cosine, polynomial, ...
warmup_steps=0
restarts=1                                  # cycles of cosine_with_restarts
optimizer=AdamW                             # AdamW, AdamW8bit (GPU), Lion, Prodigy, Adafactor, ...
min_snr_gamma=0                             # 5 evens out the timesteps; 0: off
noise_offset=0                              # 0.05 to 0.1 for darker and brighter pictures; 0: off
longest_caption=75                          # tokens: 75, 150 or 225
clip_skip=1                                 # 2 for anime bases; SDXL has a layer of its own
cache_text=0                                # 1: SDXL encodes each caption once; for train_parts=unet
precision=no                                # fp16 or bf16 on a GPU
memory_efficient=""                         # --xformers or --sdpa on a GPU
seed=1337

early_stop=True                             # False trains to the budget and saves the turning point beside the last weights
window=auto                                 # measurements of CS that the decision looks at; auto: about one epoch
cs_interval=auto                            # optimizer steps between measurements; auto: ten an epoch
gpus=1                                      # more than 1: one process each
wandb_key=""                                # logs to Weights & Biases as well, if given
# For Stable Diffusion 1.5 on a GPU:  base_model=stable-diffusion-v1-5/stable-diffusion-v1-5  resolution=512,512  rank=128
#   alpha=64  unet_rate=1e-5  text_rate=1e-6  optimizer=AdamW8bit  precision=fp16  memory_efficient=--xformers  clip_skip=2
#   epochs=15, and 20 to 100 pictures of your own in train_data
# For SDXL on a GPU:  model_type=sdxl  base_model=stabilityai/stable-diffusion-xl-base-1.0  resolution=1024,1024  rank=32
#   alpha=16  train_parts=unet  cache_text=1  unet_rate=1e-4  optimizer=AdamW8bit  precision=bf16  memory_efficient=--sdpa,
#   and the flags --gradient_checkpointing --no_half_vae

# ------------------------------------------------------------------ environment and training
# lora-ldm/start.py reads the settings above: plain name=value lines, no other shell. Windows: py lora-ldm\start.py
exec "${PYTHON:-python3}" "$here/lora-ldm/start.py" --settings "$here/${BASH_SOURCE[0]##*/}" "$@"
