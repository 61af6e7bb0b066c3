"""Averaged weights: one copy of the trained weights, moved a little towards them at every step.

Single steps jitter, and a LoRA on few examples jitters most. A power average forgets in proportion
to the steps so far, so that one width fits a short and a long run. Source: Karras et al.,
"Analyzing and Improving the Training Dynamics of Diffusion Models", 2024, section 3.1.
Python 3.8, torch 1.13."""

from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch

from es_lora.weights import copies, put_in

WIDEST = 0.5  # every step counts alike; a wider average would count the first steps most
DEFAULT_WIDTH = 0.0  # with early stopping: no average
STEPS = "steps"
PREFIX = "average."


def width_or_auto(value: Any) -> Optional[float]:
    """A width of 0 (off) to 0.5, or None for `auto`. Raises ValueError for anything else."""
    if value is None or value == "auto":
        return None
    width = float(value)
    if not 0 <= width <= WIDEST:
        raise ValueError(f"give a width of 0 (off) to {WIDEST:g}, or auto")
    return width


class WeightAverage:
    """avg_t = beta_t avg_(t-1) + (1 - beta_t) w_t with beta_t = (1 - 1/t)^(1/width - 1), float32.

    weights: gives {name: live tensor}, the same names and shapes at every call. width: the
    average's lag as a share of the steps so far, above 0 and at most 0.5. The average of the first
    step is its weights. It lives where the weights do. Raises ValueError for another width."""

    def __init__(self, weights: Callable[[], Dict[str, torch.Tensor]], width: float):
        if not 0 < width <= WIDEST:
            raise ValueError(f"an average's width must be above 0 and at most {WIDEST:g}, not {width:g}")
        self.weights, self.width, self.steps = weights, width, 0
        self._averages: Dict[str, torch.Tensor] = {}

    def share_of_newest(self) -> float:
        """1 - beta_t of the step that is taken next: how much of it the average takes over."""
        return 1 - (1 - 1 / (self.steps + 1)) ** (1 / self.width - 1)

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights over as those of one more optimizer step."""
        live, share = self.weights(), self.share_of_newest()
        if not self._averages:
            self._averages = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in live.items()}
        newest = [live[name].detach().to(torch.float32) for name in self._averages]
        _move(list(self._averages.values()), newest, share)
        self.steps += 1

    def tensors(self) -> Dict[str, torch.Tensor]:
        """{name: averaged tensor} in each weight's own type; before the first step the weights."""
        live = self.weights()
        return {name: self._averages.get(name, tensor).to(tensor.dtype) for name, tensor in live.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The live tensors hold the average, and their own values again afterwards."""
        live = self.weights()
        own = copies(live)
        put_in(live, self.tensors())
        try:
            yield
        finally:
            put_in(live, own)

    def state_tensors(self) -> Dict[str, torch.Tensor]:
        """All that a resumed run needs, on the CPU."""
        state = {PREFIX + name: tensor.cpu().contiguous() for name, tensor in self._averages.items()}
        return {STEPS: torch.tensor(self.steps), **state}

    def load_state_tensors(self, state: Dict[str, torch.Tensor]) -> None:
        """Go on from state_tensors(). Raises ValueError where they belong to other weights."""
        saved = {name[len(PREFIX) :]: tensor for name, tensor in state.items() if name.startswith(PREFIX)}
        live = self.weights()
        if saved and {name: tensor.shape for name, tensor in saved.items()} != {n: t.shape for n, t in live.items()}:
            raise ValueError("the saved average belongs to other weights (rank or layers differ); start anew")
        self.steps = int(state[STEPS])
        self._averages = {name: saved[name].to(tensor.device, copy=True) for name, tensor in live.items() if saved}


def _move(averages: List[torch.Tensor], newest: List[torch.Tensor], share: float) -> None:
    """averages + share * (newest - averages), in place."""
    if hasattr(torch, "_foreach_lerp_"):  # torch 2.0 and newer
        torch._foreach_lerp_(averages, newest, share)
        return
    for average, tensor in zip(averages, newest):
        average.lerp_(tensor, share)
