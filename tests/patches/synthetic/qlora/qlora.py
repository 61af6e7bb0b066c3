"""A miniature with the structure of qlora.py (its argument classes, callback and calls), written
for these tests."""

import os
from dataclasses import dataclass, field

import torch
import transformers
from peft import LoraConfig, get_peft_model


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    full_finetune: bool = field(default=False)


class SavePeftModelCallback(transformers.TrainerCallback):
    def on_save(self, args, state, control, model=None, **kwargs):
        model.save_pretrained(os.path.join(args.output_dir, f"checkpoint-{state.global_step}", "adapter_model"))

    on_train_end = on_save


def get_last_checkpoint(folder):
    steps = [int(n[11:]) for n in os.listdir(folder) if n.startswith("checkpoint-")] if os.path.isdir(folder) else []
    return (os.path.join(folder, f"checkpoint-{max(steps)}") if steps else None), False


def train():
    parsed = transformers.HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(return_remaining_strings=True)
    args = parsed[0]
    checkpoint_dir, _ = get_last_checkpoint(args.output_dir)
    torch.manual_seed(args.seed)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    if not args.full_finetune:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    tokens = torch.randint(0, 32, (16, 12), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)
    if not args.full_finetune:
        trainer.add_callback(SavePeftModelCallback)
    trainer.train()
    total = sum(float(p.double().sum()) for n, p in model.named_parameters() if p.requires_grad)
    print("after training", total.hex())


if __name__ == "__main__":
    train()
