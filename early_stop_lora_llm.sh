#!/usr/bin/env bash
# Fine-tune a language model with a LoRA that stops at its turning point.
# Edit the settings, then run:  bash early_stop_lora_llm.sh
# Further flags go to the trainer and win over the settings:  bash early_stop_lora_llm.sh --learning_rate 1e-4
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# ------------------------------------------------------------------ settings
# As they stand, a real model learns a cook's style from 130 notes of this project, in minutes on two CPU cores.
# smollm2: SmolLM2-135M-Instruct, fetched once (93 MB). tiny: the small base of this project, without a download, with
# bits=4 learning_rate=2e-3 epochs=12 batch_size=8 prompt_template="".
# Else a folder in Hugging Face format, a GGUF file, or a hub name.
base_model="${base_model:-smollm2}"
training_data="$here/dataset/kitchen_notes/train.jsonl" # json, jsonl, csv or tsv with input and output columns
heldout_data="$here/dataset/kitchen_notes/heldout.jsonl" # examples to score on, never trained on; "" for none
general_text="$here/lora-llm/tiny_base/general_text.jsonl" # tells what the LoRA has forgotten of the base; "" for none
output="$here/output/llm-$(date +%Y%m%d-%H%M%S)"       # where everything goes; a new folder for every run

bits=32                     # the frozen base in 4, 8, 16 or 32 bits (4 fits the largest models)
rank=16                     # LoRA rank
alpha=32                    # LoRA alpha
learning_rate=1e-3          # 1e-4 to 2e-4 for a base of billions of parameters
epochs=4                    # the budget: training stops earlier, at the turning point
prompt_template=chat        # chat: the base's own chat template; "": input and output as they are; or a line with {columns}
batch_size=4                # examples at once; lower it if memory runs out ...
accumulation=1              # ... and raise this: optimizer steps see batch_size x accumulation examples
longest_source=128          # tokens of the input; the rest is cut off
longest_target=128          # tokens of the output
precision=""                # --bf16 on a recent GPU, --fp16 on an older one, empty on a CPU
recompute=False             # True saves memory for large models (gradient checkpointing), and costs a third of the time

early_stop=True             # False trains to the budget and saves the turning point beside the last weights
window=auto                 # measurements of CS that the decision looks at; auto: about one epoch
cs_interval=auto            # optimizer steps between measurements; auto: ten an epoch
# For a model of your own on a GPU:  base_model=mistralai/Mistral-7B-v0.3  learning_rate=2e-4  epochs=5
#   batch_size=1  accumulation=16  longest_source=1024  longest_target=512  precision=--bf16  recompute=True  bits=4

# ------------------------------------------------------------------ environment and training
# lora-llm/start.py reads the settings above: plain name=value lines, no other shell. Windows: py lora-llm\start.py
exec "${PYTHON:-python3}" "$here/lora-llm/start.py" --settings "$here/${BASH_SOURCE[0]##*/}" "$@"
