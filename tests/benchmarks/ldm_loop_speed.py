"""Steps per second of the diffusion trainer's loop, and the share of the time that is spent outside
the model's parts.

    python tests/benchmarks/ldm_loop_speed.py [--model embedded|sd15] [--resolution 512] \
        [--batch 1] [--precision no] [--steps 30]

"Parts": text encoder, U-Net, their backward pass, optimizer step, and CS measurements with their
snapshots. The latents are cached, so the VAE does not run. Writes a line into ldm_loop_speed.md
beside this file.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from ldm_sd15_shaped import ROOT, sd15_model

RESULT = Path(__file__).with_suffix(".md")
HEAD = (
    "| model | device | px | batch | precision | rank | steps/s (spread) | text | U-Net | backward | optimizer | CS | "
    "outside |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


class Clock:
    """Seconds spent in named parts; on a GPU each boundary waits for the work before it."""

    def __init__(self, device):
        self.device, self.seconds = device, defaultdict(float)

    def now(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name, function):
        def wrapped(*words, **settings):
            start = self.now()
            try:
                return function(*words, **settings)
            finally:
                self.seconds[name] += self.now() - start

        return wrapped


def make_run(args, folder):
    from base.families import StableDiffusion
    from settings.parsing import parse_arguments
    from training.setup import set_up

    class Shaped(StableDiffusion):
        def _load(self, dtype):
            return sd15_model(dtype)

    small = args.model == "embedded"
    pictures = Path(folder) / "pictures" / "10_portraits"
    pictures.mkdir(parents=True)
    source = ROOT / "dataset/portraits" / ("train" if small else "512px") / "10_portraits"
    for file in sorted(source.iterdir())[: 2 * args.pictures]:  # a picture and its caption
        shutil.copy(file, pictures)
    flags = {
        "pretrained_model_name_or_path": ROOT / "lora-ldm/tiny_base",
        "train_data_dir": pictures.parent,
        "caption_extension": ".txt",
        "resolution": args.resolution,
        "output_dir": Path(folder) / "out",
        "train_batch_size": args.batch,
        "mixed_precision": args.precision,
        "network_dim": args.rank,
        "max_train_steps": args.steps + args.warmup,
        "seed": 1,
        "learning_rate": 1e-4,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    settings = parse_arguments([*words, "--cache_latents", "--calculate_cs"])
    return set_up(settings, StableDiffusion if small else Shaped)


def measure(args):
    """(seconds of each timed step, {part: its seconds})."""
    from training.loop import Loop
    from training.results import finish

    with tempfile.TemporaryDirectory() as folder:
        run = make_run(args, folder)
        device, loop = run.processes.device.type, Loop(run)
        clock, ends = Clock(device), []
        run.base.encode_text = clock.timed("text", run.base.encode_text)
        run.base.predict_noise = clock.timed("U-Net", run.base.predict_noise)
        run.processes.accelerator.backward = clock.timed("backward", run.processes.accelerator.backward)
        run.optimization.prepared.step = clock.timed("optimizer", run.optimization.prepared.step)
        loop.measure = clock.timed("CS", loop.measure)
        after_step = loop.after_step

        def noted():
            after_step()
            ends.append(clock.now())
            if len(ends) == args.warmup:
                clock.seconds.clear()

        loop.after_step = noted
        finish(run, loop.until_it_ends())
    steps = [b - a for a, b in zip(ends[args.warmup - 1 :], ends[args.warmup :])]
    return device, steps, dict(clock.seconds)


def main():
    parser = argparse.ArgumentParser(description="Speed of the diffusion trainer's loop.")
    parser.add_argument("--model", choices=["embedded", "sd15"], default="embedded")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    device, steps, parts = measure(args)
    total = sum(steps)
    share = {
        name: f"{100 * parts.get(name, 0) / total:.1f}%" for name in ("text", "U-Net", "backward", "optimizer", "CS")
    }
    outside = 100 * (1 - sum(parts.values()) / total)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    spread = f"{1 / max(steps):.2f} to {1 / min(steps):.2f}, median {1 / statistics.median(steps):.2f}"
    rate = f"{len(steps) / total:.2f} ({spread})"
    line = f"| {args.model} | {name} | {args.resolution} | {args.batch} | {args.precision} | {args.rank} | {rate} | "
    line += " | ".join(share.values()) + f" | {outside:.1f}% |\n"
    start = f"# Speed of the diffusion trainer's loop\n\n{__doc__.strip()}\n\n{HEAD}"
    args.out.write_text((args.out.read_text() if args.out.exists() else start) + line)
    print(HEAD + line)


if __name__ == "__main__":
    main()
