"""What measuring CS costs on a 4-bit language model: peak memory of a run with and without it, and
the time of one measurement against the literal way (form B A, flatten, cosine). Writes
llm_cs_cost.md beside this file.

    .venv-llm/bin/python tests/benchmarks/llm_cs_cost.py

Everything runs on the CPU, on a random Llama-shaped base that the script makes. Exit code 1 where
the memory bound is missed.
"""

import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors import safe_open
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "lora-llm"
TABLE = Path(__file__).with_suffix(".md")
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
SHAPE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 2048,
    "vocab_size": 32000,
}
STEPS, MEMORY_REPEATS = 6, 5
RANKS, TIME_REPEATS = (8, 64, 128), 9
MB = 1e6
# The default allocator keeps freed blocks by a threshold that moves, which hides small differences;
# the other gives them back.
ALLOCATORS = {
    "as it comes": {},
    "gives freed memory back": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
}


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """The function's result, computed in a process of its own, so that this one stays small."""
    pool = multiprocessing.get_context("spawn").Pool(1)
    try:
        return pool.apply(function, arguments)
    finally:
        pool.close()
        pool.join()


def make_base(folder: Path) -> dict[str, int]:
    """Save a random bf16 base with the embedded tokenizer; {"parameters", "largest_bytes"}
    (float32, LoRA-carrying)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=12)).to(torch.bfloat16)
    model.save_pretrained(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TREE / "tiny_base" / name, folder / name)
    carriers = [parameter.numel() for name, parameter in model.named_parameters() if "_proj" in name]
    return {"parameters": sum(p.numel() for p in model.parameters()), "largest_bytes": 4 * max(carriers)}


# ------------------------------------------------------------------------------------------- memory


def resident_peak_bytes() -> int:
    """Peak resident memory of this process since its start or since forget_peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def train_and_note_peaks(peaks_file: Path, argv: list[str]) -> int:
    """One run of the trainer in this process; writes {"whole", "training"}: peak in bytes, and from
    the first step on."""
    sys.path.insert(0, str(TREE))
    import es_lora_llm

    train, loading = es_lora_llm.train, []

    def train_watched(run: Any) -> str:
        loading.append(resident_peak_bytes())
        forget_peak()
        return train(run)

    es_lora_llm.train = train_watched
    code = es_lora_llm.main(argv)
    training = resident_peak_bytes()
    peaks_file.write_text(json.dumps({"whole": max(training, *loading), "training": training}), encoding="utf-8")
    return code


def peak_bytes(base: Path, output: Path, with_cs: bool, allocator: dict[str, str]) -> dict[str, int]:
    """{"whole", "training"}: peaks of one training run in a fresh process. Raises RuntimeError
    where the run fails."""
    peaks_file = output.with_suffix(".json")
    command = [sys.executable, __file__, "--child", str(peaks_file)]
    command += ["--model_name_or_path", str(base), "--output_dir", str(output), "--bits", "4", "--lora_r", "64"]
    command += ["--dataset", str(ROOT / "dataset" / "kitchen_notes" / "train.jsonl")]
    command += ["--max_steps", str(STEPS), "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]
    command += ["--source_max_len", "32", "--target_max_len", "32", "--gradient_checkpointing", "False"]
    command += ["--save_strategy", "no", "--calculate_cs", str(with_cs), "--cs_interval", "1", "--window_size", "2"]
    environment = {**os.environ, **allocator}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the run failed:\n{done.stdout}")
    if (output / "cs_history.jsonl").exists() != with_cs:
        raise RuntimeError("the run did not measure what it was asked to")
    return json.loads(peaks_file.read_text(encoding="utf-8"))


def lora_bytes(adapter: Path) -> int:
    """Bytes of the LoRA weights of a saved adapter."""
    with safe_open(str(adapter / "adapter_model.safetensors"), framework="pt") as handle:
        return sum(handle.get_tensor(name).nbytes for name in handle.keys())


def memory_rows(base: Path, folder: Path, facts: dict[str, int]) -> tuple[list[str], bool]:
    """(lines of the memory tables, whether the bound holds in both)."""
    peaks: dict[tuple[str, bool], list[dict[str, int]]] = {}
    for repeat in tqdm(range(MEMORY_REPEATS), desc="memory"):
        for name, allocator in ALLOCATORS.items():
            for with_cs in (False, True) if repeat % 2 == 0 else (True, False):
                output = folder / f"run-{repeat}-{len(peaks)}-{name.split()[0]}-{with_cs}"
                peaks.setdefault((name, with_cs), []).append(peak_bytes(base, output, with_cs, allocator))
    lora = lora_bytes(next(folder.glob("run-0-*-True")) / "adapter")
    lines = [
        "| MB: memory allocator, phase | without CS: median (min to max) | with CS at every step | difference of "
        "medians "
        "| spread | bound |",
        "|---|---|---|---|---|---|",
    ]
    holds = []
    phases = (("whole", "whole process"), ("training", "from the first step on"))
    for name, phase, title in [(name, *entry) for name in ALLOCATORS for entry in phases]:
        off, on = ([entry[phase] / MB for entry in peaks[name, with_cs]] for with_cs in (False, True))
        difference = statistics.median(on) - statistics.median(off)
        spread = max(max(off) - min(off), max(on) - min(on))
        bound = (facts["largest_bytes"] + 2 * lora) / MB + spread
        holds.append(difference < bound)
        cells = [f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" for values in (off, on)]
        lines.append(f"| {name}, {title} | {cells[0]} | {cells[1]} | {difference:.1f} | {spread:.1f} | {bound:.1f} |")
    lines += [
        "",
        "Bound: the largest LoRA-carrying weight in float32, twice the LoRA weights, and the spread (the larger max - "
        "min).",
    ]
    sizes = f"{facts['largest_bytes'] / MB:.1f} + 2 x {lora / MB:.1f}"
    lines += [f"Without the spread it is {sizes} = {(facts['largest_bytes'] + 2 * lora) / MB:.1f} MB."]
    lines += [f"The difference is {'below the bound' if all(holds) else 'NOT below the bound'}."]
    return lines, all(holds)


# --------------------------------------------------------------------------------------------- time


def literal_cosine(layers: list) -> float:
    """CS as the formula reads: B A is formed, flattened, and compared with the whole weight; mean
    over the layers."""
    values = []
    for layer in layers:
        update = (layer.up @ layer.down).flatten()  # (out * in,)
        weight = layer.weight.dense().float().flatten()  # (out * in,)
        values.append(torch.nn.functional.cosine_similarity(update, weight, dim=0).item())
    return sum(values) / len(values)


def time_at_rank(base_model: Any, settings: Any, rank: int) -> tuple[list[float], float, float]:
    """(literal seconds / factorised seconds of every repeat, first measurement / later one,
    difference of the values)."""
    from cs_fluctuation import measure_layers
    from es_lora.hugging_face.peft_models import peft_lora_layers
    from training.setup import with_lora

    settings.training.lora_r = rank
    model = with_lora(settings, base_model)
    generator = torch.Generator().manual_seed(rank)
    layers = peft_lora_layers(model)
    for layer in layers:
        layer.up.data.normal_(0, 0.02, generator=generator)

    def seconds(function: Callable) -> tuple[float, Any]:
        start = time.perf_counter()
        value = function()
        return time.perf_counter() - start, value

    with torch.no_grad():
        first, measured = seconds(lambda: measure_layers(layers))  # this one also takes the norms of the frozen weights
        _, literal = seconds(lambda: literal_cosine(layers))
        pairs = []
        for repeat in range(TIME_REPEATS):
            ways = [lambda: literal_cosine(layers), lambda: measure_layers(layers)]
            order = (0, 1) if repeat % 2 == 0 else (1, 0)
            taken = {index: seconds(ways[index])[0] for index in order}
            pairs.append((taken[0], taken[1]))
    model.unload()
    ratios = [literal_sec / own_sec for literal_sec, own_sec in pairs]
    return ratios, first / statistics.median(own for _, own in pairs), abs(measured["cs_matrix"]["lm"] - literal)


def time_rows(base: Path) -> list[str]:
    """Lines of the time table."""
    sys.path.insert(0, str(TREE))
    torch.set_num_threads(THREADS)
    import quiet_libraries  # noqa: F401

    from base.loading import load_base
    from settings.parsing import parse_arguments
    from training.setup import base_spec

    lines = ["| frozen base | rank | literal / factorised, median | min | max | first / later | values differ by |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for bits in (4, 32):
        settings = parse_arguments(
            ["--model_name_or_path", str(base), "--bits", str(bits), "--output_dir", str(base / "none")]
        )
        base_model = load_base(base_spec(settings))
        for rank in tqdm(RANKS, desc=f"time, {bits} bits"):
            ratios, first, difference = time_at_rank(base_model, settings, rank)
            values = [statistics.median(ratios), min(ratios), max(ratios), first]
            figures = " | ".join([*(f"{value:.2f}" for value in values), f"{difference:.1e}"])
            lines.append(f"| {bits} bits | {rank} | {figures} |")
    return lines


# ----------------------------------------------------------------------------------------- the page


def machine() -> str:
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "CPU")
    packages = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes")
    )
    return f"{cpu}, {os.cpu_count()} cores, {THREADS} thread(s); Python {platform.python_version()}, {packages}."


def main() -> int:
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), Path(name) / "base"
        facts = in_fresh_process(make_base, base)
        memory, holds = memory_rows(base, folder, facts)
        times = in_fresh_process(time_rows, base)
    shape = f"hidden {SHAPE['hidden_size']}, {SHAPE['num_hidden_layers']} layers, vocabulary {SHAPE['vocab_size']}"
    page = [
        "# What measuring CS costs on a language model",
        "",
        "Made by `.venv-llm/bin/python tests/benchmarks/llm_cs_cost.py`, which writes this page.",
        "",
        f"Machine: {machine()}",
        f"Base: random Llama-shaped model of {facts['parameters'] / 1e6:.1f} million parameters ({shape}), saved in "
        "bf16.",
        "",
        "## Peak memory of a 4-bit run",
        "",
        f"NF4 with double quantisation, LoRA of rank 64 on every linear layer but the head, batch 1, {STEPS} steps; "
        "with CS:"
        f" measured and put into a snapshot at every step. {MEMORY_REPEATS} fresh processes each, in turn; peak "
        "resident memory"
        " as the kernel counts it. Loading the base has a peak of its own, so the peak from the first step on is "
        "given beside"
        " that of the whole process. The C library's allocator keeps freed memory by rules of its own, so the runs "
        "are made with"
        " it as it comes and with settings under which it gives freed memory back at once.",
        "",
        *memory,
        "",
        "## Time of one measurement",
        "",
        "`measure_layers` (both cosines and the norm of the update) against the literal way (form B A, flatten, one "
        "cosine)"
        f" on the same layers, in turn, {TIME_REPEATS} repeats: above 1 the factorised way is faster. First / later: "
        "a run's"
        " first measurement, which also takes the norms of the frozen weights, against later ones. The machine may "
        "have been"
        " busy with other work: only ratios of neighbours in time are given.",
        "",
        *times,
        "",
    ]
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_text("\n".join(page), encoding="utf-8")
    os.replace(temporary, TABLE)
    print("\n".join(page))
    return 0 if holds else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(train_and_note_peaks(Path(sys.argv[2]), sys.argv[3:]))
    sys.exit(main())
