"""What is compared: every rule of the registry, the clocks, and the nulls that a rule has to beat.

A contestant takes a trace and a random generator and gives a Kept. Numbers that a rule has are
tuned on the tuning half.
"""

from dataclasses import dataclass
from typing import Callable

import baselines  # noqa: F401  (registers the rules that lose)
import numpy as np
from scores import Kept, decide

REPLACED = ("cs", "cs_row", "cs_matrix", "grad_evidence")  # the columns that a null puts something else in place of
DRAWS = 5  # of each null on each run


@dataclass(frozen=True)
class Contestant:
    name: str
    keep: Callable
    is_null: bool = False


def values_tried(rule):
    """The numbers that are tried for a rule on the tuning half."""
    return {
        "fixed-epochs": (0.5, 1, 1.5, 2, 3, 4, 5, 8),
        "gradient-evidence": (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0),
        "cs-fall": (0.5, 0.6, 0.7, 0.8, 0.9),
        "cs-trough": (0.5, 0.6, 0.7, 0.8, 0.9),
        "update-norm-plateau": (0.05, 0.1, 0.2, 0.3, 0.4, 0.6),
        "objective-variance": (0.05, 0.15, 0.3, 0.6),
    }.get(rule, (None,))


RATE_SUMS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)


def by_rule(rule, **settings):
    return lambda trace, generator: decide(trace, rule, **settings)


def never(trace, generator):
    return Kept(trace.last_step, trace.last_step, False)


def sum_of_rates(total):
    """A clock that knows the schedule: stops when the learning rates of the steps add up to
    `total`."""

    def keep(trace, generator):
        rates = np.array([record["lr"] for record in trace.records]) * trace.header["cs_interval"]
        over = np.flatnonzero(np.cumsum(rates) >= total)
        step = trace.records[over[0]]["step"] if len(over) else trace.last_step
        return Kept(step, step, bool(len(over)))

    return keep


def replaced(trace, series):
    """The records with other values in the columns of REPLACED. series: takes a column's own
    values, (K,), gives others."""

    def numbers(column, key=None):
        return [
            None if record[column] is None else record[column][key] if key else record[column]
            for record in trace.records
        ]

    new = {}
    for column in REPLACED:
        keys = list(trace.records[0][column]) if isinstance(trace.records[0][column], dict) else [None]
        for key in keys:
            values = numbers(column, key)
            known = [index for index, value in enumerate(values) if value is not None]
            for index, value in zip(known, series(np.array([values[index] for index in known]), column, key, known)):
                values[index] = float(value)
            new[column, key] = values

    def changed(record, column, index):
        own = record[column]
        return {key: new[column, key][index] for key in own} if isinstance(own, dict) else new[column, None][index]

    return [
        {**record, **{column: changed(record, column, index) for column in REPLACED}}
        for index, record in enumerate(trace.records)
    ]


def random_walk(rule):
    """The rule on walks that start like the run's own signals and move by as much from one
    measurement to the next."""

    def keep(trace, generator):
        def walk(values, *_):
            moves = generator.normal(0, np.diff(values).std() if len(values) > 1 else 0, max(0, len(values) - 1))
            return values[0] + np.concatenate([[0], np.cumsum(moves)])

        return decide(trace, rule, records=replaced(trace, walk))

    return keep


def white_noise(rule):
    """The rule on the run's own values in random order."""
    return lambda trace, generator: decide(
        trace, rule, records=replaced(trace, lambda values, *_: generator.permutation(values))
    )


def other_run(rule, traces):
    """The rule on the signals of a run on another data set, at the same epochs."""

    def keep(trace, generator):
        others = [other for other in traces if other.spec.dataset != trace.spec.dataset]
        other = others[generator.integers(len(others))]
        epochs = np.array([record["step"] for record in other.records]) / other.per_epoch

        def borrowed(values, column, key, known):
            taken = [record[column] for record in other.records]
            taken = [value.get(key, value["all"]) if isinstance(value, dict) else value for value in taken]
            own = [value for value in taken if value is not None]
            places = np.searchsorted(epochs, [trace.records[index]["step"] / trace.per_epoch for index in known])
            return [own[min(place, len(own) - 1)] for place in places]

        return decide(trace, rule, records=replaced(trace, borrowed))

    return keep


def contestants(traces, tuned, default):
    """All contestants for the traces of one kind of model. tuned: {rule: number}, {"sum of rates":
    number}."""
    clocks = [Contestant("never stop", never)]
    clocks += [
        Contestant(f"fixed-epochs {epochs:g}", by_rule("fixed-epochs", value=epochs), True)
        for epochs in (1, 2, 3, 5, 8)
    ]
    clocks.append(Contestant(f"sum of rates {tuned['sum of rates']:g}", sum_of_rates(tuned["sum of rates"]), True))
    valleys = [
        Contestant("second-valley (published)", by_rule("second-valley")),
        Contestant("second-valley, weights of the detection", by_rule("second-valley", at_detection=True)),
        Contestant("nth-valley 2 (without the quirk)", by_rule("nth-valley")),
    ]
    rules = [
        Contestant(f"{rule} {tuned[rule]:g}", by_rule(rule, value=tuned[rule]))
        for rule in ("cs-fall", "cs-trough", "update-norm-plateau", "objective-variance", "gradient-evidence")
    ]
    rules.append(Contestant(f"**{default}** (default)", by_rule(default)))
    nulls = []
    for rule in dict.fromkeys(("second-valley", default)):
        nulls += [
            Contestant(f"{rule} on another run's signals", other_run(rule, traces), True),
            Contestant(f"{rule} on random walks", random_walk(rule), True),
            Contestant(f"{rule} on white noise", white_noise(rule), True),
        ]
    return [*clocks, *valleys, *rules, *nulls]
