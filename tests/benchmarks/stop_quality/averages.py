"""What averages of the weights are worth: regrets of single steps and of averages, when a rule says
stop, some time later, and at the end of the budget.

    PYTHONPATH=../../../lora-llm ../../../.venv-llm/bin/python averages.py [--half tuning]

Prints the tables of the runs in traces_anew/. Constant and decaying rates are apart: an average
need not reach back over steps at a much higher rate."""

import argparse

import numpy as np
from scores import decide
from traces import read_traces

from es_lora.rules import DEFAULT_RULE

LATER = (1.0, 1.25, 1.5, 2.0, 3.0)  # times as many steps as the rule's own stop
WIDTHS = ("0", "0.1", "0.25", "0.4")


def stops(trace, rule):
    """{how much later: step}, "end" the last one; a stop beyond the budget is its end."""
    kept = decide(trace, rule)
    found = {f"{factor:g}": min(factor * kept.step, trace.last_step) for factor in LATER}
    return {**found, "end": trace.last_step}


def rows_of(traces, rule):
    """[(when, [(mean, 95th percentile) of each width])]."""
    regrets = {}
    for trace in traces:
        for when, step in stops(trace, rule).items():
            for width in WIDTHS:
                regrets.setdefault((when, width), []).append(trace.regret(step, width))
    whens = dict.fromkeys(when for when, _ in regrets)
    cells = {key: (float(np.mean(values)), float(np.quantile(values, 0.95))) for key, values in regrets.items()}
    return [(when, [cells[when, width] for width in WIDTHS]) for when in whens]


def table(traces, rule):
    lines = [f"| {rule}, times as many steps | " + " | ".join(["single step", *WIDTHS[1:]]) + " |"]
    lines.append("|---" * (len(WIDTHS) + 1) + "|")
    for when, cells in rows_of(traces, rule):
        lines.append(f"| {when} | " + " | ".join(f"{mean:.3f} ({high:.2f})" for mean, high in cells) + " |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("tuning", "test"), help="one of them; without it both")
    parser.add_argument("--rule", default=DEFAULT_RULE)
    arguments = parser.parse_args()
    for model in ("text", "image"):
        recorded = [trace for trace in read_traces(model, arguments.half, anew=True) if trace.improves]
        for schedule in ("constant", "cosine"):
            traces = [trace for trace in recorded if trace.spec.schedule == schedule]
            print(f"\n{model}, {schedule}: {len(traces)} runs; mean regret (95th percentile)\n")
            if traces:
                print("\n".join(table(traces, arguments.rule)))


if __name__ == "__main__":
    main()
