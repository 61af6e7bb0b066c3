"""Validation with 10% of the examples held out, against shadows and the default, on the runs that
were made for it.

Validation is scored by the held-out loss of its own run, which has trained on 90%: so what the
missing examples cost is counted in. Regret is measured on the scale of the run that trained on
everything.
"""

from dataclasses import replace

import numpy as np
import runs
from scores import Outcomes, decide, outcomes, summary, table
from traces import read_trace, read_traces

from es_lora.rules import DEFAULT_RULE


def twins(model, half):
    """[(trace with shadows, trace with validation)] of the same settings."""
    pairs = []
    for trace in read_traces(model, half, purposes=("shadow",)):
        spec = replace(trace.spec, name=f"{trace.spec.name}-validation", purpose="validation")
        if trace.improves and runs.trace_path(spec).exists():
            pairs.append((trace, read_trace(spec)))
    return pairs


def validated(pairs):
    """Outcomes of early stopping with patience 3 on the examples held out, its cost in examples
    counted in."""
    regrets, kept_epochs, best_epochs, stopped, saved = [], [], [], [], []
    for trace, twin in pairs:
        records = [{**record, "heldout_loss": record["validation_loss"]} for record in twin.records]
        kept = decide(twin, "validation-patience", records=records)
        lowest = trace.losses.min()
        regrets.append((twin.loss_at(kept.step) - lowest) / (trace.losses[0] - lowest))
        kept_epochs.append(max(1, kept.step) / twin.per_epoch)
        best_epochs.append(max(1, trace.best_step) / trace.per_epoch)
        stopped.append(float(kept.stopped))
        saved.append(1 - kept.ended / twin.last_step)
    columns = map(
        np.array, (regrets, kept_epochs, best_epochs, stopped, saved, [trace.spec.dataset for trace, _ in pairs])
    )
    return Outcomes(*columns)


def shadow_results(model, half, tuned):
    """[(name, traces, Outcomes)] on the runs that have shadows and validation; none where no such
    runs are recorded."""
    pairs = twins(model, half)
    if not pairs:
        return []
    full = [trace for trace, _ in pairs]
    rules = [("shadow", "shadow", None), (f"{DEFAULT_RULE} (default)", DEFAULT_RULE, None)]
    rules += [(rule, rule, tuned[rule]) for rule in ("second-valley", "fixed-epochs")]
    rows = [("validation on 10%, patience 3", full, validated(pairs))]
    return rows + [
        (name, full, outcomes(full, [decide(t, rule, value=value) for t in full])) for name, rule, value in rules
    ]


def shadow_table(results):
    if not results:
        return ["No such runs are recorded."]
    runs_scored = len(results[0][1])
    return [f"{runs_scored} runs.", "", *table([(name, summary(outcome)) for name, _, outcome in results])]
