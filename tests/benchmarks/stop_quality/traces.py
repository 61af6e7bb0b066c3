"""Recorded runs: reading a trace, its held-out curve, and what a kept step costs (regret)."""

import gzip
import json
from dataclasses import dataclass, field

import numpy as np
import runs
from runs import RUNS


@dataclass
class Trace:
    """One recorded run.

    records: the measurements. steps, losses: the held-out curve, step 0 included. per_epoch:
    optimizer steps an epoch.
    """

    spec: object
    header: dict
    records: list
    per_epoch: float = 0.0
    steps: np.ndarray = field(default=None)
    losses: np.ndarray = field(default=None)

    def __post_init__(self):
        self.per_epoch = self.header["steps_per_epoch"]
        scored = [record for record in self.records if record.get("heldout_loss") is not None]
        self.steps = np.array([0, *(record["step"] for record in scored)], dtype=float)
        self.losses = np.array([self.header["heldout_at_start"], *(record["heldout_loss"] for record in scored)])

    @property
    def widths(self):
        """The recorded averages' widths, as text; none in older traces."""
        known = (record["heldout_loss_average"] for record in self.records if record.get("heldout_loss_average"))
        return [width for width in next(known, {}) if "measured" not in width]

    def averaged(self, width):
        """(steps, held-out losses) of an average; at step 0 there are only the weights."""
        scored = [record for record in self.records if record.get("heldout_loss_average") is not None]
        steps = np.array([0, *(record["step"] for record in scored)], dtype=float)
        return steps, np.array([self.losses[0], *(record["heldout_loss_average"][width] for record in scored)])

    @property
    def last_step(self):
        return self.records[-1]["step"]

    @property
    def best_step(self):
        return self.steps[self.losses.argmin()]

    @property
    def improves(self):
        """Whether the held-out loss ever falls below that of step 0; without that there is nothing
        to keep."""
        return self.losses.min() < self.losses[0]

    def loss_at(self, step):
        """Held-out loss at a step, linear between the scored ones."""
        return float(np.interp(step, self.steps, self.losses))

    def regret(self, step, width="0"):
        """(loss of the kept step - lowest) / (loss at step 0 - lowest): 0 is perfect, 1 as bad as
        not training. width: of the average that is kept, below 0 where it is better than the best
        single step; "0": the step itself."""
        lowest = self.losses.min()
        steps, losses = (self.steps, self.losses) if width == "0" else self.averaged(width)
        return (float(np.interp(step, steps, losses)) - lowest) / (self.losses[0] - lowest)


def read_trace(spec, anew=False):
    with gzip.open(runs.trace_path(spec, anew), "rt", encoding="utf-8") as handle:
        header, *records = (json.loads(line) for line in handle)
    return Trace(spec, header, records)


def read_traces(model=None, half=None, purposes=("record", "shadow"), anew=False):
    """The traces there are, by model and half. anew: of traces_anew/."""
    chosen = [spec for spec in RUNS.values() if model in (None, spec.model) and half in (None, spec.half)]
    chosen = [spec for spec in chosen if spec.purpose in purposes and runs.trace_path(spec, anew).exists()]
    return [read_trace(spec, anew) for spec in chosen]
