"""Validation with 10% of the examples held out, against shadows and the default, on the runs that were made for it.

Validation is scored by the held-out loss of its own run, which has trained on 90%: so what the missing examples cost is counted
in. Regret is measured on the scale of the run that trained on everything.
"""

from dataclasses import replace

import numpy as np
import runs
from scores import Outcomes, decide, outcomes, summary, table
from stop_rules import DEFAULT_RULE
from traces import read_trace, read_traces


def twins(model, half):
    """[(trace with shadows, trace with validation)] of the same settings."""
    pairs = []
    for trace in read_traces(model, half, purposes=("shadow",)):
        spec = replace(trace.spec, name=f"{trace.spec.name}-validation", purpose="validation")
        if trace.improves and runs.trace_path(spec).exists():
            pairs.append((trace, read_trace(spec)))
    return pairs


def validated(pairs):
    """Outcomes of early stopping with patience 3 on the examples held out, its cost in examples counted in."""
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
    columns = map(np.array, (regrets, kept_epochs, best_epochs, stopped, saved, [trace.spec.dataset for trace, _ in pairs]))
    return Outcomes(*columns)


def shadow_pictures(model, half):
    """What draw_worst takes: the rule `shadow` on its runs; no row where none is recorded."""
    full = [trace for trace, _ in twins(model, half)]
    return [("shadow", full, outcomes(full, [decide(t, "shadow") for t in full]))] if full else []


def shadow_table(model, half, tuned):
    pairs = twins(model, half)
    if not pairs:
        return ["No such runs are recorded."]
    full = [trace for trace, _ in pairs]
    rows = [("validation on 10%, patience 3", validated(pairs)), ("shadow", outcomes(full, [decide(t, "shadow") for t in full]))]
    rows.append((f"{DEFAULT_RULE} (default)", outcomes(full, [decide(t, DEFAULT_RULE) for t in full])))
    for rule in ("second-valley", "fixed-epochs"):
        rows.append((rule, outcomes(full, [decide(t, rule, value=tuned[rule]) for t in full])))
    return [f"{len(pairs)} runs.", "", *table([(name, summary(result)) for name, result in rows])]
