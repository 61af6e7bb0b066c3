"""Several LoRA adapters over one frozen base, trained in one pass: each row of a batch goes through
its own adapter.

    fused = FusedLora(base)  # any frozen causal language model: 32, 16, 8 or 4 bits, plain or
        inside a PeftModel
    small = fused.add("small", rank=8, alpha=16, target_modules="attention", seed=1)
    large = fused.add("large", rank=64, alpha=16, target_modules="all", dropout=0.05, seed=2)
    optimizer = torch.optim.AdamW([*small.parameters(), *large.parameters()])
    with fused.rows([("small", 4), ("large", 2), (None, 1)]):  # rows 0-3, rows 4-5, and row 6
        through the base alone
        logits = base(input_ids=ids, attention_mask=mask).logits  # (7, T, vocabulary)
        loss = loss_of(logits[:4]) + loss_of(logits[4:6])
        loss.backward()  # inside the block: gradient checkpointing computes layers again here
    optimizer.step()
    small.save_peft("OUTPUT/adapter", {"last_step": 1})  # PeftModel.from_pretrained reads it
    fused.remove("large")
    fused.close()

Every frozen weight is passed once, and a 4-bit weight dequantised once, for all rows; each adapter
then adds its low-rank product to its own rows. Ranks, layers and dropout may differ. Rows do not
see each other, so an adapter's gradient is that of its rows alone; only padding to the longest row
is shared.

Why not PEFT's own mixed batches (`adapter_names=[...]`, one name a row): they refuse a model that
is training ("Cannot pass `adapter_names` when the model is in training mode"). Past that check, by
eval(), there is no dropout, and they pick rows by index lists, which copies them in every layer,
and let autograd keep a float32 copy of each layer's input. Here groups are slices, and the backward
pass is written out: it keeps the layer's input as it is and (rows, T, rank) beside it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from base.layers import linear_layers, linear_shape, lora_target_names
from cs_fluctuation import LoraLayer
from es_lora.hugging_face.peft_models import save_adapter
from es_lora.weights import frozen_weight


@dataclass(frozen=True)
class _Group:
    """Rows start to stop (of an input flattened to (rows, in)) that go through one adapter's pair
    of matrices."""

    start: int
    stop: int
    scaling: float
    dropout: float
    seed: int  # of this layer's dropout mask in this pass

    def kept(self, rows: torch.Tensor) -> torch.Tensor:
        """What dropout multiplies these rows (rows, in) by. The same each time: nothing of it is
        kept for the backward pass."""
        generator = torch.Generator(rows.device).manual_seed(self.seed)
        return torch.empty_like(rows).bernoulli_(1 - self.dropout, generator=generator).div_(1 - self.dropout)


def _add_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """target += scale * left right, in place; a target in fewer bits is rounded once."""
    if target.dtype == left.dtype:
        target.addmm_(left, right, alpha=scale)
    else:
        target.add_(left @ right, alpha=scale)


class _GroupedLowRank(torch.autograd.Function):
    """output + scaling * dropout(x) A^T B^T, each group of rows with matrices of its own; in place:
    no layer keeps its output."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        x: torch.Tensor,
        groups: Sequence[_Group],
        dtype: torch.dtype,
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        """output (..., out), x (..., in), matrices A0 (r0, in), B0 (out, r0), A1, B1, ...: computed
        in `dtype`."""
        rows_in, rows_out, inner = x.reshape(-1, x.shape[-1]), output.view(-1, output.shape[-1]), []
        for group, down, up in zip(groups, matrices[::2], matrices[1::2]):
            part = rows_in[group.start : group.stop].to(dtype)  # (rows, in)
            if group.dropout:
                part = part * group.kept(part)
            inner.append(part @ down.to(dtype).T)  # (rows, r)
            _add_product(rows_out[group.start : group.stop], inner[-1], up.to(dtype).T, group.scaling)
        ctx.mark_dirty(output)
        ctx.groups, ctx.dtype = groups, dtype
        ctx.save_for_backward(x, *matrices, *inner)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        x, *saved = ctx.saved_tensors
        count = 2 * len(ctx.groups)
        matrices, inner, dtype = saved[:count], saved[count:], ctx.dtype
        grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[1] else None
        rows_in, rows_grad, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), []
        for group, down, up, low in zip(ctx.groups, matrices[::2], matrices[1::2], inner):
            part, grad_out = rows_in[group.start : group.stop].to(dtype), rows_grad[group.start : group.stop].to(dtype)
            kept = group.kept(part) if group.dropout else None
            grad_low = (grad_out @ up.to(dtype)).mul_(group.scaling)  # (rows, r)
            grads.append((grad_low.T @ (part if kept is None else part * kept)).to(down.dtype))
            grads.append((grad_out.T @ low).mul_(group.scaling).to(up.dtype))
            if grad_x is not None:
                grad_part = grad_x.view(-1, x.shape[-1])[group.start : group.stop]  # (rows, in)
                _add_product(grad_part, grad_low, down.to(dtype), 1.0)
                if kept is not None:
                    grad_part.mul_(kept)
        return grad, grad_x, None, None, *grads


class FusedAdapter:
    """One adapter of a FusedLora: its matrices in float32, live, by the names of their layers.

    down {layer: A (rank, in)}, up {layer: B (out, rank)}. passes: how often it has been in a batch;
    with the seed and the layer this number makes the dropout masks, so that a resumed run (which
    sets it) draws the same ones, in whatever company.
    """

    def __init__(
        self, layers: dict[str, torch.nn.Module], base: Any, rank: int, alpha: float, dropout: float, seed: int
    ):
        self.rank, self.alpha, self.dropout, self.seed, self.passes = rank, alpha, dropout, seed, 0
        self.down: dict[str, torch.nn.Parameter] = {}
        self.up: dict[str, torch.nn.Parameter] = {}
        self._layers, self._base = layers, base
        generator = torch.Generator().manual_seed(seed)
        for name, layer in layers.items():
            out_features, in_features = linear_shape(layer)
            down = torch.empty(rank, in_features)
            torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            self.down[name] = torch.nn.Parameter(down.to(layer.weight.device))
            self.up[name] = torch.nn.Parameter(torch.zeros(out_features, rank, device=layer.weight.device))

    def parameters(self) -> list[torch.nn.Parameter]:
        """What an optimizer trains: A and B of every layer."""
        return [matrix for name in self.down for matrix in (self.down[name], self.up[name])]

    def lora_layers(self, component: str = "lm") -> list[LoraLayer]:
        """The layers as CS is measured on them, with live references to the matrices."""
        return [
            LoraLayer(name, component, frozen_weight(layer), self.down[name], self.up[name])
            for name, layer in self._layers.items()
        ]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{PEFT's name in adapter_model.safetensors: live matrix}."""
        pairs = (("lora_A", self.down), ("lora_B", self.up))
        return {
            f"base_model.model.{name}.{kind}.weight": matrices[name].detach()
            for name in self.down
            for kind, matrices in pairs
        }

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy saved matrices in, in place. Raises ValueError where names or shapes are not those
        of this adapter."""
        own = self.state_dict()
        if {name: tensor.shape for name, tensor in own.items()} != {
            name: tensor.shape for name, tensor in tensors.items()
        }:
            raise ValueError("these weights belong to another adapter: its layers or its rank differ")
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

    def peft_config(self) -> LoraConfig:
        """The LoraConfig with which PEFT makes this adapter."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self._layers),
            lora_dropout=self.dropout,
            bias="none",
            task_type="CAUSAL_LM",
            fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in self._layers.values()),
            base_model_name_or_path=getattr(self._base.config, "_name_or_path", None),
            inference_mode=True,
        )

    def save_pretrained(self, folder: Union[str, Path]) -> None:
        """Write adapter_model.safetensors and adapter_config.json as PEFT does."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, str(Path(folder) / "adapter_model.safetensors"), metadata={"format": "pt"})
        self.peft_config().save_pretrained(str(folder))

    def save_peft(self, folder: Union[str, Path], facts: dict[str, Any]) -> None:
        """A PEFT adapter folder that appears whole, with facts (JSON values) in its metadata under
        `es_lora`."""
        save_adapter(self, Path(folder), facts)


def _mask_seed(seed: int, passes: int, layer: int) -> int:
    return ((seed * 1_000_003 + passes) * 1_000_003 + layer) % 2**63


@dataclass
class _Pass:
    """The rows of the batch under way: (adapter, its number of passes, first row, row after its
    last one)."""

    parts: list[tuple[FusedAdapter, int, int, int]]
    rows: int
    length_tokens: Optional[int] = (
        None  # what the embedding has seen; for models that flatten (rows, T, in) to (rows * T, in)
    )

    def inputs_a_row(self, x: torch.Tensor) -> int:
        """How many input vectors of x belong to each row. Raises ValueError where x is not of this
        batch."""
        if x.dim() > 2 and x.shape[0] == self.rows:
            return x[0].numel() // x.shape[-1]
        if x.dim() == 2 and self.length_tokens is not None and x.shape[0] == self.rows * self.length_tokens:
            return self.length_tokens
        raise ValueError(
            f"rows() was given {self.rows} rows, and a layer with a LoRA got an input of shape {tuple(x.shape)}"
        )


class FusedLora:
    """Puts adapters on the linear layers of a frozen model by hooks; see the example at the top of
    the file.

    model: every parameter that is not an adapter's is left as it is: freeze it where gradients are
    not wanted. In a PeftModel the layers that PEFT has wrapped are meant; its own adapter still
    acts on all rows, unless the caller disables it (`with model.disable_adapter()`). Layers of
    PEFT's DoRA or with a bias of their own trained are not covered.
    """

    def __init__(self, model: torch.nn.Module):
        self._base = model.get_base_model() if isinstance(model, PeftModel) else model
        self._layers = linear_layers(self._base)
        self._indices = {name: index for index, name in enumerate(self._layers)}
        self.adapters: dict[str, FusedAdapter] = {}
        self._pass: Optional[_Pass] = None
        self._hooks = [layer.register_forward_hook(self._hook(name)) for name, layer in self._layers.items()]
        self._hooks.append(self._base.get_input_embeddings().register_forward_hook(self._note_length))

    def add(
        self,
        name: str,
        *,
        rank: int,
        alpha: float,
        target_modules: Union[str, Sequence[str]] = "all",
        dropout: float = 0.0,
        seed: int = 0,
    ) -> FusedAdapter:
        """A fresh adapter, as PEFT starts one (A uniform after Kaiming, B zero), scaled by alpha /
        rank.

        target_modules: `all`, `attention` or names, as base.layers.lora_target_names reads them.
        seed: of A and of dropout; torch's global random state is neither used nor changed. Raises
        ValueError for a name that is taken or that a layer does not have, a rank below 1, a dropout
        outside 0 to 1.
        """
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name!r} already; give each a name of its own")
        if rank < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"rank {rank} and dropout {dropout}: rank must be at least 1, dropout at least 0 and below 1"
            )
        wanted = target_modules if isinstance(target_modules, str) else ",".join(target_modules)
        layers = {target: self._layers[target] for target in lora_target_names(self._base, wanted)}
        self.adapters[name] = FusedAdapter(layers, self._base, rank, alpha, dropout, seed)
        return self.adapters[name]

    def remove(self, name: str) -> None:
        """Forget an adapter; whoever still holds it can read and save it."""
        del self.adapters[name]

    @contextmanager
    def rows(self, counts: Sequence[tuple[Optional[str], int]], counted: bool = True) -> Iterator[None]:
        """While open, a batch's rows go through these adapters in this order: (name, number of
        rows); None: the base alone.

        counted False: an evaluation, which leaves the adapters' number of passes, and so their next
        dropout masks, alone. Raises KeyError for a name that was not added, and, in the pass,
        ValueError for a batch with another number of rows.
        """
        parts, row = [], 0
        for name, count in counts:
            if name is not None:
                adapter = self.adapters[name]
                parts.append((adapter, adapter.passes, row, row + count))
                adapter.passes += counted
            row += count
        outer, self._pass = self._pass, _Pass(parts, row)
        try:
            yield
        finally:
            self._pass = outer

    def close(self) -> None:
        """Take the hooks off: the model is again as it was."""
        for hook in self._hooks:
            hook.remove()

    def _note_length(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        if self._pass is not None:
            self._pass.length_tokens = output.shape[1]

    def _hook(self, name: str) -> Any:
        def add_low_rank(layer: torch.nn.Module, args: tuple, output: torch.Tensor) -> Optional[torch.Tensor]:
            if self._pass is None:
                return None
            x, groups, matrices = args[0], [], []
            each = self._pass.inputs_a_row(x) if self._pass.parts else 0
            for adapter, passes, first, last in self._pass.parts:
                if name in adapter.down:
                    dropout = adapter.dropout if layer.training else 0.0
                    seed = _mask_seed(adapter.seed, passes, self._indices[name])
                    groups.append(_Group(first * each, last * each, adapter.alpha / adapter.rank, dropout, seed))
                    matrices += [adapter.down[name], adapter.up[name]]
            if not groups:
                return None
            autocast = torch.is_autocast_enabled(x.device.type)
            dtype = torch.get_autocast_dtype(x.device.type) if autocast else matrices[0].dtype
            return _GroupedLowRank.apply(output, x, groups, dtype, *matrices)

        return add_low_rank
