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


def chosen(regrets, sets):
    """(when, width) with the lowest mean of the kinds' means, over the runs of these data sets.
    regrets: {(kind, data set): {(when, width): [regret of each run]}}."""
    kinds = dict.fromkeys(kind for kind, name in regrets if name in sets)

    def mean(choice):
        parts = [
            [r for (k, n), known in regrets.items() if k == kind and n in sets for r in known[choice]] for kind in kinds
        ]
        return float(np.mean([np.mean(part) for part in parts]))

    return min(next(iter(regrets.values())), key=mean)


def left_out(traces, rule):
    """(choice on all sets, mean and 95th percentile when each set is scored by the choice on the
    others)."""
    regrets = {}
    for trace in traces:
        known = regrets.setdefault((trace.spec.model, trace.spec.dataset), {})
        for when, step in stops(trace, rule).items():
            for width in WIDTHS:
                known.setdefault((when, width), []).append(trace.regret(step, width))
    sets, found = {name for _, name in regrets}, []
    for kind, name in regrets:
        found += regrets[kind, name][chosen(regrets, sets - {name})]
    return chosen(regrets, sets), float(np.mean(found)), float(np.quantile(found, 0.95))


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
    print("\nChosen with each data set left out in turn:\n")
    everything = [trace for trace in read_traces(half=arguments.half, anew=True) if trace.improves]
    for schedule in ("constant", "cosine"):
        (when, width), mean, high = left_out([t for t in everything if t.spec.schedule == schedule], arguments.rule)
        print(f"{schedule}: {when} times, width {width}; mean regret {mean:.3f}, 95th percentile {high:.2f}")


if __name__ == "__main__":
    main()
