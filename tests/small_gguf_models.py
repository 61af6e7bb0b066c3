"""Small random models, adapters and tokenizers that the tests of GGUF files share."""

from pathlib import Path
from typing import Any

import merge_adapter
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = "how long do 12 beans soak, and in how much water?"
KINDS = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 128},  # transformers takes no other from a GGUF
}


def make_base(kind: str, tokenizer: Any, folder: Path, **more: Any) -> Path:
    """A random model of two layers with grouped queries, its vectors random too."""
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, max_position_embeddings=256, tie_word_embeddings=kind == "llama")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **KINDS[kind], **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, seed: int = 1, targets: Any = LINEAR, **more: Any) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False, **more},
        task_type="CAUSAL_LM",
    )
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def run(*words: Any) -> int:
    """merge_adapter.py with that command line; its exit code."""
    return merge_adapter.main([str(word) for word in words])


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A BPE with byte fallback, as Llama 2 and Mistral have it in tokenizer.json."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁h", "el", "▁hel", "▁", *"helo"]
    model = models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[("▁", "h"), ("e", "l"), ("▁h", "el")],
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
