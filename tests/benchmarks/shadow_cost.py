"""What shadow adapters cost: processor time of training with one and with two of them, against training without.

    .venv-llm/bin/python tests/benchmarks/shadow_cost.py

Both trainers on their embedded bases and bundled data, the language model in 4 bits, CS measured ten times an epoch, one
thread. Each run is a process of its own and only its training is timed, not its loading; a repeat runs all ways in turn, and a
ratio compares runs of one repeat. Processor time, so that other work on the machine counts less. Writes shadow_cost.md.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_suffix(".md")
REPEATS = 3
WAYS = {  # name: flags
    "none": [],
    "K = 1": ["--shadows", "1"],
    "K = 1, `--shadow_interval auto`": ["--shadows", "1", "--shadow_interval", "auto"],
    "K = 2": ["--shadows", "2"],
    "K = 2, `--shadow_interval auto`": ["--shadows", "2", "--shadow_interval", "auto"],
}


def text_flags(output):
    """Two epochs of the default run of early_stop_lora_llm.sh."""
    flags = {
        "model_name_or_path": ROOT / "lora-llm" / "tiny_base",
        "dataset": ROOT / "dataset" / "kitchen_notes" / "train.jsonl",
        "output_dir": output,
        "num_train_epochs": 2,
        "bits": 4,
        "lora_r": 16,
        "lora_alpha": 32,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "source_max_len": 128,
        "target_max_len": 128,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def image_flags(output):
    """60 steps of the default run of early_stop_lora_ldm.sh, U-Net and text encoder."""
    flags = {
        "pretrained_model_name_or_path": ROOT / "lora-ldm" / "tiny_base",
        "train_data_dir": ROOT / "dataset" / "portraits" / "train",
        "output_dir": output,
        "max_train_steps": 60,
        "resolution": "64,64",
        "caption_extension": ".txt",
        "network_dim": 16,
        "network_alpha": 16,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "text_encoder_lr": 1e-4,
        "seed": 1337,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))] + ["--cache_latents", "--calculate_cs"]


def train_here(kind, seconds_file, argv):
    """One run in this process; writes the processor seconds of its training."""
    sys.path.insert(0, str(ROOT / f"lora-{kind}"))
    trainer = __import__(f"es_lora_{kind}")
    place = trainer if kind == "llm" else trainer.NetworkTrainer
    train = place.train

    def timed(*words):
        start = time.process_time()
        result = train(*words)
        Path(seconds_file).write_text(str(time.process_time() - start), encoding="utf-8")
        return result

    place.train = timed
    return trainer.main(argv)


def seconds_of(kind, way, folder):
    """(processor seconds of the training, share of it that the run itself puts down to shadows)."""
    output = folder / "run"
    flags = text_flags(output) if kind == "llm" else image_flags(output)
    python = ROOT / f".venv-{kind}" / "bin" / "python"
    command = [str(python), __file__, "--child", kind, str(folder / "seconds"), *flags, *WAYS[way]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the run failed:\n{done.stdout}")
    reported = json.loads((output / "result.json").read_text(encoding="utf-8"))["shadows"]
    if bool(reported) != (way != "none"):
        raise RuntimeError("the run did not train the shadows it was asked to")
    return float((folder / "seconds").read_text(encoding="utf-8"))


def rows(kind, title):
    """Lines of the table of one trainer."""
    seconds = {way: [] for way in WAYS}
    for _ in range(REPEATS):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                seconds[way].append(seconds_of(kind, way, Path(folder)))
                print(title, way, f"{seconds[way][-1]:.1f} s", flush=True)
    lines = []
    for way, taken in seconds.items():
        ratios = [with_shadows / without for with_shadows, without in zip(taken, seconds["none"])]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {title} | {way} | {statistics.median(taken):.1f} | {statistics.median(ratios):.2f} | {spread} |")
    return lines


def main():
    os.environ["OMP_NUM_THREADS"] = "1"
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "CPU")
    lines = rows("llm", "text, 4 bits, 34 steps") + rows("ldm", "pictures, 60 steps")
    page = [
        "# What shadow adapters cost",
        "",
        "Made by `.venv-llm/bin/python tests/benchmarks/shadow_cost.py`, which writes this page.",
        "",
        f"Machine: {cpu}, one thread; Python {platform.python_version()}. {REPEATS} repeats of every way in turn; processor",
        "seconds of the training alone; a ratio compares two runs of the same repeat. Shadows have rank 8, the main LoRA 16.",
        "",
        "| run | shadows | seconds, median | times the run without, median | smallest to largest |",
        "|---|---|---|---|---|",
        *lines,
    ]
    TABLE.write_text("\n".join(page) + "\n", encoding="utf-8")
    print("\n".join(page))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(train_here(sys.argv[2], sys.argv[3], sys.argv[4:]))
    main()
