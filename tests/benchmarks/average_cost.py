"""What averaging the weights costs: time and memory of a step's update, against the step itself.

    .venv-llm/bin/python tests/benchmarks/average_cost.py

SmolLM2-135M in 32 bits, 8 notes a step; a U-Net of Stable Diffusion 1.5's size with random values,
one picture of 256 px a step. Every pair (model, rank) runs in a process of its own, on one thread,
and its processor time is taken, which hardly depends on what else the machine does. Needs both
environments of the project. Writes average_cost.md."""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT, PAGE = Path(__file__).resolve().parents[2], Path(__file__).with_suffix(".md")
MODELS = {"SmolLM2-135M": "llm", "SD-1.5-shaped U-Net": "ldm"}
RANKS, STEPS, UPDATES, WIDTH = (16, 64), 3, 20, 0.25


def smollm2(rank):
    """(a training step, the trained tensors)."""
    import torch
    from real_model import COMMON

    from base.loading import load_base, load_tokenizer
    from es_lora.hugging_face.peft_models import trainable_tensors
    from settings.parsing import parse_arguments
    from text.collator import CausalCollator
    from training.setup import base_spec, fetch_base, read_splits, with_lora

    settings = parse_arguments([*COMMON, "none", "--bits", "32", "--lora_r", str(rank)])
    fetch_base(settings)
    tokenizer = load_tokenizer(base_spec(settings))
    batch = CausalCollator(tokenizer, 128, 128)(list(read_splits(settings, tokenizer).train)[:8])
    model = with_lora(settings, load_base(base_spec(settings))).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: trainable_tensors(model)


def sd15(rank):
    """The same of a U-Net."""
    import torch
    from ldm_sd15_shaped import sd15_unet, unet_only

    from network.lora import create_network

    unet = sd15_unet()
    network = create_network(unet_only(unet), rank=rank, alpha=rank, train_text_encoder=False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    noisy, text = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 768)

    def step():
        unet(noisy, torch.tensor([500]), text).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, network.tensors


def seconds_of(act, times):
    found = []
    for _ in range(times):
        started = time.process_time()
        act()
        found.append(time.process_time() - started)
    return found


def measure(tree, rank):
    sys.path[:0] = [str(ROOT / f"lora-{tree}"), str(Path(__file__).parent)]
    import quiet_libraries  # noqa: F401
    import torch

    from es_lora.average import WeightAverage

    torch.set_num_threads(1)
    step, tensors = {"llm": smollm2, "ldm": sd15}[tree](rank)
    steps = seconds_of(step, STEPS + 1)[1:]
    average = WeightAverage(tensors, WIDTH)
    updates = seconds_of(average.update, UPDATES + 1)[1:]
    kept = sum(tensor.numel() * tensor.element_size() for tensor in average.state_tensors().values())
    trained = sum(tensor.numel() * tensor.element_size() for tensor in tensors().values())
    return {"step": steps, "update": updates, "megabytes": kept / 1e6, "trained": trained / 1e6}


def row(model, rank, found):
    step, update = statistics.median(found["step"]), statistics.median(found["update"])
    low, high = min(found["update"]) / max(found["step"]), max(found["update"]) / min(found["step"])
    share = f"{update / step:.2%} ({low:.2%} to {high:.2%})"
    memory = f"{found['megabytes']:.1f} | {found['trained']:.1f}"
    return f"| {model} | {rank} | {step:.2f} | {1000 * update:.1f} | {share} | {memory} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("TREE", "RANK"), help="measure one pair here and print it")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]))))
        return
    lines = [
        "# What averaging the weights costs",
        "",
        f"Made by `average_cost.py`. One thread, no GPU; Python {platform.python_version()}; processor time; medians.",
        "",
        "| model | rank | step, s | update, ms | share of the step (smallest to largest) | average, MB | LoRA, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, tree in MODELS.items():
        for rank in RANKS:
            python = ROOT / f".venv-{tree}" / "bin" / "python"
            command = [str(python), __file__, "--one", tree, str(rank)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            lines.append(row(model, rank, json.loads(done.stdout.splitlines()[-1])))
            print(lines[-1], flush=True)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{PAGE} is written.")


if __name__ == "__main__":
    main()
