"""Runs of the language-model trainer that take seconds, and what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).resolve().parents[2] / "lora-llm" / "es_lora_llm.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def random_llama(folder):
    """A seeded random Llama of two layers, hidden size 64, with the embedded base's tokenizer."""
    import quiet_libraries  # noqa: F401
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(PROGRAM.parent / "tiny_base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,  # rows of whole blocks of 64, as 4 bits need them
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flags(base, files, output, *more):
    """A run of 6 epochs of 4 steps that measures after every step, M = 2."""
    return [
        *("--model_name_or_path", str(base), "--dataset", str(files["train"]), "--output_dir", str(output)),
        *("--bits", "32", "--lora_r", "4", "--learning_rate", "5e-3", "--per_device_train_batch_size", "4"),
        *("--gradient_accumulation_steps", "1", "--gradient_checkpointing", "False", "--num_train_epochs", "6"),
        *("--stop_rule", "second-valley", "--cs_interval", "1", "--window_size", "2"),
        *("--save_strategy", "no", "--use_cpu", *map(str, more)),
    ]


def result_of(output):
    return json.loads((output / "result.json").read_text())


def adapter_of(folder):
    return load_file(str(folder / "adapter_model.safetensors"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start(arguments):
    """A run as a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
