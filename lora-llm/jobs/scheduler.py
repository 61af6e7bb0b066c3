"""Which jobs train now, and whose rows share a pass: no tensors, so all can be tested by hand.

A round is one micro-batch of every active job: fair turns. Its micro-batches are sorted by length
and cut into passes, so that rows of like length share one and padding stays low. A waiting job is
admitted when a slot and its memory are free: highest priority first, then in the order of the file.
The head of the queue is never overtaken, so no job starves."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

# What a pass costs beside its tokens (reading, or dequantising, every frozen weight), in tokens.
# For a CPU by tests/benchmarks/multi_lora_throughput.py with a 4-bit base; for a GPU an estimate.
PASS_TOKENS = {"cpu": 32, "cuda": 512}
# Of a LoRA parameter in training: weight, gradient, two moments, what measuring keeps, in float32.
LORA_BYTES = 24


@dataclass(frozen=True)
class MemoryNeed:
    """What a training job takes, estimated: adapter bytes, tokens of its largest micro-batch."""

    adapter_bytes: int
    tokens: int


@dataclass(frozen=True)
class Limits:
    """max_rows: rows a pass. max_jobs: adapters in training. free_bytes: --memory_gb less the base.

    token_bytes: activations of a token. free_bytes None: no bound. pass_tokens: see PASS_TOKENS."""

    max_rows: int
    max_jobs: int
    free_bytes: Optional[float] = None
    token_bytes: float = 1.0
    pass_tokens: int = PASS_TOKENS["cpu"]

    def max_tokens(self, needs: Sequence[MemoryNeed]) -> Optional[int]:
        """Tokens a pass may hold beside these adapters; None: any number."""
        if self.free_bytes is None:
            return None
        return int((self.free_bytes - sum(need.adapter_bytes for need in needs)) / self.token_bytes)

    def fit(self, needs: Sequence[MemoryNeed]) -> bool:
        """Whether these jobs may train at once: each micro-batch has room beside all adapters."""
        tokens = self.max_tokens(needs)
        return len(needs) <= self.max_jobs and (
            tokens is None or max((need.tokens for need in needs), default=0) <= tokens
        )


def token_bytes(model: Any, layer_sizes: Sequence[tuple[int, int]], checkpointing: bool) -> float:
    """Bytes that one token takes in a training pass, estimated from the model's shape.

    layer_sizes: (in, out) of every linear layer. Kept for the backward pass: about twice each
    layer's input and output (its own, and those of norms and activations between), and the logits
    three times in float32. With checkpointing only inputs of blocks stay, and one block's own."""
    config = model.config.get_text_config()
    size = model.get_input_embeddings().weight.element_size()
    layers = 2 * size * sum(sum(sizes) for sizes in layer_sizes)
    blocks = max(1, getattr(config, "num_hidden_layers", 1))
    if checkpointing:
        layers = layers / blocks + blocks * config.hidden_size * size
    return layers + 3 * 4 * config.vocab_size


def waiting_order(priorities: Sequence[int]) -> list[int]:
    """Indices of the jobs in the order of their admission."""
    return sorted(range(len(priorities)), key=lambda index: (-priorities[index], index))


@dataclass
class JobQueue:
    """Jobs that wait, in order, each with its MemoryNeed."""

    limits: Limits
    waiting: list[tuple[Any, MemoryNeed]] = field(default_factory=list)

    def admit(self, active: Sequence[MemoryNeed]) -> list[tuple[Any, MemoryNeed]]:
        """The jobs that start now beside the active ones; they leave the queue."""
        admitted: list[tuple[Any, MemoryNeed]] = []
        while self.waiting and self.limits.fit([*active, *(need for _, need in admitted), self.waiting[0][1]]):
            admitted.append(self.waiting.pop(0))
        return admitted


def split_round(
    sizes: Sequence[tuple[int, int]],
    max_rows: int,
    max_tokens: Optional[int] = None,
    pass_tokens: int = PASS_TOKENS["cpu"],
) -> list[list[int]]:
    """Cut a round into passes: lists of indices into sizes, (rows, longest row in tokens) of each.

    No pass has more than max_rows rows, or more than max_tokens tokens, padding included; a
    micro-batch is never split. Of all such cuts of the micro-batches in order of length it is the
    cheapest: fewest tokens, a pass counted as pass_tokens more."""
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index][1], index))
    cheapest: list[tuple[int, list[list[int]]]] = [(0, [])]  # of the first n micro-batches
    for end in range(1, len(order) + 1):
        choices = []
        for start in range(end):
            rows, longest = sum(sizes[index][0] for index in order[start:end]), sizes[order[start]][1]
            fits = rows <= max_rows and (max_tokens is None or rows * longest <= max_tokens)
            if fits or end - start == 1:
                cost, passes = cheapest[start]
                choices.append((cost + pass_tokens + rows * longest, [*passes, order[start:end]]))
        cheapest.append(min(choices, key=lambda choice: choice[0]))
    return cheapest[-1][1]
