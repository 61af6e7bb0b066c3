"""What one CS measurement costs on a U-Net of Stable Diffusion 1.5's size, against the literal way.

    python tests/benchmarks/ldm_cs_cost.py [--device cuda] [--dtype float32] \
        [--ranks 4 32 128] [--repeats 7]

Ours: cs_fluctuation.measure_layers, which never forms B A. Literal: copy the weights (a state
dict), form B A, take the cosine of the flattened matrices. Each pair (rank, way) runs in a process
of its own; peak memory is what the measurement adds to the model. Writes ldm_cs_cost.md beside this
file, one section a device.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from ldm_sd15_shaped import sd15_unet, unet_only

RESULT = Path(__file__).with_suffix(".md")


def literal(unet, modules):
    """Mean cosine of all layers as the published code computes it: copies, then B A."""
    copies = {name: value.clone() for name, value in unet.state_dict().items()}
    names = {id(module): name for name, module in unet.named_modules()}
    cosines = []
    for module in modules:
        name = names[id(module.layer)]
        weight = copies[f"{name}.base_layer.weight"].float().flatten()
        update = copies[f"{name}.lora_B.default.weight"].flatten(1) @ copies[f"{name}.lora_A.default.weight"].flatten(1)
        cosines.append(torch.nn.functional.cosine_similarity(weight, update.float().flatten(), dim=0))
    return torch.stack(cosines).mean().item()


def reset_peak(device):
    """Forget the peak so far (making the model has one of its own); returns the memory in use
    now."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident memory starts anew
    return peak_bytes(device)


def peak_bytes(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))


def measure_one(args):
    """One way at one rank, in this process: seconds of each repeat, added peak memory, the
    value."""
    from cs_fluctuation import measure_layers
    from network.lora import create_network

    unet = sd15_unet(getattr(torch, args.dtype), args.device)
    network = create_network(unet_only(unet), rank=args.rank, alpha=args.rank, train_text_encoder=False)
    network.to(args.device)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules:
        module.up.data.copy_(torch.randn(module.up.shape, generator=generator))
    layers = network.layers()
    ways = {
        "ours": lambda: measure_layers(layers)["cs_matrix"]["unet"],
        "literal": lambda: literal(unet, network.modules),
    }
    before, seconds = reset_peak(args.device), []
    for _ in range(args.repeats + 1):  # the first one also computes the norms of the frozen weights, once a run
        start = time.perf_counter()
        with torch.no_grad():
            value = ways[args.way]()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "added_bytes": peak_bytes(args.device) - before, "value": value}))


def run_one(args, rank, way):
    words = ["--rank", rank, "--way", way, "--device", args.device, "--dtype", args.dtype, "--repeats", args.repeats]
    done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def spread(seconds):
    """median (smallest to largest) in milliseconds."""
    values = [1000 * value for value in seconds]
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def section(args):
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"## {where}, weights in {args.dtype}",
        "",
        "| rank | ours, ms | ours, first, ms | literal, ms | times faster | ours adds, MB | literal adds, MB | "
        "difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rank in args.ranks:
        ours, literal_way = run_one(args, rank, "ours"), run_one(args, rank, "literal")
        steady, literal_seconds = ours["seconds"][1:], literal_way["seconds"][1:]
        added = [f"{way['added_bytes'] / 1e6:.0f}" for way in (ours, literal_way)]
        factor = statistics.median(literal_seconds) / statistics.median(steady)
        low, high = min(literal_seconds) / max(steady), max(literal_seconds) / min(steady)
        lines.append(
            f"| {rank} | {spread(steady)} | {1000 * ours['seconds'][0]:.0f} | {spread(literal_seconds)} | "
            f"{factor:.1f} ({low:.1f} to {high:.1f}) | {' | '.join(added)} | "
            f"{abs(ours['value'] - literal_way['value']):.1e} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Cost of a CS measurement on a U-Net of SD 1.5's size.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 32, 128])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--way")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.way:
        measure_one(args)
        return
    text = (
        args.out.read_text()
        if args.out.exists()
        else f"# {' '.join(__doc__.splitlines()[0].split())}\n\n{__doc__.strip()}\n\n"
    )
    new = section(args)
    title = re.escape(new.splitlines()[0])
    text = re.sub(rf"{title}\n.*?(?=\n## |\Z)", "", text, flags=re.S).rstrip() + "\n\n" + new
    args.out.write_text(text)


if __name__ == "__main__":
    main()
