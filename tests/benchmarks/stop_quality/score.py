"""Replay every rule on the recorded runs; write the tables (results.md) and the pictures (plots/).

    python score.py                  # the tuning half; the numbers of the rules are tuned on it
    python score.py --half test      # the test half, with the numbers from the tuning half

Reads traces/ only: no training, under five minutes. In the language-model environment, with
lora-llm/ on PYTHONPATH.
"""

import argparse
import json

import numpy as np
from contestants import DRAWS, RATE_SUMS, by_rule, contestants, sum_of_rates, values_tried
from runs import HERE
from scores import decide, outcomes, summary, table
from shadow_scores import shadow_results, shadow_table
from traces import read_traces
from worst_runs import draw_worst

from es_lora.rules import DEFAULT_RULE, RULES

MODELS = ("text", "image")
SEED = 0
TUNED = HERE / "tuned.json"  # what the tuning half chose; the test half reads it
REPLAYED = [rule for rule in RULES if not {"heldout_loss", "shadow_loss"}.intersection(RULES[rule].needs)]


def usable(traces):
    return [trace for trace in traces if trace.improves]


def run_contestant(contestant, traces):
    """Outcomes of a contestant; a null with draws is drawn several times on each run."""
    generator = np.random.default_rng(SEED)
    repeated = [trace for trace in traces for _ in range(DRAWS if " on " in contestant.name else 1)]
    return outcomes(repeated, [contestant.keep(trace, generator) for trace in repeated])


# ------------------------------------------------------------------------------------------- tuning


def candidates():
    """{rule: [(number, keep)]} of what can be tuned or chosen as the default."""
    found = {rule: [(value, by_rule(rule, value=value)) for value in values_tried(rule)] for rule in REPLAYED}
    found["sum of rates"] = [(total, sum_of_rates(total)) for total in RATE_SUMS]
    return found


def tune(traces_of):
    """({rule: number} with the lowest mean regret over both kinds, rows of the leave-one-set-out
    table)."""
    sets = sorted({trace.spec.dataset for traces in traces_of.values() for trace in traces})
    tuned, rows = {}, []
    for rule, options in candidates().items():
        regrets = {value: {name: [] for name in sets} for value, _ in options}  # of the runs of each set
        for value, keep in options:
            for traces in traces_of.values():
                for trace in traces:
                    regrets[value][trace.spec.dataset].append(trace.regret(keep(trace, None).step))
        kind_of = {trace.spec.dataset: model for model, traces in traces_of.items() for trace in traces}

        def mean_without(value, left_out, regrets=regrets, kind_of=kind_of):
            by_kind = [
                [r for name in sets if name != left_out and kind_of[name] == model for r in regrets[value][name]]
                for model in traces_of
            ]
            return float(np.mean([np.mean(values) for values in by_kind]))

        best = min(regrets, key=lambda value: mean_without(value, None))
        left_out = {name: regrets[min(regrets, key=lambda v, n=name: mean_without(v, n))][name] for name in sets}
        by_kind = {model: [r for name in sets if kind_of[name] == model for r in left_out[name]] for model in traces_of}
        means = {model: float(np.mean(values)) for model, values in by_kind.items()}
        tuned[rule] = best
        rows.append((float(np.mean(list(means.values()))), rule, best, means))
    return tuned, sorted(rows, key=lambda row: row[0])


def tuning_table(rows):
    lines = ["| rule | number chosen | text | image | mean of both |", "|---|---|---|---|---|"]
    for mean, rule, best, means in rows:
        figures = " | ".join(f"{means[model]:.3f}" for model in MODELS)
        lines.append(f"| {rule} | {'' if best is None else f'{best:g}'} | {figures} | {mean:.3f} |")
    return lines


# ------------------------------------------------------------------------------------------- tables


def main_table(traces, tuned):
    results = [(one, run_contestant(one, traces)) for one in contestants(traces, tuned, DEFAULT_RULE)]
    return [(one.name, summary(result)) for one, result in results], results


def never_overfits(traces):
    return [trace for trace in traces if trace.best_step >= 0.95 * trace.last_step]


def alarm_table(traces, tuned):
    """What the rules do on runs whose held-out loss is lowest at the very end."""
    calm = never_overfits(traces)
    lines = [f"{len(calm)} runs.", "", "| rule | stops | mean regret |", "|---|---|---|"]
    for rule in REPLAYED:
        kept = [decide(trace, rule, value=tuned[rule]) for trace in calm]
        if kept:
            regrets = [trace.regret(one.step) for trace, one in zip(calm, kept)]
            lines.append(f"| {rule} | {np.mean([one.stopped for one in kept]):.2f} | {np.mean(regrets):.3f} |")
    return lines


def sensitivity_rows(traces):
    """second-valley under other N, windows, intervals, reductions and components: [(name,
    Outcomes)]."""
    rows = [(f"N = {n}", {"rule": "nth-valley", "value": n}) for n in (1, 2, 3, 4, 5)]
    for factor in (0.25, 0.5, 1, 2, 4):
        rows.append((f"M = {factor:g} epochs", {"rule": "second-valley", "window": lambda m, f=factor: round(f * m)}))
    rows += [(f"every {n}. measurement", {"rule": "second-valley", "interval": n}) for n in (1, 2, 4)]
    for reduction in ("row", "matrix"):
        rows.append((f"{reduction} cosine", {"rule": "second-valley", "column": f"cs_{reduction}"}))
    rows.append(("component all", {"rule": "second-valley", "component": "all"}))
    for name, settings in rows:
        column, rule = settings.pop("column", "cs"), settings.pop("rule")
        thinned = settings.get("interval", 1)
        kept = []
        for trace in traces:
            records = [{**record, "cs": record[column]} for record in trace.records[thinned - 1 :: thinned]]
            kept.append(decide(trace, rule, records=records, **settings))
        yield name, outcomes(traces, kept)


# ----------------------------------------------------------------------------------------- the page


def tables_of(half, tuned):
    lines = []
    for model in MODELS:
        traces = read_traces(model, half)
        improving = usable(traces)
        lines += [
            f"### {model.capitalize()} runs",
            "",
            f"{len(traces)} runs; {len(traces) - len(improving)} of them never fall ",
        ]
        lines[-1] += "below the held-out loss of step 0 and are left out of what follows."
        rows, results = main_table(improving, tuned)
        lines += ["", *table(rows), "", "Runs whose held-out loss is lowest at the end of their budget:", ""]
        lines += alarm_table(improving, tuned)
        lines += [
            "",
            "Sensitivity of second-valley:",
            "",
            *table([(n, summary(o)) for n, o in sensitivity_rows(improving)]),
            "",
        ]
        beside = shadow_results(model, half, tuned)
        lines += ["Validation and shadows, on the runs that have both:", "", *shadow_table(beside), ""]
        pictures = [(one.name, improving, result) for one, result in results if not one.is_null]
        pictures += [row for row in beside if row[0] == "shadow"]
        draw_worst(HERE / "plots" / f"worst_{half}_{model}.png", pictures)
        lines += [f"![The worst five runs of each rule](plots/worst_{half}_{model}.png)", ""]
    return lines


def write_part(half, lines):
    """Replace one half's part of results.md."""
    page = HERE / "results.md"
    parts = json.loads((HERE / "results.json").read_text()) if (HERE / "results.json").exists() else {}
    parts[half] = lines
    (HERE / "results.json").write_text(json.dumps(parts, indent=0) + "\n", encoding="utf-8")
    text = [line for name in ("tuning", "test") for line in parts.get(name, [])]
    head = "# Results\n\nWritten by score.py; README.md says what the columns mean.\n\n"
    page.write_text(head + "\n".join(text) + "\n", encoding="utf-8")
    print(f"{page} is written.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("tuning", "test"), default="tuning")
    half = parser.parse_args().half
    title = {"tuning": "## Tuning half", "test": "## Test half (looked at once, after the default had been chosen)"}[
        half
    ]
    lines = [title, ""]
    if half == "tuning":
        tuned, rows = tune({model: usable(read_traces(model, "tuning")) for model in MODELS})
        TUNED.write_text(json.dumps(tuned, indent=1) + "\n", encoding="utf-8")
        lines += [
            "Mean regret when each data set is scored with the number chosen on the others:",
            "",
            *tuning_table(rows),
            "",
        ]
    tuned = json.loads(TUNED.read_text(encoding="utf-8"))
    write_part(half, lines + tables_of(half, tuned))


if __name__ == "__main__":
    main()
