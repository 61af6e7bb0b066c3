"""What shadow adapters cost: processor time of training with one and with two of them, against
training without.

    .venv-llm/bin/python tests/benchmarks/shadow_cost.py

Both trainers on their embedded bases and bundled data, the language model in 4 bits, CS measured
ten times an epoch, one thread. One process a trainer; a repeat runs all ways in turn, and a ratio
compares runs of one repeat. Only the training is timed, in processor time, so that other work on
the machine counts less. Writes shadow_cost.md beside this file.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_suffix(".md")
REPEATS = 3
TITLES = {"llm": "text, 4 bits, 16 steps of 8 examples", "ldm": "pictures, 100 steps of 2"}
WAYS = {  # name: flags
    "none": [],
    "K = 1": ["--shadows", "1"],
    "K = 1, `--shadow_interval auto`": ["--shadows", "1", "--shadow_interval", "auto"],
    "K = 2": ["--shadows", "2"],
}


def text_flags(output):
    """Sixteen steps (about an epoch) of `base_model=tiny bash early_stop_lora_llm.sh`."""
    flags = {
        "model_name_or_path": ROOT / "lora-llm" / "tiny_base",
        "dataset": ROOT / "dataset" / "kitchen_notes" / "train.jsonl",
        "output_dir": output,
        "max_steps": 16,
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
    """A hundred steps (an epoch) of the default run of early_stop_lora_ldm.sh, U-Net and text
    encoder."""
    flags = {
        "pretrained_model_name_or_path": ROOT / "lora-ldm" / "tiny_base",
        "train_data_dir": ROOT / "dataset" / "portraits" / "train",
        "output_dir": output,
        "max_train_steps": 100,
        "resolution": "64,64",
        "caption_extension": ".txt",
        "network_dim": 16,
        "network_alpha": 16,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "text_encoder_lr": 1e-4,
        "seed": 1337,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))] + [
        "--cache_latents",
        "--calculate_cs",
    ]


def time_here(kind):
    """All runs of one trainer in this process; prints a JSON line {"way", "seconds"} for each."""
    sys.path.insert(0, str(ROOT / f"lora-{kind}"))
    trainer = __import__(f"es_lora_{kind}")
    train, taken = trainer.train, []

    def timed(*words):
        start = time.process_time()
        result = train(*words)
        taken.append(time.process_time() - start)
        return result

    trainer.train = timed
    run_once(kind, trainer, "none")  # what is loaded at first use is not the first way's to pay
    for _ in range(REPEATS):
        for way in WAYS:
            run_once(kind, trainer, way)
            print(json.dumps({"way": way, "seconds": taken[-1]}), flush=True)


def run_once(kind, trainer, way):
    """One run. Raises RuntimeError where it fails or did not train the shadows it was asked to."""
    if kind == "ldm":
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        flags = text_flags(output) if kind == "llm" else image_flags(output)
        code = trainer.main([*flags, *WAYS[way]])
        if code:
            raise RuntimeError(f"the run ended with code {code}")
        if bool(json.loads((output / "result.json").read_text(encoding="utf-8"))["shadows"]) != (way != "none"):
            raise RuntimeError("the run did not train the shadows it was asked to")


def rows(kind, title):
    """Lines of the table of one trainer."""
    command = [str(ROOT / f".venv-{kind}" / "bin" / "python"), __file__, "--child", kind]
    return table_lines(title, subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def table_lines(title, printed):
    """Lines of the table from what time_here printed; a repeat that was cut off is left out."""
    seconds = {way: [] for way in WAYS}
    for line in printed.splitlines():
        if line.startswith('{"way"'):
            fact = json.loads(line)
            seconds[fact["way"]].append(fact["seconds"])
    repeats = min(map(len, seconds.values()))
    lines = []
    for way, taken in seconds.items():
        taken = taken[:repeats]
        ratios = [with_shadows / without for with_shadows, without in zip(taken, seconds["none"])]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        figures = f"{statistics.median(taken):.1f} | {statistics.median(ratios):.2f} | {spread}"
        lines.append(f"| {title} | {way} | {repeats} | {figures} |")
    return lines


def main():
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor() as pool:  # the two trainers side by side
        lines = sum(pool.map(rows, TITLES, TITLES.values()), [])
    TABLE.write_text(page_of(lines), encoding="utf-8")
    print(page_of(lines))


def page_of(lines):
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "CPU")
    page = [
        "# What shadow adapters cost",
        "",
        "Made by `.venv-llm/bin/python tests/benchmarks/shadow_cost.py`, which writes this page.",
        "",
        f"Machine: {cpu}, one thread; Python {platform.python_version()}. All ways in turn; processor seconds of the "
        "training",
        "alone; a ratio compares two runs of the same repeat. Shadows have rank 8, the main LoRA has rank 16.",
        "",
        "| run | shadows | repeats | seconds, median | times the run without, median | smallest to largest |",
        "|---|---|---|---|---|---|",
        *lines,
    ]
    return "\n".join(page) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        time_here(sys.argv[2])
    else:
        main()
