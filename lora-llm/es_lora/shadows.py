"""Shadows: validation without giving up data. The part that does not depend on the kind of model.

Beside the main adapter, which is trained on everything, K small ones are trained on the same frozen
base and the same micro-batches, each without the examples of a fold of its own. Scored on that
fold, a shadow tells how an adapter does on examples that it has not seen; the mean over the K
shadows is the column `shadow_loss`. This is K-fold cross-validation of when to stop (Stone 1974) in
one run. Here are the folds, and the shadows' optimizer steps; the passes through a model are the
trainers'. Python 3.8, torch 1.13, as the other files that both trees share.

A shadow has the main adapter's alpha, whatever its rank: Adam moves each of the rank's entries by
about the learning rate, and their sum is scaled by alpha / rank, so that the update grows at a pace
set by alpha alone. At the main adapter's alpha / rank, a shadow of rank 8 beside an adapter of rank
64 would overfit eight times later than the adapter that it stands for."""

import contextlib
import hashlib
import json
import math
import random
import time
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence

import torch

from es_lora.average import WeightAverage
from es_lora.rules import AVERAGED

DEFAULT_SHADOWS = 1  # where a rule needs them and the person has not said how many
FOLD_SHARE = 0.2  # of the examples, for up to five shadows
FEWEST_EXAMPLES = 3
SCORE_SHARE = 0.1  # of the time of the main adapter's training, for each shadow
SETTINGS = ("lr", "betas", "eps", "weight_decay")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter
AVERAGE = "average/"  # begins the names of the averages in a saved state
NOT_ADAM = ("dadapt", "schedulefree")  # Adam in name, but their rate means something else


def make_folds(examples: Iterable[Any], shadows: int, seed: int) -> Dict[Any, int]:
    """{example: number of the shadow that leaves it out}, the same for the same examples and seed.

    examples: sortable identities (numbers or texts), in any order, each as often as it comes. Every
    fold holds about FOLD_SHARE of them, 1/K where K > 5, and at least one; folds are disjoint, and
    with fewer than five some are in none. Raises ValueError where there are too few examples."""
    known = sorted(set(examples))
    if len(known) < max(FEWEST_EXAMPLES, shadows):
        raise ValueError(
            f"--shadows {shadows} needs at least {max(FEWEST_EXAMPLES, shadows)} different training examples, and "
            f"there are {len(known)}: give more, lower --shadows, or use another --stop_rule"
        )
    size = max(1, min(round(FOLD_SHARE * len(known)), len(known) // shadows))
    left_out = random.Random(f"{seed}/shadow folds").sample(known, size * shadows)
    return {example: position // size for position, example in enumerate(left_out)}


def auto_interval(score_rows: float, trained_rows: float, epoch_rows: float) -> int:
    """The measurements from score to score at which scores cost about SCORE_SHARE of training, and
    no more than an epoch has: the rule `shadow` needs a score an epoch.

    score_rows: rows that a score of one shadow passes forward; trained_rows: rows that the main
    adapter is trained on between two measurements, each of them taken for three forward passes;
    epoch_rows: the same in an epoch."""
    cheap_enough = math.ceil(score_rows / (3 * SCORE_SHARE * trained_rows))
    return max(1, min(cheap_enough, int(epoch_rows / trained_rows)))


def seed_of(*parts: Any) -> int:
    """A seed for torch that depends on all the parts and on nothing else."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def rate_is_adams(optimizer_name: str) -> bool:
    """Whether this optimizer, by flag or class name, reads a learning rate as AdamW does."""
    name = optimizer_name.lower()
    return "adam" in name and not any(other in name.replace("_", "") for other in NOT_ADAM)


def _numbered(parameters: Sequence[torch.Tensor]) -> Dict[str, torch.Tensor]:
    return {str(index): parameter for index, parameter in enumerate(parameters)}


class ShadowTraining:
    """Folds, gradients and AdamW steps of K shadows.

    folds: of make_folds. parameter_groups: for each shadow its optimizer groups [{"params": [...]},
    ...], in the order of the main optimizer's groups. max_norm: clips each shadow's gradient; 0 or
    None: no clipping. interval: a score at every so many measurements; None: the trainer sets it
    before the first one. seed: of the shadows' dropouts, of any kind. average: width of the average
    that is scored in place of the shadows' weights; 0: none. stride: shadows are trained on every
    stride-th step, at stride times the rate.
    sum_over_processes: a tensor to its sum over all processes; None: there is one."""

    def __init__(
        self,
        folds: Dict[Any, int],
        parameter_groups: Sequence[List[Dict[str, Any]]],
        *,
        max_norm: Optional[float],
        interval: Optional[int],
        seed: Any,
        average: float = 0.0,
        stride: int = 1,
        sum_over_processes: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
    ):
        self.folds, self.max_norm, self.interval, self.seed = folds, max_norm, interval, seed
        self.stride = stride
        self._sum_over_processes = sum_over_processes
        self.optimizers = [torch.optim.AdamW(groups, foreach=True) for groups in parameter_groups]
        self.parameters = [[p for group in groups for p in group["params"]] for groups in parameter_groups]
        self.averages: List[WeightAverage] = []
        if average:
            self.averages = [WeightAverage(partial(_numbered, own), average) for own in self.parameters]
        self.seconds = 0.0  # spent in shadows
        self._counts = [0.0] * len(self.optimizers)  # what the gradients have been summed over since the last step
        self._steps = self._measurements = 0

    @property
    def count(self) -> int:
        return len(self.optimizers)

    def trained_rows(self, examples: Sequence[Any]) -> List[List[int]]:
        """For each shadow, the positions of a micro-batch it trains on: not those of its fold."""
        fold_of = [self.folds.get(example) for example in examples]
        return [[row for row, fold in enumerate(fold_of) if fold != shadow] for shadow in range(self.count)]

    def trains_now(self) -> bool:
        """Whether the micro-batches of the present step are the shadows' as well."""
        return self._steps % self.stride == 0

    def stepped(self) -> bool:
        """Whether the step that is complete was the shadows' as well."""
        return (self._steps - 1) % self.stride == 0

    def pass_seed(self) -> int:
        """What the next pass's dropouts depend on: no other pass, resume or score changes it."""
        return seed_of(self.seed, "shadow pass", self._steps, *self._counts)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """For a pass of the shadows: its time is noted; the main run's random numbers stay."""
        started = time.perf_counter()
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.pass_seed())
            yield
        self.seconds += time.perf_counter() - started

    def backward(self, summed_loss: torch.Tensor, counts: Sequence[float]) -> None:
        """Add the gradients of a micro-batch. summed_loss: over all rows of all shadows, a scalar;
        counts: each shadow's number of losses (pictures, tokens), the divisor of its step."""
        summed_loss.backward()
        self._counts = [total + count for total, count in zip(self._counts, counts)]

    def step(self, main_optimizer: torch.optim.Optimizer) -> None:
        """A step of every shadow that has seen something since the last one, at the main
        optimizer's present rates, betas, eps and weight decay. All processes call it."""
        started = time.perf_counter()
        if self.trains_now():
            self._share()
        for optimizer, parameters, count in zip(self.optimizers, self.parameters, self._counts):
            if not count:
                continue
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(count)
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm or float("inf"))
            for own, main in zip(optimizer.param_groups, main_optimizer.param_groups):
                own.update({name: main[name] for name in SETTINGS if name in main})
                own["lr"] = self.stride * main["lr"]
            if torch.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._counts, self._steps = [0.0] * self.count, self._steps + 1
        self.seconds += time.perf_counter() - started

    @property
    def column(self) -> str:
        """The history's column of the scores."""
        return "shadow_loss" + (AVERAGED if self.averages else "")

    def average(self) -> None:
        """Take every shadow's weights into its average; call it when a step is complete."""
        if self.stepped():
            for average in self.averages:
                average.update()

    @contextlib.contextmanager
    def weights_to_score(self) -> Iterator[None]:
        """Within it the shadows hold their averages, where they have some."""
        with contextlib.ExitStack() as stack:
            for average in self.averages:
                stack.enter_context(average.in_place())
            yield

    def _share(self) -> None:
        """Sum gradients and counts over the processes, in one transfer."""
        if self._sum_over_processes is None:
            return
        every = [p for parameters in self.parameters for p in parameters]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in every]
        counts = torch.tensor(self._counts, device=every[0].device)
        flat = self._sum_over_processes(torch.cat([counts, *(part.flatten().float() for part in parts)]))
        self._counts = flat[: self.count].tolist()
        for parameter, part in zip(every, flat[self.count :].split([p.numel() for p in every])):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    @property
    def steps_a_measurement(self) -> int:
        """Optimizer steps between two measurements, so far; ask at one, before score_is_due."""
        return self._steps // (self._measurements + 1)

    def score_is_due(self) -> bool:
        """Whether the next measurement is one to score at: the first, and every interval-th."""
        self._measurements += 1
        return (self._measurements - 1) % (self.interval or 1) == 0

    def cost(self, whole_seconds: float) -> Dict[str, Any]:
        """What the shadows have cost of a run of so many seconds, for result.json and screen."""
        factor = whole_seconds / max(1e-9, whole_seconds - self.seconds)
        sentence = (
            f"Shadows took {self.seconds:.1f} of {whole_seconds:.1f} seconds: {factor:.2f} times the run without them."
        )
        facts = {"count": self.count, "interval": self.interval, "seconds": round(self.seconds, 3)}
        return {**facts, "cost_factor": round(factor, 3), "sentence": sentence}

    # ---------------------------------------------------------------------------------- checkpoints

    def state_tensors(self) -> Dict[str, torch.Tensor]:
        """All that a resumed run needs: weights, Adam's state, a fingerprint of the folds."""
        state = {"steps": torch.tensor(self._steps), "measurements": torch.tensor(self._measurements)}
        state["folds"] = self._fingerprint()
        for name, parameter, moments in self._named():
            state[f"{name}.weight"] = parameter.detach().cpu().contiguous()
            state.update({f"{name}.{key}": moments[key].cpu() for key in MOMENTS if key in moments})
        for shadow, average in enumerate(self.averages):
            state.update({f"{AVERAGE}{shadow}/{key}": tensor for key, tensor in average.state_tensors().items()})
        return state

    @torch.no_grad()
    def load_state_tensors(self, state: Dict[str, torch.Tensor]) -> None:
        """Go on from state_tensors(). Raises ValueError where shadows or data are others."""
        averages = {key: tensor for key, tensor in state.items() if key.startswith(AVERAGE)}
        state = {key: tensor for key, tensor in state.items() if key not in averages}
        names = [name for name, _, _ in self._named()]
        fits = {key.rpartition(".")[0] for key in state if "." in key} == set(names)
        fits = fits and all(state[f"{name}.weight"].shape == parameter.shape for name, parameter, _ in self._named())
        if not fits or not torch.equal(state["folds"], self._fingerprint()):
            raise ValueError(
                "the saved shadows belong to other data or other settings: go on with the same data, seed, --shadows "
                "and --shadow_rank, or start anew"
            )
        if self.averages and not averages:
            raise ValueError("the saved shadows hold no averages: go on with --average 0, or start anew")
        for shadow, average in enumerate(self.averages):
            start = f"{AVERAGE}{shadow}/"
            average.load_state_tensors({k[len(start) :]: part for k, part in averages.items() if k.startswith(start)})
        self._steps, self._measurements = int(state["steps"]), int(state["measurements"])
        for shadow in range(self.count):  # one that has not stepped yet has none
            needed = {f"{name}.{key}" for name in names if name.startswith(f"{shadow}.") for key in MOMENTS}
            if not needed.isdisjoint(state) and not needed <= set(state):
                lacking = min(needed - set(state))
                raise ValueError(f"the saved shadows lack {lacking}: take an older checkpoint, or start anew")
        for name, parameter, moments in self._named():
            parameter.copy_(state[f"{name}.weight"])
            for key in (key for key in MOMENTS if f"{name}.{key}" in state):
                moments[key] = state[f"{name}.{key}"].to("cpu" if key == "step" else parameter.device, copy=True)

    def _named(self):
        """(name, parameter, its live optimizer state) of every parameter."""
        for shadow, (optimizer, parameters) in enumerate(zip(self.optimizers, self.parameters)):
            for index, parameter in enumerate(parameters):
                yield f"{shadow}.{index}", parameter, optimizer.state[parameter]

    def _fingerprint(self) -> torch.Tensor:
        text = json.dumps(sorted((str(example), fold) for example, fold in self.folds.items()))
        return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)  # (32,)
