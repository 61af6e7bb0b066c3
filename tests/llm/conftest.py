"""Puts the lora-llm tree on sys.path, as running one of its entry points would, and makes a model
to train in seconds."""

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "lora-llm"
sys.path[:0] = [str(TREE), str(ROOT / "tests"), str(ROOT / "tests" / "llm")]
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a hub, and asking for one costs half a minute


@pytest.fixture(scope="session")
def random_base(tmp_path_factory) -> Path:
    """A seeded random Llama of two layers, hidden size 64, with the embedded base's tokenizer."""
    from short_runs import random_llama

    return random_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def text_files(tmp_path_factory) -> dict:
    """{"train", "heldout"}: 16 and 6 short examples of the bundled kitchen notes."""
    folder, files = tmp_path_factory.mktemp("text"), {}
    for name, count in (("train", 16), ("heldout", 6)):
        lines = (ROOT / "dataset" / "kitchen_notes" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows = [json.loads(line) for line in lines]
        short = [{"input": row["input"][:60], "output": row["output"][:80]} for row in rows]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in short))
    return files


@pytest.fixture(scope="session")
def conversation_files(text_files, tmp_path_factory) -> dict:
    """{"train", "heldout"}: 8 and 3 conversations of two questions and answers each, of the same
    notes."""
    folder, files = tmp_path_factory.mktemp("conversations"), {}
    for name, file in text_files.items():
        pairs = [json.loads(line) for line in file.read_text().splitlines()]
        turns = [[("user", pair["input"][:40]), ("assistant", pair["output"][:40])] for pair in pairs]
        talks = [[*turns[at], *turns[at + 1]] for at in range(0, len(turns), 2)]
        files[name] = folder / f"{name}.jsonl"
        rows = [{"messages": [{"role": role, "content": content} for role, content in talk]} for talk in talks]
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.fixture(scope="session")
def base_with_a_table(tmp_path_factory) -> Path:
    """A random GPT-2 of 64 learnt positions, with the embedded base's tokenizer."""
    import quiet_libraries  # noqa: F401
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("table")
    tokenizer = AutoTokenizer.from_pretrained(TREE / "tiny_base")
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2, vocab_size=len(tokenizer), **ids)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
