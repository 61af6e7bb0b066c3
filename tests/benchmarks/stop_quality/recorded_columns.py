"""What the suite records at every measurement beside the history's own columns: CS and norms by
layer group, stable rank, gradient statistics. And how a finished history becomes a trace: rounded,
packed, with the run's settings in its header."""

import gzip
import json
import math
import traceback

import torch
from runs import RUNS

from cs_fluctuation import measure_each
from es_lora.files import write_whole
from es_lora.history import HISTORY_NAME

DIGITS = 6  # significant digits of a trace's numbers


@torch.no_grad()
def stable_rank(layer):
    """||BA||_F^2 / ||BA||_2^2 of one layer's update, from the r x r products; 0 for a zero
    update."""
    down, up = layer.down.detach().flatten(1).double(), layer.up.detach().flatten(1).double()
    values = torch.linalg.eigvals((down @ down.T) @ (up.T @ up)).real.clamp_min(0)
    largest = values.max()
    return float(values.sum() / largest) if largest > 0 else 0.0


def group_columns(layers, groups_of, every):
    """{name: function}: `groups` ({group: [matrix cosine, row cosine, norm of BA]}) and
    `stable_rank` ({component: mean}), each at every n-th measurement."""

    def groups():
        members = {}
        for layer, row in zip(layers, measure_each(layers)):
            for group in groups_of(layer):
                members.setdefault(group, []).append(row)
        means = {name: [math.fsum(column) / len(rows) for column in zip(*rows)] for name, rows in members.items()}
        return {name: [row[0], row[1], math.sqrt(row[2] * len(members[name]))] for name, row in means.items()}

    def ranks():
        found = {}
        for layer in layers:
            found.setdefault(layer.component, []).append(stable_rank(layer))
        return {component: math.fsum(values) / len(values) for component, values in found.items()}

    return {"groups": EveryNth(groups, every), "stable_rank": EveryNth(ranks, every)}


class GradientNorm:
    """The mean gradient norm over the optimizer steps since it was last asked for."""

    def __init__(self):
        self.norms = []

    def note(self, parameters):
        squares = [
            parameter.grad.detach().double().square().sum() for parameter in parameters if parameter.grad is not None
        ]
        if squares:
            self.norms.append(math.sqrt(float(torch.stack(squares).sum())))

    def value(self):
        norms, self.norms = self.norms, []
        return math.fsum(norms) / len(norms) if norms else None


def adam_ratio(optimizer):
    """Mean over all values of m^2 / v of Adam's bias-corrected moments; None before the first
    step."""
    ratios = []
    for group in optimizer.param_groups:
        first, second = group["betas"]
        for state in (optimizer.state[parameter] for parameter in group["params"] if optimizer.state.get(parameter)):
            mean = state["exp_avg"].float() / (1 - first ** float(state["step"]))
            square = state["exp_avg_sq"].float() / (1 - second ** float(state["step"]))
            ratios.append(torch.where(square > 0, mean.square() / square, 0).flatten())
    return float(torch.cat(ratios).mean()) if ratios else None


class EveryNth:
    """Calls a slow measurement at the first measurement and every n-th after it, and gives None in
    between."""

    def __init__(self, function, every):
        self.function, self.every, self.count = function, every, 0

    def __call__(self):
        due = self.count % self.every == 0
        self.count += 1
        return self.function() if due else None


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else value


def write_trace(folder, path, spec, **facts):
    """Pack the history of a run folder into a trace. facts: further values of the header, such as
    heldout_at_start."""
    lines = [json.loads(line) for line in (folder / HISTORY_NAME).read_text(encoding="utf-8").splitlines()]
    lines[0] = {**lines[0], "run": spec.settings(), **facts}
    for name in ("model", "dataset"):  # paths of this machine; the run's settings name both
        lines[0].pop(name, None)
    text = "".join(json.dumps(rounded(line), separators=(",", ":")) + "\n" for line in lines if "event" not in line)
    write_whole(path, lambda temporary: temporary.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0)))


def record_all(record, names):
    """Record runs one after the other; one that fails is shown and passed over. The exit code: how
    many failed."""
    failed = 0
    for name in names:
        print(f"=== {name}", flush=True)
        try:
            record(RUNS[name])
        except Exception:
            traceback.print_exc()
            failed += 1
    return failed
