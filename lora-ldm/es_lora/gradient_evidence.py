"""Do the gradients of the last epoch still agree? The column `grad_evidence`, at no extra pass.

Two running means of every LoRA gradient g are kept: m of g and v of g^2, over about an epoch of
backward passes. Were g noise around zero, the mean of m^2 would be v / n for n independent
gradients; evidence is m^2 / v, averaged over the parameters and divided by that value. Far above 1
the examples still pull in one direction; near 1 what is left of the gradient is what chance alone
would leave (Mahsereci, Balles, Lassner, Hennig: "Early Stopping without a Validation Set", 2017,
section 3; here with running means, so that it needs no extra pass). Python 3.8, torch 1.13."""

import math
from typing import Dict, Iterable, List, Optional

import torch

MAX_VALUES = 1_000_000  # parameters looked at; a mean over so many needs no more, and takes 8 MB
SHORTEST_HORIZON = 5  # gradients: over fewer, agreement cannot be told from chance


def memorising_evidence(gradients: int, per_epoch: int) -> float:
    """The evidence left where no two examples agree, but each with itself when it comes again.

    gradients: seen so far. per_epoch: after so many an example comes again, and the running means
    span as many, at least SHORTEST_HORIZON. 1 within the first epoch; from then on it rises towards
    (1 + d) / (1 - d) with d = decay^per_epoch, 2.16 for a long epoch: the weights that the running
    means give to one example's gradients add up before they are squared."""
    decay = 1 - 1 / max(SHORTEST_HORIZON, per_epoch)
    again = decay**per_epoch
    whole, rest = divmod(gradients, per_epoch)
    more, fewer = ((1 - again ** (whole + 1)) / (1 - again)) ** 2, ((1 - again**whole) / (1 - again)) ** 2
    seen_more = 1 - decay ** (2 * rest)  # share of the examples that have come whole + 1 times
    return (seen_more * more + (1 - seen_more - again**2) * fewer) / (1 - decay ** (2 * gradients))


class GradientEvidence:
    """Watches the gradients of the parameters given, through a hook at every backward pass.

    parameters: the LoRA matrices; those that take no gradient are passed over. horizon: backward
    passes (micro-batches) that the running means span, about an epoch; at least SHORTEST_HORIZON.
    max_values: how many of all parameters are looked at, evenly spread. Under gradient accumulation
    every micro-batch counts as one gradient; a gradient that is not finite counts as zero. With
    several processes it sees those of its own. The hooks change nothing about training."""

    def __init__(self, parameters: Iterable[torch.Tensor], horizon: float, max_values: int = MAX_VALUES):
        watched = [tensor for tensor in parameters if tensor.requires_grad and tensor.is_leaf]
        self.decay = 1 - 1 / max(SHORTEST_HORIZON, horizon)
        self._stride = math.ceil(sum(tensor.numel() for tensor in watched) / max_values) | 1  # odd: no single column
        samples = [tensor.detach().flatten()[:: self._stride] for tensor in watched]
        self._means: List[torch.Tensor] = [torch.zeros_like(sample, dtype=torch.float32) for sample in samples]
        self._squares: List[torch.Tensor] = [torch.zeros_like(mean) for mean in self._means]
        self._counts = [0] * len(watched)
        self._hooks = [tensor.register_hook(self._taker(index)) for index, tensor in enumerate(watched)]

    def _taker(self, index: int):
        def take(gradient: torch.Tensor) -> None:
            sample = gradient.detach().flatten()[:: self._stride].float()
            sample = torch.where(torch.isfinite(sample), sample, torch.zeros_like(sample))
            self._means[index].lerp_(sample, 1 - self.decay)
            self._squares[index].lerp_(sample.square_(), 1 - self.decay)
            self._counts[index] += 1

        return take

    @torch.no_grad()
    def value(self) -> Optional[float]:
        """The evidence, about 1 under pure noise; None before the second gradient. One transfer."""
        seen = [index for index, count in enumerate(self._counts) if count > 1]
        if not seen:
            return None
        parts = []
        for index in seen:
            mean, square, passed = self._means[index], self._squares[index], 1 - self.decay ** self._counts[index]
            ratios = torch.where(square > 0, mean.square() / (square * passed), torch.zeros_like(square))
            # E[m^2 / v] of independent zero means.
            noise = (1 - self.decay) * (2 - passed) / ((1 + self.decay) * passed)
            parts.append(torch.stack([ratios.sum() / noise, (square > 0).sum().to(ratios)]))
        evidence, count = torch.stack([part.to(parts[0]) for part in parts]).double().sum(0).tolist()
        return evidence / count if count and math.isfinite(evidence) else None

    def state_tensors(self) -> Dict[str, torch.Tensor]:
        """All that a resumed run needs, flat: means (n,), squares (n,), counts (parameters,)."""
        if not self._means:
            return {}
        return {
            "means": torch.cat([mean.cpu() for mean in self._means]),
            "squares": torch.cat([square.cpu() for square in self._squares]),
            "counts": torch.tensor(self._counts),
        }

    def load_state_tensors(self, state: Dict[str, torch.Tensor]) -> None:
        """Go on from state_tensors(). Raises ValueError where they belong to other parameters."""
        if not self._means and not state:
            return
        if len(state["counts"]) != len(self._counts) or state["means"].numel() != sum(m.numel() for m in self._means):
            raise ValueError("the saved gradient means belong to another LoRA (rank or layers differ); start anew")
        sizes = [mean.numel() for mean in self._means]
        for own, saved in ((self._means, state["means"]), (self._squares, state["squares"])):
            for tensor, part in zip(own, saved.split(sizes)):
                tensor.copy_(part)
        self._counts = state["counts"].tolist()

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
