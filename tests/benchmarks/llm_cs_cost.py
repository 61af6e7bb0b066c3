"""What measuring CS costs on a 4-bit language model: peak memory of a run with and without it, and the time of one
measurement against the literal way (form B A, flatten, cosine). Writes llm_cs_cost.md beside this file.

    .venv-llm/bin/python tests/benchmarks/llm_cs_cost.py

Everything runs on the CPU, on a random Llama-shaped base that the script makes. Exit code 1 where the memory bound is missed.
"""

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
SHAPE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048, "vocab_size": 32000}
STEPS, MEMORY_REPEATS = 6, 5
RANKS, TIME_REPEATS = (8, 64, 128), 9
MB = 1e6


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """The function's result, computed in a process of its own, so that this one stays small.

    A child's peak memory as the kernel counts it starts from the peak of the process that forked it.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def make_base(folder: Path) -> dict[str, int]:
    """Save a random bf16 base with the embedded tokenizer; {"parameters", "largest_bytes"} (float32, LoRA-carrying)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=12)).to(torch.bfloat16)
    model.save_pretrained(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TREE / "tiny_base" / name, folder / name)
    carriers = [parameter.numel() for name, parameter in model.named_parameters() if "_proj" in name]
    return {"parameters": sum(p.numel() for p in model.parameters()), "largest_bytes": 4 * max(carriers)}


# ------------------------------------------------------------------------------------------------ memory


def peak_bytes(base: Path, output: Path, with_cs: bool) -> int:
    """Peak resident memory of one training run in a fresh process. Raises RuntimeError where the run fails."""
    command = [sys.executable, str(TREE / "es_lora_llm.py"), "--model_name_or_path", str(base), "--output_dir", str(output)]
    command += ["--dataset", str(ROOT / "dataset" / "kitchen_notes" / "train.jsonl"), "--bits", "4", "--lora_r", "64"]
    command += ["--max_steps", str(STEPS), "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]
    command += ["--source_max_len", "32", "--target_max_len", "32", "--gradient_checkpointing", "False"]
    command += ["--save_strategy", "no", "--calculate_cs", str(with_cs), "--cs_interval", "1", "--window_size", "2"]
    with open(output.with_suffix(".log"), "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"the run failed:\n{output.with_suffix('.log').read_text(encoding='utf-8')}")
    if (output / "cs_history.jsonl").exists() != with_cs:
        raise RuntimeError("the run did not measure what it was asked to")
    return usage.ru_maxrss * 1024  # Linux counts in KiB


def lora_bytes(adapter: Path) -> int:
    """Bytes of the LoRA weights of a saved adapter."""
    with safe_open(str(adapter / "adapter_model.safetensors"), framework="pt") as handle:
        return sum(handle.get_tensor(name).nbytes for name in handle.keys())


def memory_rows(base: Path, folder: Path, facts: dict[str, int]) -> tuple[list[str], bool]:
    """(lines of the memory table, whether the bound holds)."""
    peaks: dict[bool, list[int]] = {False: [], True: []}
    for repeat in tqdm(range(MEMORY_REPEATS), desc="memory"):
        for with_cs in (False, True) if repeat % 2 == 0 else (True, False):
            peaks[with_cs].append(peak_bytes(base, folder / f"run-{repeat}-{with_cs}", with_cs))
    lora = lora_bytes(folder / "run-0-True" / "adapter")
    difference = statistics.median(peaks[True]) - statistics.median(peaks[False])
    spread = max(max(values) - min(values) for values in peaks.values())
    bound = facts["largest_bytes"] + 2 * lora + spread
    lines = ["| run | peak RSS, median | min | max |", "|---|---|---|---|"]
    for with_cs, values in peaks.items():
        name = "with CS at every step" if with_cs else "without CS"
        lines.append(f"| {name} | {statistics.median(values) / MB:.1f} MB | {min(values) / MB:.1f} | {max(values) / MB:.1f} |")
    lines += ["", "| | MB |", "|---|---|", f"| difference of the medians | {difference / MB:.1f} |"]
    lines += [f"| largest LoRA-carrying weight in float32 | {facts['largest_bytes'] / MB:.1f} |"]
    lines += [f"| LoRA weights (counted twice in the bound) | {lora / MB:.1f} |"]
    lines += [f"| measured spread (larger max - min of the two) | {spread / MB:.1f} |"]
    lines += [f"| bound | {bound / MB:.1f} |"]
    verdict = "below" if difference < bound else "NOT below"
    lines += ["", f"The difference is {verdict} the bound; without the spread the bound is {(bound - spread) / MB:.1f} MB."]
    return lines, difference < bound


# ------------------------------------------------------------------------------------------------ time


def literal_cosine(layers: list) -> float:
    """CS as the formula reads: B A is formed, flattened, and compared with the whole weight; mean over the layers."""
    values = []
    for layer in layers:
        update = (layer.up @ layer.down).flatten()  # (out * in,)
        weight = layer.weight.dense().float().flatten()  # (out * in,)
        values.append(torch.nn.functional.cosine_similarity(update, weight, dim=0).item())
    return sum(values) / len(values)


def time_at_rank(base_model: Any, settings: Any, rank: int) -> tuple[list[float], float, float]:
    """(literal seconds / factorised seconds of every repeat, first measurement / later one, difference of the values)."""
    from base_model import attach_lora
    from cs_fluctuation import measure_layers
    from early_stop_callback import peft_lora_layers

    settings.training.lora_r = rank
    model = attach_lora(base_model, settings.training)
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
    from base_model import load_base
    from llm_arguments import parse_arguments

    lines = ["| frozen base | rank | literal / factorised, median | min | max | first / later | values differ by |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for bits in (4, 32):
        settings = parse_arguments(["--model_name_or_path", str(base), "--bits", str(bits), "--output_dir", str(base / "none")])
        base_model = load_base(settings)
        for rank in tqdm(RANKS, desc=f"time, {bits} bits"):
            ratios, first, difference = time_at_rank(base_model, settings, rank)
            figures = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} | {first:.2f} | {difference:.1e}"
            lines.append(f"| {bits} bits | {rank} | {figures} |")
    return lines


# ------------------------------------------------------------------------------------------------ the page


def machine() -> str:
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "CPU")
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
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
        f"Base: random Llama-shaped model of {facts['parameters'] / 1e6:.1f} million parameters ({shape}), saved in bf16.",
        "",
        "## Peak memory of a 4-bit run",
        "",
        f"NF4 with double quantisation, LoRA of rank 64 on every linear layer but the head, batch 1, {STEPS} steps; with CS:"
        f" measured and put into a snapshot at every step. {MEMORY_REPEATS} fresh processes each, in turn.",
        "",
        *memory,
        "",
        "## Time of one measurement",
        "",
        "`measure_layers` (both cosines and the norm of the update) against the literal way (form B A, flatten, one cosine)"
        f" on the same layers, in turn, {TIME_REPEATS} repeats: above 1 the factorised way is faster. First / later: a run's"
        " first measurement, which also takes the norms of the frozen weights, against later ones. The machine may have been"
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
    sys.exit(main())
