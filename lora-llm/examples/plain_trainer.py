"""A plain Trainer with PEFT that stops at its turning point: one import and one line more.

python lora-llm/examples/plain_trainer.py --base FOLDER_OR_HUB_NAME --data FILE.jsonl --output OUT
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
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments  # noqa: E402
from transformers import DataCollatorForLanguageModeling as Collator  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--base", default=str(TREE / "tiny_base"))
parser.add_argument("--data", default=str(NOTES), help="input and output")
parser.add_argument("--output", default="output/example-plain")
parser.add_argument("--epochs", type=float, default=10)
parser.add_argument("--max_steps", type=int, default=-1)
given = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(given.base)
base = AutoModelForCausalLM.from_pretrained(given.base, dtype="float32")
model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
rows = load_dataset("json", data_files=given.data, split="train")
data = [tokenizer(f"{row['input']} {row['output']}{tokenizer.eos_token}") for row in rows]
settings = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "save_strategy": "no", "disable_tqdm": False}
args = TrainingArguments(given.output, num_train_epochs=given.epochs, max_steps=given.max_steps, **settings)
collator = Collator(tokenizer, mlm=False)
trainer = Trainer(model, args, collator, train_dataset=data, callbacks=[EarlyStopCallback()])
trainer.train()
trainer.save_model()  # the turning point where the rule stopped, the last step otherwise
