"""An adapter in llama.cpp against the same adapter in transformers: logits and greedy
answers. Writes gguf_export.md.

    LLAMA_CPP_PYTHON=PYTHON python tests/benchmarks/gguf_export.py --adapter RUN/adapter

The base must have the GGUF file that it was made of beside it (base.gguf). Ours is transformers in
float32. PYTHON: an interpreter that can import llama_cpp.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "lora-llm"), str(ROOT / "tests")]

import llama_cpp_runner  # noqa: E402
import merge_adapter  # noqa: E402
import quiet_libraries  # noqa: E402, F401
import torch  # noqa: E402
from peft import AutoPeftModelForCausalLM  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from adapters.folders import open_adapter  # noqa: E402
from base.gguf_vocabulary import SOURCE_NAME  # noqa: E402

PAGE = Path(__file__).with_suffix(".md")
INTRODUCTION = """# Adapters in llama.cpp

Next-token logits and greedy answers of llama.cpp (llama-cpp-python 0.3.36, CPU, keys and values in
float32) against transformers in float32, on {questions} questions through the chat template, {tokens}
tokens an answer. Base: SmolLM2-135M-Instruct, of whose Q4_1 file the base folder was dequantised.
llama.cpp rounds activations to 8 bits for that file, which the first line shows (0.173 of its mean
against a base dequantised in float32; the bf16 of the folder is 0.027 by itself). The adapter adds
nothing to it. Merged in f16, both compute the same. Greedy answers part where two tokens are nearly
equally likely, and stay apart.

    bash early_stop_lora_llm.sh --output_dir output/notes
    LLAMA_CPP_PYTHON=PYTHON python tests/benchmarks/gguf_export.py --adapter output/notes
"""
ANSWER_TOKENS = 32
QUESTIONS = (
    "How do I cook rice?",
    "How long do beans soak?",
    "What do I do with stale bread?",
    "How do I keep herbs fresh?",
    "How do I make a soup thicker?",
    "What is the capital of France?",
    "Write a sentence about the sea.",
    "Why is the sky blue?",
    "Name three fruits.",
    "What is 12 times 12?",
)


def prompts_of(tokenizer: Any) -> list[list[int]]:
    """Every question through the chat template, as token ids."""
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False) for talk in asked]


@torch.no_grad()
def ours(model: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """{"logits": (N, vocabulary), "answers": N lists of ids} of transformers."""
    logits, answers = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logits.append(model(ids).logits[0, -1])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return {"logits": torch.stack(logits), "answers": answers}


def row(name: str, told: dict[str, Any], expected: dict[str, Any]) -> str:
    """One line of the table."""
    theirs, logits = torch.from_numpy(told["logits"]), expected["logits"]
    difference = (theirs - logits).abs()
    first = sum(map(int, theirs.argmax(-1) == logits.argmax(-1)))
    same = [
        next((n for n, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b)))
        for a, b in zip(told["answers"], expected["answers"])
    ]
    whole = sum(a == b for a, b in zip(told["answers"], expected["answers"]))
    total = len(same)
    return (
        f"| {name} | {difference.max():.3f} | {difference.mean():.3f} | {first} of {total} | {whole} of {total} "
        f"| {sum(same) / sum(map(len, expected['answers'])):.0%} |"
    )


def written(adapter: str, folder: Path) -> dict[str, Path]:
    """The files of the adapter by merge_adapter.py, by what they are."""
    files = {
        "lora": (["--lora_gguf", folder / "lora.gguf"]),
        "merged, f16": (["--gguf", folder / "f16.gguf"]),
        "merged, f16, by way of a bf16 folder": (["--dtype", "bfloat16", "--gguf", folder / "bf16.gguf"]),
        "merged, q8_0": (["--gguf_type", "q8_0", "--gguf", folder / "q8_0.gguf"]),
    }
    for words in files.values():
        with contextlib.redirect_stdout(io.StringIO()):
            code = merge_adapter.main(["--adapter", adapter, *map(str, words)])
        if code:
            raise SystemExit(code)
    return {name: words[-1] for name, words in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapter", required=True)
    adapter = open_adapter(parser.parse_args().adapter)
    base = Path(adapter.config["base_model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = prompts_of(tokenizer)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter.path, dtype=torch.float32).eval()
    expected = ours(model, prompts)
    with model.disable_adapter():
        plain = ours(model, prompts)
    del model
    with tempfile.TemporaryDirectory() as scratch:
        files = written(str(adapter.path), Path(scratch))
        lora = files.pop("lora")
        asked: dict[str, Any] = {"prompts": prompts, "answer_tokens": ANSWER_TOKENS}
        of_base = llama_cpp_runner.ask(base / SOURCE_NAME, **asked)
        told = llama_cpp_runner.ask(base / SOURCE_NAME, lora, **asked)
        merged = {name: llama_cpp_runner.ask(file, **asked) for name, file in files.items()}
        sizes = {name: file.stat().st_size / 1e6 for name, file in {"adapter": lora, **files}.items()}
    moved = (expected["logits"] - plain["logits"]).abs()
    largest, listed = expected["logits"].abs().max(), ", ".join(f"{name} {size:.0f} MB" for name, size in sizes.items())
    lines = [
        INTRODUCTION.format(questions=len(QUESTIONS), tokens=ANSWER_TOKENS),
        "| llama.cpp | largest difference | mean difference | same first token | same answer | of the tokens |",
        "|---|---|---|---|---|---|",
        row("base alone, original Q4_1 file", of_base, plain),
        row("adapter over the original Q4_1 file", told, expected),
        *(row(name, answer, expected) for name, answer in merged.items()),
        f"\nThe adapter moves the logits by up to {moved.max():.2f}, {moved.mean():.2f} in the mean;",
        f"the largest logit is {largest:.1f}. Sizes: {listed}.\n",
        "| question | transformers | llama.cpp, adapter over the Q4_1 file |\n|---|---|---|",
    ]
    for question, a, b in zip(QUESTIONS, expected["answers"], told["answers"]):
        texts = [" ".join(tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in (a, b)]
        lines.append(f"| {question} | {texts[0]} | {'the same' if a == b else texts[1]} |")
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
