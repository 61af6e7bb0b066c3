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

case "$model_type" in
  sd) trainer=es_lora_ldm.py ;;
  sdxl) trainer=es_lora_sdxl.py ;;
  *) echo "early_stop_lora_ldm.sh: model_type=$model_type: choose sd or sdxl" >&2; exit 2 ;;
esac

# ------------------------------------------------------------------ environment
environment="$here/.venv-ldm"
if [ ! -f "$environment/.installed" ] || ! cmp -s "$here/requirements-ldm.txt" "$environment/.installed"; then
  echo "Installing the diffusion environment into $environment (once) ..."
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "early_stop_lora_ldm.sh: Python 3.11 or newer is needed; name one: PYTHON=python3.11 bash $0" >&2
    exit 2
  }
  "${PYTHON:-python3}" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements-ldm.txt"
  cp "$here/requirements-ldm.txt" "$environment/.installed"
fi

# ------------------------------------------------------------------ training
if [ -n "$resume" ]; then
  output="$(dirname "$resume")"
fi
flags=(
  --pretrained_model_name_or_path "$base_model" --train_data_dir "$train_data" --caption_extension .txt
  --resolution "$resolution" --enable_bucket --min_bucket_reso 64 --bucket_no_upscale --cache_latents
  --output_dir "$output" --output_name "$name" --save_state_on_train_end
  --network_dim "$rank" --network_alpha "$alpha" --max_train_epochs "$epochs"
  --train_batch_size "$batch_size" --gradient_accumulation_steps "$accumulation"
  --learning_rate "$unet_rate" --unet_lr "$unet_rate" --text_encoder_lr "$text_rate" --optimizer_type "$optimizer"
  --lr_scheduler "$scheduler" --lr_warmup_steps "$warmup_steps" --lr_scheduler_num_cycles "$restarts"
  --mixed_precision "$precision" --seed "$seed" --log_with tensorboard
  --calculate_cs --early_stop "$early_stop" --window_size "$window" --cs_interval "$cs_interval"
)
add() { if [ -n "$1" ] && [ "$1" != 0 ]; then shift; flags+=("$@"); fi; }
add "$is_v2" --v2
add "$predicts_v" --v_parameterization
add "$trigger_word" --trigger_word "$trigger_word"
add "$reg_data" --reg_data_dir "$reg_data"
add "$class_pictures" --num_class_images "$class_pictures" --class_prompt "$class_prompt"
add "$prompts" --sample_prompts "$prompts"
add "$resume" --resume "$resume"
add "$continue_from" --network_weights "$continue_from" --dim_from_weights
add "$lycoris" --network_module lycoris.kohya --network_args "algo=$lycoris"
add "$min_snr_gamma" --min_snr_gamma "$min_snr_gamma"
add "$noise_offset" --noise_offset "$noise_offset"
add "$memory_efficient" "$memory_efficient"
add "$cache_text" --cache_text_encoder_outputs
add "$wandb_key" --log_with all --wandb_api_key "$wandb_key"
if [ "$model_type" = sd ]; then
  flags+=(--clip_skip "$clip_skip")
fi
case "$train_parts" in unet) flags+=(--network_train_unet_only) ;; text) flags+=(--network_train_text_encoder_only) ;; esac
if [ "$longest_caption" != 75 ]; then
  flags+=(--max_token_length "$longest_caption")
fi
launch=("$environment/bin/python")
if [ "$gpus" -gt 1 ]; then
  launch+=(-m torch.distributed.run --standalone --nproc_per_node "$gpus")
fi
exec "${launch[@]}" "$here/lora-ldm/$trainer" "${flags[@]}" "$@"
