"""Record the runs of the suite that have no trace in traces_anew/ yet; what has one is left alone.

    python record_runs.py                                   # all of them: hours on two CPU cores
    python record_runs.py text-kitchen_notes-embedded-3     # these, anew
    python record_runs.py --model image --half tuning --purpose record --workers 1

Needs the environments .venv-llm and .venv-ldm of the project (bash tests/run.sh makes both). Traces
go to traces_anew/ as they finish, what the trainers say to cache/logs/. Runs on the larger base are
left out until larger_base.py has built it.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from runs import CACHE, HERE, ROOT, RUNS, TRACES_ANEW, trace_path
from tqdm import tqdm

RUNS_A_PROCESS = 6  # loading the libraries takes as long as a short run
TREES = {"text": ("llm", "record_text.py"), "image": ("ldm", "record_image.py")}


def record(specs):
    """Record some runs of one tree in an interpreter of its environment; the names of those that
    failed."""
    tree, script = TREES[specs[0].model]
    log = CACHE / "logs" / f"{specs[0].name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / f"lora-{tree}"), str(HERE)]),
    }
    command = [str(ROOT / f".venv-{tree}" / "bin" / "python"), str(HERE / script), *(spec.name for spec in specs)]
    with open(log, "w", encoding="utf-8") as handle:
        subprocess.run(command, env=environment, stdout=handle, stderr=subprocess.STDOUT)
    return [f"{spec.name} left no trace; see {log}" for spec in specs if not trace_path(spec, anew=True).exists()]


def chosen_runs(arguments):
    if arguments.names:
        return [RUNS[name] for name in arguments.names]
    wanted = {name: getattr(arguments, name) for name in ("model", "half", "purpose", "base")}
    fits = [
        spec
        for spec in RUNS.values()
        if all(not value or getattr(spec, name) in value for name, value in wanted.items())
    ]
    return [spec for spec in fits if not trace_path(spec, anew=True).exists()]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *RUNS], metavar="RUN", help="runs to record anew, by name")
    for name in ("model", "half", "purpose", "base"):
        parser.add_argument(f"--{name}", nargs="*", choices=sorted({getattr(spec, name) for spec in RUNS.values()}))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each (default: %(default)s)")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    runs = chosen_runs(arguments)
    if not (CACHE / "larger_base").is_dir():
        runs = [spec for spec in runs if spec.base != "larger"]
    for spec in runs:
        trace_path(spec, anew=True).unlink(missing_ok=True)
    portions = [
        same[start : start + RUNS_A_PROCESS]
        for model in TREES
        for same in [[spec for spec in runs if spec.model == model]]
        for start in range(0, len(same), RUNS_A_PROCESS)
    ]
    failures = []
    with ThreadPoolExecutor(arguments.workers) as pool, tqdm(total=len(runs), unit="run") as bar:
        for portion, failed in zip(portions, pool.map(record, portions)):
            bar.update(len(portion))
            failures += failed
    print("\n".join([f"Traces are in {TRACES_ANEW}.", *failures]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
