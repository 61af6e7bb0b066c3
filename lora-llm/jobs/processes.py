"""Several processes: jobs are spread over them; where jobs are fewer, all train every job together.

Started by `torchrun --nproc_per_node 2 multi_lora.py ...` or `accelerate launch`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Optional

import torch
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs

from es_lora.command_line import MachineFault, fault_of_machine, told

LONGEST_WAIT = timedelta(days=7)  # processes end their jobs at different times


class KnownToAll(ValueError):
    """A failure of one of the processes that train together; all of them raise it."""


class Processes:
    """The processes of a run. `together`: data-parallel, each has a share of every micro-batch.

    Where they train together, they agree before every exchange whether one of them has failed:
    else one that goes on would wait for one that does not."""

    def __init__(self, use_cpu: bool, together: bool = False):
        handler = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
        self._state = PartialState(cpu=use_cpu, **handler.to_kwargs())
        self.together = together and self.count > 1

    @property
    def count(self) -> int:
        return self._state.num_processes

    @property
    def index(self) -> int:
        return self._state.process_index

    @property
    def device(self) -> torch.device:
        return self._state.device

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def writes(self) -> bool:
        """Whether this process measures and saves what it trains; where all train, the first."""
        return self.is_first or not self.together

    def own_jobs(self, costs: Sequence[float]) -> list[int]:
        """Indices of the jobs of this process: dearest first, each to the least busy process."""
        if self.count == 1 or self.together:
            return list(range(len(costs)))
        loads, own = [0.0] * self.count, []
        for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
            process = loads.index(min(loads))
            loads[process] += costs[index]
            if process == self.index:
                own.append(index)
        return sorted(own)

    def share(self, examples: Sequence[Any]) -> Sequence[Any]:
        """This process's part of a micro-batch."""
        return examples[self.index :: self.count] if self.together else examples

    def failure(self, act: Callable[[], Any]) -> Optional[Exception]:
        """Do something; what it failed with on any of the processes that train together, or
        None."""
        try:
            act()
        except (KnownToAll, MachineFault) as error:
            return error
        except Exception as error:
            return self._first_failure(error)
        return self._first_failure(None)

    def _first_failure(self, own: Optional[Exception]) -> Optional[Exception]:
        if not self.together or not self.any(own is not None):
            return own
        machine = None if own is None else fault_of_machine(own)
        reasons: list[Optional[tuple[bool, str]]] = [None] * self.count
        mine = None if own is None else (machine is not None, machine or told(own))
        torch.distributed.all_gather_object(reasons, mine)
        is_machine, reason = next(reason for reason in reasons if reason is not None)
        return MachineFault(reason) if is_machine else KnownToAll(reason)

    def _none_failed(self) -> None:
        failure = self._first_failure(None)
        if failure is not None:
            raise failure

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes that train together."""
        if self.together:
            self._none_failed()
            torch.distributed.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add up the gradients of the processes that train together, in one transfer."""
        if not self.together:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.summed(torch.cat([grad.flatten() for grad in grads]))
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
            parameter.grad = part.view_as(parameter).clone()

    def heard(self, value: Any) -> Any:
        """The first process's value, on all that train together."""
        if not self.together:
            return value
        self._none_failed()
        box = [value]
        torch.distributed.broadcast_object_list(box, 0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether it is true on any of the processes that train together."""
        answer = torch.tensor([float(flag)], device=self.device)
        if self.together:
            torch.distributed.all_reduce(answer)
        return bool(answer.item())

    def first_one_first(self) -> AbstractContextManager[None]:
        """The first process goes through a block alone, the others after it."""
        return self._state.main_process_first()

    def wait(self) -> None:
        """Until every process is here."""
        self._state.wait_for_everyone()
