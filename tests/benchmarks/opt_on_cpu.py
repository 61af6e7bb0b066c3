"""What a base of OPT-1.3B's shape needs on a CPU with `--bits 16 --bf16`: memory and time of a
step. Writes opt_on_cpu.md.

    OMP_NUM_THREADS=1 .venv-llm/bin/python tests/benchmarks/opt_on_cpu.py

The weights are random: neither memory nor time depends on their values.
"""

import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "lora-llm"))
os.environ["HF_HUB_OFFLINE"] = "1"
THREADS = os.environ.setdefault("OMP_NUM_THREADS", "1")

import quiet_libraries  # noqa: E402, F401
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, OPTConfig  # noqa: E402

from adapters.weights import attach_lora, trainable_parameters  # noqa: E402
from base.loading import bf16_products, small_parts_in_float32  # noqa: E402

PAGE = Path(__file__).with_suffix(".md")
SHAPE = {
    "hidden_size": 2048,
    "word_embed_proj_dim": 2048,
    "ffn_dim": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
}
LORA = {"rank": 16, "alpha": 32, "dropout": 0.05}
STEPS = [(1, 128), (8, 256)]  # (samples, tokens of each); the larger last, because the peak is that of the process


def gigabytes(name: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process, in GB of 10^9 bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024 / 1e9


def model_of_opt_shape() -> torch.nn.Module:
    """A bf16 base with random weights, prepared as load_base does for training on a CPU, with a
    LoRA of the preset."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(OPTConfig(vocab_size=50272, **SHAPE), dtype=torch.bfloat16)
    base = base.to_empty(device="cpu")
    base.tie_weights()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.uniform_(-0.02, 0.02)
    base.config.use_cache = False
    small_parts_in_float32(base)
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return attach_lora(base, **LORA).train()


def main() -> int:
    model = model_of_opt_shape()
    count, loaded = trainable_parameters(model), gigabytes("VmRSS")
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    rows = []
    for samples, tokens in STEPS:
        ids = torch.randint(5, 50000, (samples, tokens))
        started = time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rows.append(f"| {samples} x {tokens} | {gigabytes('VmHWM'):.2f} GB | {time.process_time() - started:.0f} |")
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "CPU")
    lines = [
        "# OPT-1.3B's shape on a CPU, `--bits 16 --bf16`",
        "",
        f"Made by `OMP_NUM_THREADS={THREADS} .venv-llm/bin/python tests/benchmarks/opt_on_cpu.py`, which writes this "
        "page.",
        "",
        f"Machine: {cpu}{bf16_products()}, {THREADS} thread(s); Python {platform.python_version()}, torch "
        f"{torch.__version__},"
        f" transformers {metadata.version('transformers')}.",
        "",
        f"Random weights; {count['total']:,} parameters, {count['trainable']:,} of them a LoRA of rank 16 on every "
        "linear layer"
        f" but the head. Gradient checkpointing, torch AdamW. Loaded, with the libraries: {loaded:.2f} GB.",
        "",
        "| samples x tokens of a step | peak memory of the process | processor seconds |",
        "|---|---|---|",
        *rows,
        "",
    ]
    PAGE.write_text("\n".join(lines), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
