"""This project's language-model trainer against TRL's SFTTrainer: tokens per second and peak
memory, as ratios. Writes sft_throughput.md beside this file.

    OMP_NUM_THREADS=1 .venv-llm/bin/python tests/benchmarks/sft_throughput.py

Same base, data, order, LoRA, batch, lengths, optimizer and threads; on the CPU, in float32; every
run in a process of its own, the trainers in turn. Exit code 1 where this project's trainer is
slower beyond the spread.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Callable

import torch
from tqdm import tqdm
from transformers import TrainerCallback, trainer

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "lora-llm"
BASE, DATA = TREE / "tiny_base", ROOT / "dataset" / "kitchen_notes" / "train.jsonl"
PAGE = Path(__file__).with_suffix(".md")
THREADS = os.environ.get("OMP_NUM_THREADS", "1")
BATCH, RANK, ALPHA, DROPOUT, RATE, SEED, LIMIT_TOKENS = 4, 16, 32, 0.05, 1e-4, 42, 256
STEPS, WARM_STEPS, REPEATS = 20, 4, 5
ARMS = {
    "ours": "es_lora_llm.py as it comes: CS measured, snapshots kept",
    "TRL": "SFTTrainer",
    "TRL + callback": "SFTTrainer with EarlyStopCallback(early_stop=False)",
}
SAME = {
    "learning_rate": RATE,
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": 1,
}
SAME |= {"lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 0.3, "seed": SEED}
SAME |= {"optim": "adamw_torch", "save_strategy": "no", "eval_strategy": "no", "logging_steps": 10, "report_to": "none"}


# ------------------------------------------------------------------------------------------ one run


def peak_bytes() -> int:
    """Peak resident memory of this process since its start or since forget_peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


class Stopwatch(TrainerCallback):
    """Seconds, processor seconds and tokens of the steps after the warm-up, and peak memory."""

    file: Path

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.tokens = self.padded = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.loading_bytes = peak_bytes()
        forget_peak()

    def _count(self, module, arguments, inputs) -> None:
        self.tokens += int(inputs["attention_mask"].sum())
        self.padded += inputs["attention_mask"].numel()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == WARM_STEPS:
            self.tokens = self.padded = 0
            self.started = time.perf_counter(), time.process_time()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        seconds, processor = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        training_bytes = peak_bytes()
        facts = {"tokens": self.tokens, "padded": self.padded, "seconds": seconds, "processor": processor}
        facts |= {"training_bytes": training_bytes, "whole_bytes": max(training_bytes, self.loading_bytes)}
        facts["losses"] = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self.file.write_text(json.dumps(facts), encoding="utf-8")


def run_ours(output: Path) -> None:
    import es_lora_llm

    arguments = {**SAME, "model_name_or_path": BASE, "dataset": DATA, "output_dir": output, "bits": 32, "lora_r": RANK}
    arguments |= {
        "lora_alpha": ALPHA,
        "lora_dropout": DROPOUT,
        "group_by_length": False,
        "gradient_checkpointing": False,
    }
    arguments |= {"source_max_len": LIMIT_TOKENS, "target_max_len": LIMIT_TOKENS}
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    if es_lora_llm.main([*words, "--use_cpu"]) != 0:
        raise RuntimeError("es_lora_llm.py did not train")


def run_trl(output: Path, with_callback: bool) -> None:
    import quiet_libraries  # noqa: F401
    from datasets import load_dataset
    from early_stop_callback import EarlyStopCallback
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    data = load_dataset("json", data_files=str(DATA), split="train").rename_columns(
        {"input": "prompt", "output": "completion"}
    )
    own = {"max_length": 2 * LIMIT_TOKENS, "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    own["model_init_kwargs"] = {"dtype": "float32"}
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    callbacks = [EarlyStopCallback(early_stop=False)] if with_callback else []
    config = SFTConfig(str(output), **SAME, **own)
    SFTTrainer(str(BASE), config, train_dataset=data, peft_config=lora, callbacks=callbacks).train()


def child(arm: str, folder: Path) -> None:
    """One run in this process; its facts go to facts.json in the folder."""
    sys.path.insert(0, str(TREE))
    torch.set_num_threads(int(THREADS))
    Stopwatch.file = folder / "facts.json"
    trainer.DEFAULT_CALLBACKS.append(Stopwatch)  # the first of the callbacks, in either trainer
    if arm == "ours":
        run_ours(folder / "run")
    else:
        run_trl(folder / "run", "callback" in arm)


def run_arm(arm: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    command = [sys.executable, __file__, "--child", arm, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": THREADS, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{arm} failed:\n{done.stdout}")
    return json.loads((folder / "facts.json").read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------- the page

MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "tokens per second": lambda facts: facts["tokens"] / facts["seconds"],
    "tokens per processor second": lambda facts: facts["tokens"] / facts["processor"],
    "peak memory from the first step on": lambda facts: facts["training_bytes"],
    "peak memory of the whole process": lambda facts: facts["whole_bytes"],
}


def rows(runs: dict[str, list[dict[str, Any]]]) -> tuple[list[str], bool]:
    """(lines of the table, whether ours is not slower than TRL beyond the spread, by the clock and
    by processor time)."""
    lines = ["| against TRL of the same round | measure | median ratio | min | max |", "|---|---|---|---|---|"]
    holds = []
    for arm in [name for name in ARMS if name != "TRL"]:
        for name, measure in MEASURES.items():
            ratios = [measure(own) / measure(theirs) for own, theirs in zip(runs[arm], runs["TRL"])]
            middle = statistics.median(ratios)
            lines.append(f"| {arm} | {name} | {middle:.3f} | {min(ratios):.3f} | {max(ratios):.3f} |")
            if arm == "ours" and "second" in name:
                holds.append(max(ratios) >= 1)
    return [*lines, "", *spread_lines(runs)], all(holds)


def spread_lines(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| spread over the repeats: (max - min) / median | " + " | ".join(MEASURES) + " |",
        "|---|" + "---|" * len(MEASURES),
    ]
    for arm, facts in runs.items():
        columns = [[measure(entry) for entry in facts] for measure in MEASURES.values()]
        cells = [f"{(max(values) - min(values)) / statistics.median(values):.3f}" for values in columns]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def page(runs: dict[str, list[dict[str, Any]]]) -> tuple[str, bool]:
    table, holds = rows(runs)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "CPU")
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    counted = [f"{arm}: {facts[0]['tokens']} of {facts[0]['padded']}" for arm, facts in runs.items()]
    losses = [f"{arm}: {', '.join(f'{float(loss):.3f}' for loss in facts[0]['losses'])}" for arm, facts in runs.items()]
    lines = [
        "# This project's trainer against TRL's SFTTrainer",
        "",
        f"Made by `OMP_NUM_THREADS={THREADS} .venv-llm/bin/python tests/benchmarks/sft_throughput.py`, which writes "
        "this page.",
        "",
        f"Machine: {cpu}, {os.cpu_count()} cores, {THREADS} thread(s); Python {platform.python_version()}, {packages}.",
        "The machine was busy with other work, more or less: ratios of runs next to each other count, and processor "
        "time.",
        "",
        "The embedded base (`lora-llm/tiny_base`) and `kitchen_notes`; float32, torch AdamW, no gradient "
        "checkpointing, samples"
        f" uncut, loss on the answers; LoRA of rank {RANK} on every linear layer but the head, dropout {DROPOUT}, "
        f"batch {BATCH}."
        f" {STEPS} steps, timed after the first {WARM_STEPS}; {len(runs['TRL'])} rounds, each trainer in a process of "
        "its own,"
        " the order reversed every other round.",
        "",
        *[f"- {arm}: {what}" for arm, what in ARMS.items()],
        "",
        "A ratio above 1 is faster, or more memory.",
        "",
        *table,
        "",
        f"Tokens timed, of positions with padding - {'; '.join(counted)}.",
        f"Logged training losses of the first round - {'; '.join(losses)}.",
        "",
        f"Beyond the spread, ours is {'not slower' if holds else 'SLOWER'} than TRL: its largest ratio, by the clock "
        "and by"
        f" processor time, is {'' if holds else 'not '}at least 1.",
        "",
    ]
    return "\n".join(lines), holds


def main() -> int:
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as name:
        for repeat in tqdm(range(REPEATS), desc="rounds"):
            for arm in list(ARMS) if repeat % 2 == 0 else reversed(ARMS):
                runs[arm].append(run_arm(arm, Path(name) / f"{repeat}-{arm.replace(' ', '-')}"))
            text, holds = page(runs)  # after every round, so that a long measurement may be broken off
            temporary = PAGE.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, PAGE)
    print(text)
    return 0 if holds else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(sys.argv[2], Path(sys.argv[3])))
    sys.exit(main())
