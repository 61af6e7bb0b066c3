"""What packing brings on short answers: tokens per second of training, packed against padded.
Writes packing_throughput.md.

    OMP_NUM_THREADS=1 .venv-llm/bin/python tests/benchmarks/packing_throughput.py

Every run trains one epoch of the same samples from the same start, so that all of them see the same
tokens.
"""

import contextlib
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "lora-llm"))
os.environ["HF_HUB_OFFLINE"] = "1"
THREADS = os.environ.setdefault("OMP_NUM_THREADS", "1")

import es_lora_llm  # noqa: E402
from transformers import AutoTokenizer, TrainerCallback, trainer  # noqa: E402

from text.collator import CausalCollator  # noqa: E402

PAGE = Path(__file__).with_suffix(".md")
BASE, DATA = ROOT / "lora-llm" / "tiny_base", ROOT / "dataset" / "devils_dictionary" / "train.jsonl"
BATCH, SEQ_LENGTH, REPEATS = 8, 512, 3
ARMS = {
    "padded": (f"batches of {BATCH} samples in random order", ["--group_by_length", "False"]),
    "padded, grouped": (f"batches of {BATCH} samples of similar length (`--group_by_length`, the default)", []),
    "packed": (
        f"`--packing --seq_length {SEQ_LENGTH}`, one sequence a step",
        ["--packing", "--seq_length", str(SEQ_LENGTH), "--per_device_train_batch_size", "1"],
    ),
}


class Stopwatch(TrainerCallback):
    """Seconds and processor seconds of the training, and the positions that the model was given."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        Stopwatch.positions = 0
        self.hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.started = time.perf_counter(), time.process_time()

    def _count(self, module, arguments, inputs) -> None:
        Stopwatch.positions += inputs["input_ids"].numel()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        Stopwatch.seconds = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        Stopwatch.steps = state.global_step
        self.hook.remove()


def train(arm: str, output: Path) -> dict[str, float]:
    words = ["--model_name_or_path", BASE, "--dataset", DATA, "--output_dir", output, "--bits", "32", "--lora_r", "16"]
    words += ["--num_train_epochs", "1", "--per_device_train_batch_size", BATCH, "--gradient_accumulation_steps", "1"]
    words += [
        "--gradient_checkpointing",
        "False",
        "--calculate_cs",
        "False",
        "--save_strategy",
        "no",
        "--optim",
        "adamw_torch",
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = es_lora_llm.main([*map(str, words), "--use_cpu", *ARMS[arm][1]])
    if code != 0:
        raise RuntimeError(f"{arm} failed: {said.getvalue()}")
    wall, processor = Stopwatch.seconds
    return {"wall": wall, "processor": processor, "positions": Stopwatch.positions, "steps": Stopwatch.steps}


def page(runs: dict[str, list[dict[str, float]]], tokens: int) -> str:
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "CPU")
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    lines = [
        "# Packed against padded",
        "",
        f"Made by `OMP_NUM_THREADS={THREADS} .venv-llm/bin/python tests/benchmarks/packing_throughput.py`, which "
        "writes it.",
        "",
        f"Machine: {cpu}, {os.cpu_count()} cores, {THREADS} thread(s); Python {platform.python_version()}, {packages}.",
        "The machine was busy with other work: ratios of runs next to each other count, processor time more than the "
        "clock.",
        "",
        f"The embedded base and `devils_dictionary` (160 short answers of very different length), {tokens} tokens an "
        "epoch;"
        f" float32, LoRA of rank 16, torch AdamW, CS not measured. One epoch a run, {len(runs['packed'])} rounds of "
        "all arms, the"
        " order reversed every other round.",
        "",
        "| arm | | optimizer steps | positions computed | of them tokens |",
        "|---|---|---|---|---|",
    ]
    for arm, facts in runs.items():
        first = facts[0]
        share = f"{100 * tokens / first['positions']:.0f} %"
        lines.append(f"| {arm} | {ARMS[arm][0]} | {first['steps']} | {first['positions']} | {share} |")
    lines += ["", "| tokens per second | measured by | median ratio | min | max |", "|---|---|---|---|---|"]
    for other in [arm for arm in ARMS if arm != "packed"]:
        for clock, name in (("processor", "processor time"), ("wall", "the clock")):
            ratios = [theirs[clock] / own[clock] for own, theirs in zip(runs["packed"], runs[other])]
            middle = statistics.median(ratios)
            lines.append(f"| packed / {other} | {name} | {middle:.2f} | {min(ratios):.2f} | {max(ratios):.2f} |")
    return "\n".join([*lines, "", "A ratio above 1: packed is faster.", ""])


def main() -> int:
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    tokens = sum(CausalCollator(AutoTokenizer.from_pretrained(BASE), 1024, 256).lengths(rows))
    trainer.DEFAULT_CALLBACKS.append(Stopwatch)
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        train("padded", Path(folder) / "warm-up")
        for repeat in range(REPEATS):
            for arm in list(ARMS) if repeat % 2 == 0 else reversed(ARMS):
                runs[arm].append(train(arm, Path(folder) / f"{repeat} {arm}"))
    PAGE.write_text(page(runs, tokens), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
