"""Figures on a real model, SmolLM2-135M-Instruct: memory, speed, CS, MMLU, answers, many adapters,
a kill, a merge. Writes real_model.md.

    bash early_stop_lora_llm.sh --early_stop False --output_dir RUN
    .venv-llm/bin/python tests/benchmarks/real_model.py --run RUN --mmlu FILE.jsonl

RUN is the folder of the default run, carried on to its budget. FILE holds MMLU's validation
questions as rows {"subject", "input", "output"}. Subjects, prompts and sizes were fixed before
anything was measured.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TREE, PAGE, PROMPTS = (
    ROOT / "lora-llm",
    Path(__file__).with_suffix(".md"),
    Path(__file__).with_name("real_model_prompts.txt"),
)
DATA = ROOT / "dataset" / "kitchen_notes"
SUBJECTS = ("nutrition", "miscellaneous", "abstract_algebra")
STEPS, MEASUREMENTS, JOBS = 8, 5, 8
COMMANDS = {  # for the page; PYTHON: that of .venv-llm
    "The default run, carried on to its budget": "bash early_stop_lora_llm.sh --early_stop False --output_dir RUN",
    "Memory, speed, CS": "PYTHON tests/benchmarks/real_model.py --speed BITS",
    "MMLU": "PYTHON tests/benchmarks/real_model.py --run RUN --mmlu FILE.jsonl",
    "Answers": "PYTHON lora-llm/generate_text.py --adapter RUN --compare --max_new_tokens 64 "
    "--prompts tests/benchmarks/real_model_prompts.txt",
    "Many adapters": "PYTHON lora-llm/multi_lora.py --base_model smollm2 --bits 4 --use_cpu --config JOBS "
    "--output_dir OUT",
    "Resume": "PYTHON lora-llm/es_lora_llm.py ... --max_steps 4 --save_steps 2, killed, and "
    "--resume_from_checkpoint true",
    "Merge": "PYTHON lora-llm/merge_adapter.py --adapter RUN/adapter-turning-point --output MERGED",
}
sys.path.insert(0, str(TREE))
COMMON = ["--model_name_or_path", "smollm2", "--prompt_template", "chat", "--dataset", str(DATA / "train.jsonl")]
COMMON += ["--use_cpu", "--lora_r", "16", "--lora_alpha", "32", "--source_max_len", "128", "--target_max_len", "128"]
COMMON += ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1", "--report_to", "none"]
COMMON += ["--gradient_checkpointing", "False", "--output_dir"]


def ran(script: str, *words: Any, kill_at: Path | None = None) -> tuple[float, str]:
    """(seconds, output) of a script of the tree; killed by -9 as soon as the file `kill_at` is
    there."""
    command = [sys.executable, str(TREE / script), *map(str, words)]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if kill_at is not None:
        while not kill_at.exists():
            if process.poll() is not None:
                raise SystemExit(f"it ended before {kill_at} was there: {process.communicate()[0][-2000:]}")
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    told = process.communicate()[0]
    if kill_at is None and process.returncode:
        raise SystemExit(told[-3000:])
    return time.monotonic() - started, told


def speed(bits: int) -> dict[str, float]:
    """Tokens a processor second of a step, peak memory, and CS's share at its default interval.

    In this process alone, on one thread: that hardly depends on what else the machine does.
    """
    import torch

    from base.loading import load_base, load_tokenizer
    from cs_fluctuation import measure_layers
    from es_lora.hugging_face.peft_models import peft_lora_layers
    from settings.parsing import parse_arguments
    from text.collator import CausalCollator
    from training.setup import base_spec, fetch_base, read_splits, with_lora

    torch.set_num_threads(1)
    settings = parse_arguments([*COMMON, "none", "--bits", str(bits)])
    fetch_base(settings)
    tokenizer = load_tokenizer(base_spec(settings))
    rows = list(read_splits(settings, tokenizer).train)
    collator = CausalCollator(tokenizer, 128, 128)
    model = with_lora(settings, load_base(base_spec(settings))).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    seconds, tokens = [], []
    for step in range(STEPS):
        batch = collator(rows[8 * step : 8 * step + 8])
        started = time.process_time()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - started)
        tokens.append(int(batch["attention_mask"].sum()))
    measured = []
    for _ in range(MEASUREMENTS):
        started = time.process_time()
        measure_layers(peft_lora_layers(model))
        measured.append(time.process_time() - started)
    step, cs = statistics.median(seconds[1:]), statistics.median(measured[1:])
    interval = max(1, round(-(-len(rows) // 8) / 10))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = sum(tokens[1:]) / sum(seconds[1:])
    return {"tokens": rate, "step": step, "cs": cs, "interval": interval, "share": cs / (interval * step), "peak": peak}


def speeds() -> Iterator[str]:
    yield "| bits | tokens a processor second | 8 notes | peak memory | CS once | its share, every 2 steps |"
    yield "|---|---|---|---|---|---|"
    for bits in (32, 4):
        done = subprocess.run(
            [sys.executable, __file__, "--speed", str(bits)], capture_output=True, text=True, check=True
        )
        told = json.loads(done.stdout.splitlines()[-1])
        yield (
            f"| {bits} | {told['tokens']:.0f} | {told['step']:.2f} s | {told['peak'] / 1e9:.2f} GB "
            f"| {told['cs']:.3f} s | {told['share']:.1%} |"
        )


def default_run(run: Path) -> Iterator[str]:
    result = json.loads((run / "result.json").read_text())
    yield f"{result['verdict']} {result['seconds']:.0f} seconds.\n"
    yield "| weights | held-out loss | loss on general text |"
    yield "|---|---|---|"
    general = (result["forgetting"] or {"loss": {}})["loss"]
    for name, loss in result["heldout"].items():
        told = general.get(name)
        yield f"| {name} | {loss:.3f} | {told if not isinstance(told, float) else f'{told:.3f}'} |"


def mmlu(run: Path, questions: Path) -> Iterator[str]:
    """Accuracy by subject of base, kept and last weights.

    The first five questions of a subject are the examples of five-shot; they are never scored.
    """
    from generate_text import run_adapters

    from adapters.fitting import put_adapters_on
    from adapters.folders import load_frozen_base, load_tokenizer_of
    from text.mmlu import read_prompts
    from training.scores import MMLUScorer

    folders = list(run_adapters(str(run)).values())  # turning point, last
    base_name = folders[0].config["base_model_name_or_path"]
    tokenizer = load_tokenizer_of(base_name, folders)
    model = put_adapters_on(load_frozen_base(base_name, None, folders)[0], tokenizer, folders)
    rows = [row for row in read_prompts(questions) if row["subject"] in SUBJECTS]
    zero, five = [], []
    for subject in SUBJECTS:
        own = [row for row in rows if row["subject"] == subject]
        head = own[0]["input"].partition("\n\n")[0]
        examples = "".join(row["input"].partition("\n\n")[2] + f" {row['output']}\n\n" for row in own[:5])
        zero += own[5:]
        five += [{**row, "input": f"{head}\n\n{examples}{row['input'].partition(chr(10) * 2)[2]}"} for row in own[5:]]
    yield f"| MMLU | weights | all | {' | '.join(SUBJECTS)} |"
    yield f"|---|---|---|{'---|' * len(SUBJECTS)}"
    for shots, asked in (("zero-shot", zero), ("five-shot", five)):
        scorer = MMLUScorer(tokenizer, asked, 2048, 4)
        for name, adapter in (("base", None), ("turning point", "adapter0"), ("last", "adapter1")):
            if adapter is None:
                with model.disable_adapter():
                    told = scorer.score(model)
            else:
                model.set_adapter(adapter)
                told = scorer.score(model)
            by_subject = " | ".join(f"{told['per_subject'][subject]:.0%}" for subject in SUBJECTS)
            yield f"| {shots}, {told['count']} | {name} | {told['accuracy']:.0%} | {by_subject} |"


def answers(run: Path, scratch: Path) -> Iterator[str]:
    ran("generate_text.py", "--adapter", run, "--compare", "--prompts", PROMPTS, "--output", scratch / "answers.jsonl",
        "--max_new_tokens", 64)  # fmt: skip
    rows = [json.loads(line) for line in (scratch / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    names = list(dict.fromkeys(row["adapter"] for row in rows))
    yield f"| prompt | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    for prompt in dict.fromkeys(row["input"] for row in rows):
        texts = [" ".join(row["answer"].split()) for row in rows if row["input"] == prompt]
        yield f"| {prompt} | {' | '.join(texts)} |"


def many(scratch: Path) -> Iterator[str]:
    jobs = ["[defaults]\nbatch_size = 1\naccumulation = 1\nepochs = 1\nmax_train_samples = 8\nsource_max_len = 128\n"]
    jobs[0] += "target_max_len = 128\n"
    sets = [DATA, *(ROOT / "dataset" / name for name in ("law_terms", "devils_dictionary"))]
    for number in range(JOBS):
        file = sets[number % len(sets)] / "train.jsonl"
        jobs.append(f'[[jobs]]\nname = "job{number}"\ndataset = "{file}"\nrank = 16\nlearning_rate = 1e-3\n')
    (scratch / "jobs.toml").write_text("\n".join(jobs))
    words = ["--base_model", "smollm2", "--bits", 4, "--use_cpu", "--config", scratch / "jobs.toml"]
    seconds, _ = ran("multi_lora.py", *words, "--output_dir", scratch / "jobs")
    ended = [json.loads(file.read_text())["outcome"] for file in sorted((scratch / "jobs").glob("*/result.json"))]
    yield f"{JOBS} adapters of rank 16 over one base of 4 bits, 8 steps of 1 example each: {seconds:.0f} seconds, "
    yield f"start and end included; outcomes: {', '.join(sorted(set(ended)))} ({len(ended)})."


def killed(scratch: Path) -> Iterator[str]:
    steps = ["--bits", 4, "--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--cs_interval", 1]
    ran("es_lora_llm.py", *COMMON, scratch / "whole", *steps)
    marker = scratch / "cut" / "checkpoint-2" / "trainer_state.json"
    ran("es_lora_llm.py", *COMMON, scratch / "cut", *steps, kill_at=marker)
    ran("es_lora_llm.py", *COMMON, scratch / "cut", *steps, "--resume_from_checkpoint", "true")
    files = [scratch / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "cut")]
    from safetensors.torch import load_file

    a, b = map(load_file, files)
    equal = sum(a[name].equal(b[name]) for name in a)
    yield "Killed by `kill -9` after step 2 of 4 and resumed: "
    yield f"{equal} of {len(a)} tensors are bit-equal to those of a run that was not."


def merged(run: Path, scratch: Path) -> Iterator[str]:
    seconds, _ = ran("merge_adapter.py", "--adapter", run / "adapter-turning-point", "--output", scratch / "merged")
    yield f"`merge_adapter.py --output`: {seconds:.0f} seconds, with its check against the unmerged logits."


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path)
    parser.add_argument("--mmlu", type=Path)
    parser.add_argument("--speed", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.speed:
        print(json.dumps(speed(arguments.speed)))
        return
    import torch

    scratch = Path(tempfile.mkdtemp())
    run = arguments.run
    sections = {
        "The default run, carried on to its budget": lambda: default_run(run),
        "Memory, speed, CS": speeds,
        "MMLU": lambda: mmlu(run, arguments.mmlu),
        "Answers": lambda: answers(run, scratch),
        "Many adapters": lambda: many(scratch),
        "Resume": lambda: killed(scratch),
        "Merge": lambda: merged(run, scratch),
    }
    able = torch.cpu.get_capabilities()
    units = ", ".join(name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if able.get(name))
    lines = ["# A real model: SmolLM2-135M-Instruct\n", f"Machine: {os.cpu_count()} cores ({units}), no GPU; Python "]
    lines[-1] += f"{platform.python_version()}, torch {torch.__version__}. Made by `real_model.py`.\n"
    for title, section in sections.items():
        lines += [f"## {title}\n", f"    {COMMANDS[title]}\n", *section(), ""]
        print("\n".join(lines[-3:]), flush=True)
        PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
