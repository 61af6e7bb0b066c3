"""TRL's SFTTrainer that stops at its turning point: one import and one line more than without.

python lora-llm/examples/sft_trainer.py --base FOLDER_OR_HUB_NAME --data FILE.jsonl --output OUTPUT
"""

import argparse
import sys
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]
NOTES = TREE.parent / "dataset" / "kitchen_notes" / "train.jsonl"
sys.path.insert(0, str(TREE))  # where early_stop_callback.py lies

import quiet_libraries  # noqa: E402, F401  (only keeps warnings off the screen)
from datasets import load_dataset  # noqa: E402
from early_stop_callback import EarlyStopCallback  # noqa: E402
from peft import LoraConfig  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--base", default=str(TREE / "tiny_base"))
parser.add_argument("--data", default=str(NOTES), help="input and output")
parser.add_argument("--output", default="output/example-sft")
parser.add_argument("--epochs", type=float, default=10)
parser.add_argument("--max_steps", type=int, default=-1)
given = parser.parse_args()

data = load_dataset("json", data_files=given.data, split="train")
data = data.rename_columns({"input": "prompt", "output": "completion"})
settings = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_strategy": "no", "bf16": False}
args = SFTConfig(given.output, num_train_epochs=given.epochs, max_steps=given.max_steps, disable_tqdm=False, **settings)
lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = SFTTrainer(given.base, args=args, train_dataset=data, peft_config=lora, callbacks=[EarlyStopCallback()])
trainer.train()
trainer.save_model()  # the turning point where the rule stopped, the last step otherwise
