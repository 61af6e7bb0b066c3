"""Build the suite's larger base: the embedded one grown from 6 to 18 layers (16.4 million
parameters) and trained on.

    python larger_base.py      # language-model environment, Debian; under 60 minutes on two cores

Every layer of the embedded base is followed by two copies of itself whose output projections are
zero, so that the grown model starts as the same function; then all weights are trained on the
embedded base's own text (make_tiny_base.py collects it). The seed fixes the batches. It goes to
cache/larger_base, which is not committed; README.md has its figures.
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
TINY_BASE = HERE.parents[2] / "lora-llm" / "tiny_base"
sys.path.insert(0, str(TINY_BASE))
from collect_text import collect  # noqa: E402
from make_tiny_base import learning_rate_factor, mean_loss, read_texts, shuffled_windows  # noqa: E402

COPIES = 2  # grown layers behind each layer
HELDOUT_WINDOWS, CONTEXT_TOKENS = 64, 512


def grown(small):
    """The same function in a model of (1 + COPIES) times as many layers."""
    config = copy.deepcopy(small.config)
    config.num_hidden_layers *= 1 + COPIES
    large = LlamaForCausalLM(config)
    large.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    large.model.norm.load_state_dict(small.model.norm.state_dict())
    for index, layer in enumerate(large.model.layers):
        layer.load_state_dict(small.model.layers[index // (1 + COPIES)].state_dict())
        if index % (1 + COPIES):
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return large


def tokens_of(split, work_folder, tokenizer):
    """Token ids (N,) of one split of the text, one document after the other, each between bos and
    eos."""
    encoded = tokenizer([record["text"] for record in read_texts(work_folder / f"{split}.jsonl")], verbose=False)[
        "input_ids"
    ]
    return torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])


def train(model, tokens, arguments):
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    batches = shuffled_windows(tokens, arguments.batch_size, arguments.seed)
    steps = int(arguments.tokens // (arguments.batch_size * CONTEXT_TOKENS))
    for step in tqdm(range(steps), unit="step", mininterval=10):
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * learning_rate_factor(step / steps)
        batch = next(batches)  # (B, CONTEXT_TOKENS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=HERE / "cache" / "text", help="packages and text")
    parser.add_argument("--out_dir", type=Path, default=HERE / "cache" / "larger_base")
    parser.add_argument("--tokens", type=float, default=1.2e5, help="training tokens (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help=f"windows of {CONTEXT_TOKENS} tokens a step")
    parser.add_argument("--learning_rate", type=float, default=1.5e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    started = time.monotonic()
    if not (arguments.work_dir / "heldout.jsonl").is_file():
        arguments.work_dir.mkdir(parents=True, exist_ok=True)
        collect(arguments.work_dir, 2.0, 0)  # the split that the embedded base had
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    heldout = tokens_of("heldout", arguments.work_dir, tokenizer)
    picked = heldout[: len(heldout) // CONTEXT_TOKENS * CONTEXT_TOKENS].view(-1, CONTEXT_TOKENS)
    picked = picked[:: max(1, len(picked) // HELDOUT_WINDOWS)][:HELDOUT_WINDOWS].flatten()  # windows of every source
    small = LlamaForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32)
    large = grown(small)
    figures = {"parameters": large.num_parameters()}
    figures.update(embedded_loss=mean_loss(small, picked), loss_at_start=mean_loss(large, picked))
    figures["steps"] = train(large, tokens_of("train", arguments.work_dir, tokenizer), arguments)
    figures["loss"] = mean_loss(large, picked)
    figures["perplexity"] = math.exp(figures["loss"])
    figures["minutes"] = (time.monotonic() - started) / 60
    large.to(torch.bfloat16).save_pretrained(arguments.out_dir)
    tokenizer.save_pretrained(arguments.out_dir)
    (arguments.out_dir / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
