"""Many LoRA adapters at once over one frozen base, each with its own data and turning point.

    python multi_lora.py --base_model FOLDER --config jobs.toml --output_dir OUTPUT

In Python:

    from jobs.config import Job
    from multi_lora import train_jobs
    overview = train_jobs([Job("a", dataset="a.jsonl"), Job("b", dataset="b.jsonl", rank=8)],
        "FOLDER", "OUTPUT", bits=4)

Each job leaves in OUTPUT/NAME what a single run leaves; OUTPUT/overview.html lists all. Examples of
jobs.toml lie in templates/. Several processes (torchrun, accelerate launch) share the jobs.

Exit codes: 0 every job trained to its budget or stopped early; 2 bad arguments or configuration, or
a job that could not be trained (the others were); 3 a job diverged (the others went on); 130
interrupted (state saved; --resume goes on).
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Callable, Optional, Union

import quiet_libraries  # noqa: F401  (first, before the libraries speak)
import torch

from base.layers import linear_layers, linear_shape, positions_of
from base.loading import compute_dtype, fit_embeddings, load_base, load_tokenizer
from base.origin import local_base
from base.spec import BaseSpec
from es_lora.command_line import (
    command_line,
    fault_of_machine,
    last_state_named,
    nearest,
    reported,
    truth,
    without_flag,
)
from es_lora.files import refuse_in_the_way
from es_lora.folder_lock import LOCK_NAME, locked
from es_lora.inputs.bounds import number, whole
from es_lora.outcome import RESULT_NAME
from jobs.config import Job, folder_key, read_jobs
from jobs.data import JobData, prepare_job
from jobs.loop import FusedTraining, finished_result, job_result, memory_need, refused_result
from jobs.overview import write_overview
from jobs.processes import Processes
from jobs.scheduler import PASS_TOKENS, Limits, MemoryNeed, token_bytes
from jobs.states import ROUND_NAME, SavedRound, clear_ended, earlier_round, last_state, read_round
from training.results import next_commands

__all__ = ["Job", "main", "train_jobs"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the run; every state is saved."""


def train_jobs(
    jobs: Sequence[Job],
    base_model: Union[str, Path],
    output_dir: Union[str, Path],
    *,
    bits: int = 4,
    max_rows: int = 32,
    max_jobs: int = 16,
    memory_gb: Optional[float] = None,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    use_cpu: bool = False,
    data_parallel: Optional[bool] = None,
    save_minutes: float = 10.0,
    resume: bool = False,
    cache_dir: Optional[str] = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train all jobs over one base; -> overview {"summary", "chosen", "jobs": [result, ...]}.

    bits: 4, 8, 16 or 32, of the frozen base. max_rows: rows a pass; max_jobs: adapters that train
    at once; memory_gb: estimated memory of base, adapters and activations together. data_parallel:
    with several processes, all train every job together; None: where there are fewer jobs than
    processes. save_minutes: how often everything is saved for --resume. A job that cannot be
    trained (its data, its name) is refused, told and listed, and the others are trained. Raises
    ValueError, FileNotFoundError or FileExistsError where nothing can be trained, Interrupted after
    Ctrl-C."""
    started, output_dir = time.monotonic(), Path(output_dir)
    _check_run(jobs, output_dir, bits, max_rows, max_jobs, resume)
    use_cpu = use_cpu or not torch.accelerator.is_available()
    together = data_parallel if data_parallel is not None else len(jobs) < int(os.environ.get("WORLD_SIZE", "1"))
    processes = Processes(use_cpu, together)
    say = say if processes.is_first or not processes.together else lambda text: None
    spec = BaseSpec(
        _fetched(str(base_model), bits, cache_dir, processes),
        bits,
        compute=compute_dtype(bf16, fp16=False),
        device=None if use_cpu else processes.device,
        checkpointing={"use_reentrant": False} if gradient_checkpointing else None,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
    )
    tokenizer, base = _frozen_base(spec, processes.device)
    facts = {"model": spec.name, "bits": bits}
    limits = _limits(base, max_rows, max_jobs, memory_gb, gradient_checkpointing)
    say_once = say if processes.is_first else lambda text: None
    ready, refused = _prepare(jobs, base, tokenizer, limits, cache_dir, say_once)
    options = {"precision": torch.bfloat16 if bf16 else None, "save_minutes": save_minutes, "say": say}
    training = FusedTraining(base, tokenizer, output_dir, processes, limits, facts=facts, **options)
    _train_the_rest(training, ready, resume)
    processes.wait()
    results = [job_result(output_dir / data.job.name) for data, _ in ready] + refused
    overview = {"jobs": results}
    if processes.is_first:
        overview = write_overview(output_dir, results, time.monotonic() - started, facts)
    processes.wait()
    return overview


def _fetched(name: str, bits: int, cache_dir: Optional[str], processes: Processes) -> str:
    """The base as a folder that can be loaded; one process converts it, the others wait."""
    with processes.first_one_first():
        return local_base(name, torch.float32 if bits == 32 else torch.bfloat16, cache_dir=cache_dir)


def _frozen_base(spec: BaseSpec, device: torch.device) -> tuple[Any, torch.nn.Module]:
    """(tokenizer, base on its device, nothing of it trained)."""
    tokenizer, base = load_tokenizer(spec), load_base(spec)
    fit_embeddings(base, tokenizer)
    if spec.bits in (16, 32):
        base.to(device)
    return tokenizer, base.requires_grad_(False)


def _train_the_rest(training: FusedTraining, ready: Sequence[tuple[JobData, MemoryNeed]], resume: bool) -> None:
    """Train this process's share of the jobs that no earlier run finished. Raises Interrupted."""
    output_dir, names = training.output_dir, [data.job.name for data, _ in ready]
    saved = _saved_round(training, names) if resume else None
    done = [name for name in saved.ended if finished_result(output_dir / name)] if saved else []
    to_train = [(data, need) for data, need in ready if data.job.name not in done]
    output_dir.mkdir(parents=True, exist_ok=True)
    if training.processes.is_first:
        for name in done:
            clear_ended(output_dir / name)
    training.processes.wait()  # all have read the round before any of them saves another
    costs = [data.total_steps * data.job.batch_size * data.job.accumulation for data, _ in to_train]
    own = training.processes.own_jobs(costs)
    if not training.train([to_train[index] for index in own], saved):
        raise Interrupted(f"interrupted; everything needed to go on is saved in {output_dir}")


def _saved_round(training: FusedTraining, names: Sequence[str]) -> SavedRound:
    """The round that the run in the output folder goes on from, of jobs that are asked for."""
    output_dir, processes = training.output_dir, training.processes
    saved = processes.heard(read_round(output_dir, processes.index) or earlier_round(output_dir, names, RESULT_NAME))
    saved.active = {name: number for name, number in saved.active.items() if name in names}
    saved.ended = [name for name in saved.ended if name in names]
    return saved


def _check_run(jobs: Sequence[Job], output_dir: Path, bits: int, max_rows: int, max_jobs: int, resume: bool) -> None:
    problems = []
    if not jobs:
        problems.append("there is no job to train")
    if bits not in (4, 8, 16, 32):
        problems.append(f"--bits {bits}: choose 4, 8, 16 or 32")
    for name, value in (("max_rows", max_rows), ("max_jobs", max_jobs)):
        if value < 1:
            problems.append(f"--{name} {value}: must be at least 1")
    largest = max(jobs, key=lambda job: job.batch_size, default=None)
    if largest is not None and max_rows >= 1 and largest.batch_size > max_rows:
        problems.append(
            f"job {largest.name}: batch_size {largest.batch_size} is above --max_rows {max_rows}; raise --max_rows, or "
            "lower batch_size and raise accumulation"
        )
    if problems:
        raise ValueError("; ".join(problems))
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"--output_dir {output_dir} is a file: choose a folder")
    refuse_in_the_way(output_dir, ("overview.html", "overview.json", ROUND_NAME), [job.name for job in jobs])
    if output_dir.is_dir() and any(path.name != LOCK_NAME for path in output_dir.iterdir()) and not resume:
        raise FileExistsError(
            f"--output_dir {output_dir} is not empty: choose a new folder, or go on with its run by --resume"
        )


def _limits(base: Any, max_rows: int, max_jobs: int, memory_gb: Optional[float], checkpointing: bool) -> Limits:
    pass_tokens = PASS_TOKENS["cpu" if base.device.type == "cpu" else "cuda"]
    if memory_gb is None:
        return Limits(max_rows, max_jobs, pass_tokens=pass_tokens)
    base_bytes = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    sizes = [linear_shape(layer) for layer in linear_layers(base).values()]
    free = memory_gb * 1e9 - base_bytes
    if free <= 0:
        raise ValueError(
            f"--memory_gb {memory_gb:g}: the base alone takes {base_bytes / 1e9:.2f} GB; raise it or lower --bits"
        )
    return Limits(max_rows, max_jobs, free, token_bytes(base, sizes, checkpointing), pass_tokens)


def _prepare(
    jobs: Sequence[Job], base: Any, tokenizer: Any, limits: Limits, cache_dir: Optional[str], say: Callable[[str], None]
) -> tuple[list[tuple[JobData, MemoryNeed]], list[dict[str, Any]]]:
    """(jobs to train, results of those that cannot be). Raises ValueError where none can."""
    ready: list[tuple[JobData, MemoryNeed]] = []
    refused: list[dict[str, Any]] = []
    for job in jobs:
        try:
            if folder_key(job.name) in [folder_key(data.job.name) for data, _ in ready]:
                raise ValueError("another job has this name already; give each a name of its own")
            data = prepare_job(job, tokenizer, cache_dir, positions_of(base))
            need = memory_need(base, data)
            if not limits.fit([need]):
                size = f"{(need.adapter_bytes + need.tokens * limits.token_bytes) / 1e9:.2f} GB"
                raise ValueError(
                    f"it needs about {size} beside the base, more than --memory_gb leaves; lower batch_size"
                )
            ready.append((data, need))
        except (ValueError, OSError) as error:
            if fault_of_machine(error) is not None:
                raise
            say(f"{job.name}: not trained: {error}")
            refused.append(refused_result(job, str(error)))
    if not ready:
        raise ValueError(
            "no job can be trained: " + "; ".join(f"{entry['name']}: {entry['reason']}" for entry in refused)
        )
    return ready, refused


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"multi_lora: {message}; see --help\n")


def build_parser() -> argparse.ArgumentParser:
    switch = {"type": truth, "nargs": "?", "const": True, "default": False}
    parser = Parser(
        description="Many LoRA adapters at once over one frozen base, each stopped at its own turning point.",
        epilog="The jobs file is described in jobs/config.py; three that run as they are lie in templates/.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    base = "folder in Hugging Face format, hub name, GGUF file, or smollm2"
    add("--base_model", "--model_name_or_path", required=True, help=base)
    add("--config", required=True, help="the jobs: a toml, yaml or json file")
    add("--output_dir", default="./output", help="where everything goes; a new folder for every run")
    add("--bits", type=int, default=None, help="bits of the frozen base: 4 (the default), 8, 16 or 32")
    add("--load_4bit", help="the same as --bits 4", **switch)
    add("--load_8bit", help="the same as --bits 8", **switch)
    add("--bf16", help="compute in bf16", **switch)
    add("--gradient_checkpointing", help="recompute activations to save memory", **switch)
    add("--max_rows", type=whole(1), default=32, help="examples in one pass, of all jobs together (default 32)")
    add("--max_jobs", type=whole(1), default=16, help="adapters that train at once; others wait (default 16)")
    add("--memory_gb", type=number(), help="bound on the estimated memory of base, adapters and activations, in GB")
    together = "several processes train every job together; default: only where there are fewer jobs than processes"
    add("--data_parallel", **{**switch, "default": None}, help=together)
    add(
        "--save_minutes",
        type=number(zero=True),
        default=10.0,
        help="save everything for --resume so often (default 10)",
    )
    add("--resume", help="go on with the run in --output_dir", **switch)
    add("--use_cpu", help="train on the CPU even where there is a GPU", **switch)
    add("--cache_dir", default=None, help="where hub downloads are kept")
    add("--trust_remote_code", help="run code that comes with the base model (only if you trust its authors)", **switch)
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse; bits resolved. Raises ValueError for an unknown flag and for contradicting bits."""
    parser = build_parser()
    known = [option for action in parser._actions for option in action.option_strings]
    problems = []
    for word in (word.split("=")[0] for word in argv if word.startswith("--")):
        if word not in known:
            problems.append(f"{word} is unknown{nearest(word, known)}")
    if problems:
        raise ValueError("; ".join(problems))
    arguments = parser.parse_args(argv)
    said = {
        bits
        for bits, flag in ((4, arguments.load_4bit), (8, arguments.load_8bit), (arguments.bits, arguments.bits))
        if flag
    }
    if len(said) > 1:
        raise ValueError("--bits, --load_4bit and --load_8bit contradict each other: give one of them")
    arguments.bits = said.pop() if said else 4
    return arguments


def main(argv: Optional[Sequence[str]] = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    return reported("multi_lora", lambda: _run(argv))


def _run(argv: list[str]) -> int:
    options = vars(parse_arguments(argv))
    jobs = read_jobs(options.pop("config"))
    output_dir = Path(options["output_dir"])
    options = {name: value for name, value in options.items() if name not in ("load_4bit", "load_8bit")}
    words = [*without_flag(argv, "--resume"), "--resume", "true"]
    go_on = command_line(sys.executable, Path(__file__).resolve(), words)
    try:
        with _held(output_dir, options["resume"]), last_state_named(lambda: _how_to_go_on(output_dir, go_on)):
            overview = train_jobs(jobs, **options)
    except Interrupted as error:
        print(f"\n{error}\ngo on:  {go_on}")
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if "summary" in overview:
        _last_words(overview, output_dir)
    outcomes = {result["outcome"] for result in overview["jobs"]}
    return 3 if "diverged" in outcomes else 2 if "refused" in outcomes else 0


def _held(output_dir: Path, resume: bool) -> AbstractContextManager:
    """The output folder for this run alone; of several processes the first one holds it."""
    if int(os.environ.get("RANK", "0")) or (output_dir.exists() and not output_dir.is_dir()):
        return nullcontext()
    if output_dir.is_dir() and any(path.name != LOCK_NAME for path in output_dir.iterdir()) and not resume:
        return nullcontext()  # it is refused
    return locked(output_dir, "multi_lora")


def _how_to_go_on(output_dir: Path, command: str) -> str:
    """What is said of the newest whole state when the machine has failed."""
    told = last_state(output_dir)
    return f"{told} Go on with: {command}" if told else "Nothing has been saved: start anew."


def _last_words(overview: dict[str, Any], output_dir: Path) -> None:
    print(f"\n{overview['summary']}")
    for result in overview["jobs"]:
        if result["outcome"] == "refused":
            print(f"{result['name']}: not trained: {result['reason']}")
    for group, choice in overview["chosen"].items():
        print(f"{group}: {choice['name'] or 'none chosen'}: {choice['reason']}.")
    print(f"overview: {output_dir.resolve() / 'overview.html'}")
    best = [choice["name"] for choice in overview["chosen"].values() if choice["name"]]
    kept = best or [result["name"] for result in overview["jobs"] if result.get("files")]
    for name in kept[:1]:
        for what, command in next_commands(
            "stopped_early", output_dir.resolve() / name, Path(__file__).resolve(), []
        ).items():
            print(f"{what}: {command}")


if __name__ == "__main__":
    sys.exit(main())
