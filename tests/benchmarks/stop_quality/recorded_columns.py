"""What the suite records at every measurement beside the history's own columns: CS and norms by
layer group, stable rank, gradient statistics, losses of averaged weights. And how a finished
history becomes a trace: rounded, packed, with the run's settings in its header."""

import contextlib
import gzip
import json
import math
import traceback

import torch
from runs import RUNS

from cs_fluctuation import measure_each
from es_lora.average import WeightAverage
from es_lora.files import write_whole
from es_lora.history import HISTORY_NAME

DIGITS = 6  # significant digits of a trace's numbers
WIDTHS = (0.1, 0.25, 0.4)  # of the averages that are scored
SHADOW_STRIDE = 2  # shadows of traces_anew/ step every second time, at twice the rate; those of traces/ every time
SHADOW_WIDTHS = (0.25, 0.4)  # of the shadows' averages that are scored: each score passes a whole fold


@torch.no_grad()
def stable_rank(layer):
    """||BA||_F^2 / ||BA||_2^2 of one layer's update, from the r x r products; 0 for a zero
    update."""
    down, up = layer.down.detach().flatten(1).double(), layer.up.detach().flatten(1).double()
    values = torch.linalg.eigvals((down @ down.T) @ (up.T @ up)).real.clamp_min(0)
    largest = values.max()
    return float(values.sum() / largest) if largest > 0 else 0.0


def group_columns(layers, groups_of):
    """{name: function}: `groups` ({group: [matrix cosine, row cosine, norm of BA]}) and
    `stable_rank` ({component: mean})."""

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

    return {"groups": groups, "stable_rank": ranks}


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


class Alignment:
    """How gradients G of the frozen weights lie to the update BA, mean over the steps since it was
    last asked for: <G, BA> = sum(grad_B * B), by the norms of grad_B and B. Falls below zero while
    the update still grows. Related: Gradient-Weight Alignment, NeurIPS 2025."""

    def __init__(self, layers):
        self.ups, self.cosines = [layer.up for layer in layers], []

    @torch.no_grad()
    def note(self):
        ups = [up for up in self.ups if up.grad is not None]
        if not ups:
            return
        products = torch.stack(
            [torch.stack([(up.grad * up).sum(), up.grad.square().sum(), up.square().sum()]) for up in ups]
        )
        product, gradient, weight = products.double().sum(0).tolist()
        self.cosines.append(product / math.sqrt(gradient * weight) if gradient * weight > 0 else 0.0)

    def value(self):
        cosines, self.cosines = self.cosines, []
        return math.fsum(cosines) / len(cosines) if cosines else None


def weighted_evidence(evidence):
    """Functions of a GradientEvidence: its evidence with inner products weighted as Adam weighs
    them, by 1 / sqrt(v), and not weighted. The column grad_evidence weighs them by 1 / v."""

    def weighted(power):
        seen = [index for index, count in enumerate(evidence._counts) if count > 1]
        if not seen:
            return None
        passed = 1 - evidence.decay ** evidence._counts[seen[0]]
        noise = (1 - evidence.decay) * (2 - passed) / ((1 + evidence.decay) * passed)
        means = torch.cat([evidence._means[index] for index in seen]).double()
        squares = torch.cat([evidence._squares[index] for index in seen]).double()
        weights = torch.where(squares > 0, squares.pow(-power), torch.zeros_like(squares))
        whole = float((squares * weights).sum()) * passed
        return float((means.square() * weights).sum()) / whole / noise if whole else None

    return {"evidence_adam": lambda: weighted(0.5), "evidence_plain": lambda: weighted(0.0)}


class Averages:
    """The averages of some weights, one of each width.  weights: gives {name: live tensor}."""

    def __init__(self, weights, widths=WIDTHS):
        self.weights = weights
        self.each = {f"{width:g}": WeightAverage(weights, width) for width in widths}

    def update(self):
        for average in self.each.values():
            average.update()

    def scored(self, loss):
        """A function: {width: loss() with that average in place}."""

        def scores():
            found = {}
            for name, average in self.each.items():
                with average.in_place():
                    found[name] = loss()
            return found

        return scores

    @torch.no_grad()
    def distances(self):
        """{width: ||weights - average||}."""
        live = self.weights()
        found = {}
        for name, average in self.each.items():
            squares = [(live[key].float() - tensor.float()).square().sum() for key, tensor in average.tensors().items()]
            found[name] = math.sqrt(float(torch.stack(squares).sum()))
        return found


class ShadowScores:
    """The columns of shadows: each one's loss on its fold, as it is and of its averages.

    training: its ShadowTraining; fold_losses: gives [loss of each shadow]. interval: scored at
    every so many measurements."""

    def __init__(self, training, fold_losses, interval):
        training.interval, training.stride = interval, SHADOW_STRIDE
        self.training, self.fold_losses, self.now = training, fold_losses, None
        self.averages = [Averages(lambda own=own: own, SHADOW_WIDTHS) for own in map(named, training.parameters)]

    def update(self):
        if self.training.stepped():
            for averages in self.averages:
                averages.update()

    def mean(self):
        """The column shadow_loss."""
        self.now = self.fold_losses() if self.training.score_is_due() else None
        return None if self.now is None else math.fsum(self.now) / len(self.now)

    def each(self):
        """The column shadow_losses: {"0": as they are, width: averaged}, a list of the shadows'."""
        if self.now is None:
            return None
        found = {"0": self.now}
        for name in self.averages[0].each:
            with contextlib.ExitStack() as stack:
                for averages in self.averages:
                    stack.enter_context(averages.each[name].in_place())
                found[name] = self.fold_losses()
        return found


def named(parameters):
    return {str(index): parameter for index, parameter in enumerate(parameters)}


def shadow_interval(measured_per_epoch):
    """Every second measurement, where an epoch has enough of them."""
    return 2 if measured_per_epoch >= 5 else 1


class EveryNth:
    """Calls a slow measurement at the first measurement, every n-th after it and the last one, and
    gives None in between.  measurements: how many the run has."""

    def __init__(self, function, every, measurements):
        self.function, self.every, self.last, self.count = function, every, measurements - 1, 0

    def __call__(self):
        due = self.count % self.every == 0 or self.count == self.last
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
