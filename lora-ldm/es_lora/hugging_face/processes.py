"""Several processes: all hear what the first one says, and none waits for one that has stopped."""

import hashlib
from typing import Any, Iterable, Optional, Sequence

import torch

from es_lora.hugging_face.peft_models import trainable_tensors
from es_lora.rules import Decision

# What rank 0 tells the others after a measurement.
GO_ON, STOP, DIVERGED, FAILED = range(4)


def _device(args: Any) -> torch.device:
    return torch.device("cpu") if torch.distributed.get_backend() == "gloo" else args.device


_last_broadcast: Any = None


def _broadcast(tensor: torch.Tensor) -> None:
    """Rank 0's values on every rank, in place.

    The finished work is held until the next one. Were gloo's thread the last to hold it, that
    thread would need the interpreter to free the tensor, and wait for ever in an ending process."""
    global _last_broadcast
    work = torch.distributed.broadcast(tensor, 0, async_op=True)
    work.wait()
    _last_broadcast = work


def heard_by_all(answer: int, args: Any) -> int:
    """Rank 0's answer, on every rank."""
    if args.world_size == 1:
        return answer
    tensor = torch.tensor([answer], device=_device(args))
    _broadcast(tensor)
    return int(tensor.item())


def check_same_on_all(what: str, values: Iterable[Any], args: Any) -> None:
    """Raises ValueError, on every rank, where the ranks do not hold the same values in this order.
    what: for the message."""
    if args.world_size > 1:
        own = torch.tensor([digest_of(values)], device=_device(args))
        every = [torch.zeros_like(own) for _ in range(args.world_size)]
        torch.distributed.all_gather(every, own)
        refuse_different(what, [int(theirs) for theirs in every])


def digest_of(values: Iterable[Any]) -> int:
    """A number of 56 bits that tells other values, or another order, apart."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:7], "big")


def refuse_different(what: str, digests: Sequence[int]) -> None:
    """Raises ValueError where the digests of all ranks, in order, are not the same."""
    others = [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]
    if others:
        raise ValueError(
            f"the processes do not have the same {what}: process {others[0]} differs from process 0; give all of them "
            "the same files and flags"
        )


def decision_on_all(decision: Optional[Decision], args: Any) -> Optional[Decision]:
    """Rank 0's decision on every rank; on the others without its reason."""
    if args.world_size == 1:
        return decision
    steps = [-1] * 4 if decision is None else [decision.keep_step, decision.detected_step, *decision.usable]
    tensor = torch.tensor(steps, device=_device(args))
    _broadcast(tensor)
    keep, detected, first, last = tensor.tolist()
    return decision if decision is not None or keep < 0 else Decision(keep, detected, (first, last), "")


def same_on_all(model: torch.nn.Module, args: Any) -> None:
    """Give every rank the trained weights of rank 0."""
    if args.world_size > 1:
        for tensor in trainable_tensors(model).values():
            _broadcast(tensor.data)
