"""A grid of 3 ranks x 3 learning rates on the kitchen notes: what each job keeps, which one is
chosen, what the stops saved.

    .venv-llm/bin/python tests/benchmarks/multi_lora_grid.py [--examples 16] [--epochs 8]

Runs templates/one_domain_many_settings.toml on the embedded base in 32 bits and writes
multi_lora_grid.md.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
TREE, PAGE = ROOT / "lora-llm", Path(__file__).with_suffix(".md")
sys.path[:0] = [str(TREE), str(Path(__file__).parent)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    from llm_cs_cost import machine
    from multi_lora import train_jobs

    from jobs.config import read_jobs
    from jobs.overview import choose, kept_loss

    cut = {
        "max_train_samples": arguments.examples,
        "epochs": arguments.epochs,
        "source_max_len": 32,
        "target_max_len": 32,
    }
    cut |= {"batch_size": 4, "max_eval_samples": 20}  # minutes on one core
    jobs = [replace(job, **cut) for job in read_jobs(TREE / "templates" / "one_domain_many_settings.toml")]

    def trained(jobs):
        """(overview, seconds of processor time) of all jobs in one run."""
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            overview = train_jobs(jobs, TREE / "tiny_base", Path(folder) / "out", bits=32, use_cpu=True, max_rows=72)
        return overview, time.process_time() - started

    overview, seconds = trained(jobs)
    _, full_seconds = trained([replace(job, early_stop=False) for job in jobs])
    results = overview["jobs"]
    lines = ["| rank | learning rate | stopped at | kept | held-out loss before | kept | last |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for result in results:
        settings, heldout = result["settings"], result["heldout"]
        loss = {key: "" if value is None else f"{value:.3f}" for key, value in heldout.items()}
        cells = [
            str(settings["rank"]),
            f"{settings['learning_rate']:g}",
            f"{result['last_step']} of {result['total_steps']}",
        ]
        cells += [str(result["files"]["kept"]["step"]), loss["before"], loss.get("kept", ""), loss["last"]]
        lines.append("| " + " | ".join(cells) + " |")
    kept = {result["name"]: kept_loss(result) for result in results}
    losses = list(kept.values())
    by_verdict = choose([{**result, "heldout": {}} for result in results])
    steps, budget = sum(r["last_step"] for r in results), sum(r["total_steps"] for r in results)
    stopped = sum(result["outcome"] == "stopped_early" for result in results)
    chosen = overview["chosen"]["kitchen"]
    command = " ".join(["tests/benchmarks/multi_lora_grid.py", *sys.argv[1:]])
    page = [
        "# A grid, chosen by itself",
        "",
        f"Made by `.venv-llm/bin/python {command}`, which writes this page.",
        "",
        f"Machine: {machine()}",
        f"Embedded base in 32 bits; {arguments.examples} of the kitchen notes to train on, at most 64 tokens each, "
        "batch 4,"
        f" a budget of {arguments.epochs} epochs; all nine adapters in one run. 20 of its held-out examples.",
        "",
        *lines,
        "",
        f"- Stopped on their own: {stopped} of {len(results)}.",
        f"- Chosen, by held-out loss: {chosen['name']}. Kept held-out losses: best {min(losses):.3f}, median"
        f" {statistics.median(losses):.3f}, worst {max(losses):.3f}.",
        f"- Without the held-out examples the verdicts would have chosen {by_verdict[0]['name']}"
        f" ({kept[by_verdict[0]['name']]:.3f})."
        if by_verdict
        else "- Without the held-out examples none would have been chosen.",
        "  That way of choosing (the longest until its turning point) was settled after looking at this grid: no test "
        "of it.",
        f"- Steps: {steps} of {budget}, {100 * steps / budget:.0f}% of training each to its full budget. Processor "
        "time, scoring"
        f" and measuring included: {seconds:.0f} s, to the full budgets {full_seconds:.0f} s "
        f"({seconds / full_seconds:.2f}).",
        "",
    ]
    PAGE.write_text("\n".join(page), encoding="utf-8")
    print("\n".join(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
