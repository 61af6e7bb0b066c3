"""From decisions to figures: what each rule keeps on each run, and the statistics with intervals
bootstrapped by data set."""

from dataclasses import dataclass

import numpy as np

from es_lora.history import replay
from es_lora.rules import RuleSettings, make_rule
from es_lora.settings import auto_window

RESAMPLES = 1000


@dataclass(frozen=True)
class Kept:
    """What a rule did on a run: the kept step, the step at which training ended, and whether the
    rule ended it."""

    step: float
    ended: float
    stopped: bool


def settings_of(trace, window=None, component=None, value=None, interval=1):
    """RuleSettings for a trace. window: measurements, or a function of the automatic one. interval:
    take every n-th."""
    cs_interval = trace.header["cs_interval"] * interval
    automatic = auto_window(trace.per_epoch, cs_interval)
    m = automatic if window is None else max(1, window(automatic)) if callable(window) else window
    return RuleSettings(m, component or trace.header["decided_on"], trace.per_epoch, cs_interval, value)


def decide(trace, rule, records=None, at_detection=False, **settings):
    """Replay a rule by name on a trace, or on other records in its place."""
    rule = make_rule(rule, settings_of(trace, **settings))
    decision = replay(rule, trace.records if records is None else records)
    if decision is None:
        return Kept(trace.last_step, trace.last_step, False)
    return Kept(decision.detected_step if at_detection else decision.keep_step, decision.detected_step, True)


@dataclass
class Outcomes:
    """One rule on many runs: arrays over runs (R,), and the data set of each."""

    regret: np.ndarray
    kept_epoch: np.ndarray
    best_epoch: np.ndarray
    stopped: np.ndarray
    saved: np.ndarray
    datasets: np.ndarray


def outcomes(traces, kept):
    """kept: one Kept a trace. Runs that never improve on step 0 must have been left out before."""

    def epochs(steps):
        return np.array([max(1.0, step) / trace.per_epoch for step, trace in zip(steps, traces)])

    return Outcomes(
        regret=np.array([trace.regret(one.step) for trace, one in zip(traces, kept)]),
        kept_epoch=epochs([one.step for one in kept]),
        best_epoch=epochs([trace.best_step for trace in traces]),
        stopped=np.array([one.stopped for one in kept], dtype=float),
        saved=np.array([1 - one.ended / trace.last_step for one, trace in zip(kept, traces)]),
        datasets=np.array([trace.spec.dataset for trace in traces]),
    )


def correlation(kept_epoch, best_epoch):
    """Pearson, of the logarithms; NaN where a rule keeps the same epoch everywhere."""
    x, y = np.log(kept_epoch), np.log(best_epoch)
    if x.std() < 1e-9 or y.std() < 1e-9:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


STATISTICS = {
    "mean": lambda o, rows: o.regret[rows].mean(),
    "median": lambda o, rows: np.median(o.regret[rows]),
    "p95": lambda o, rows: np.quantile(o.regret[rows], 0.95),
    "max": lambda o, rows: o.regret[rows].max(),
    "stops": lambda o, rows: o.stopped[rows].mean(),
    "correlation": lambda o, rows: correlation(o.kept_epoch[rows], o.best_epoch[rows]),
    "saved": lambda o, rows: o.saved[rows].mean(),
}


def summary(result, resamples=RESAMPLES, seed=0):
    """{statistic: (value, low, high)}: 95% intervals from whole data sets drawn with
    replacement."""
    generator = np.random.default_rng(seed)
    names = np.unique(result.datasets)
    rows_of = {name: np.flatnonzero(result.datasets == name) for name in names}
    everything = np.arange(len(result.regret))
    draws = [np.concatenate([rows_of[name] for name in generator.choice(names, len(names))]) for _ in range(resamples)]
    figures = {}
    for statistic, function in STATISTICS.items():
        drawn = np.array([function(result, rows) for rows in draws])
        drawn = drawn[~np.isnan(drawn)]
        low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (float("nan"),) * 2
        figures[statistic] = (float(function(result, everything)), float(low), float(high))
    return figures


# -------------------------------------------------------------------------------------- as Markdown

TITLES = {"mean": "regret, mean", "p95": "95th percentile", "max": "maximum", "saved": "steps saved"}


def cell(value, low, high):
    return f"{value:.3f} ({low:.3f} to {high:.3f})" if np.isfinite(value) else "-"


def table(rows):
    """rows: [(name, summary)]."""
    head = " | ".join(TITLES.get(name, name) for name in STATISTICS)
    lines = [f"| rule | {head} |", "|---" * (len(STATISTICS) + 1) + "|"]
    return lines + [
        f"| {name} | " + " | ".join(cell(*figures[key]) for key in STATISTICS) + " |" for name, figures in rows
    ]
