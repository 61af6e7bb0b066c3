"""Shadow adapters of a language model: small LoRAs beside the main one; see es_lora/shadows.py.

Every micro-batch goes through the frozen base a second time, its rows repeated for the shadows that
train on them, each row through its own (fused_lora). The main adapter is off."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapters.fused_lora import FusedLora
from es_lora.shadows import ShadowTraining, auto_interval, make_folds, seed_of
from es_lora.weights import stored_tensors
from settings.flags import Settings
from text.collator import IGNORE_INDEX, CausalCollator, pad_batch
from training.losses import Batch, predicted, row_losses

EXAMPLE = "shadow_example"  # the column that names a row's example
NO_EXAMPLE = -1
INPUTS = ("input_ids", "attention_mask", "position_ids")
STATE_NAME = "shadows.safetensors"


def with_examples(rows: Dataset, shadows: int, seed: int) -> Dataset:
    """The same with a column that numbers the examples; equal texts are one example: none leaks.
    Raises ValueError where there are too few for so many shadows: before a base has been loaded."""
    first: dict[tuple[str, str], int] = {}
    numbers = [first.setdefault(pair, number) for number, pair in enumerate(zip(rows["input"], rows["output"]))]
    make_folds(numbers, shadows, seed)
    return rows.add_column(EXAMPLE, numbers)


class ExampleCollator:
    """A collator that passes the column on, if rows have it: the batch's EXAMPLE is (N, 1) int64;
    of packed rows (N, T), every token's, NO_EXAMPLE where it is padding."""

    def __init__(self, collator: Callable[[Sequence[dict]], Batch]):
        self.collator = collator

    def __call__(self, rows: Sequence[dict]) -> Batch:
        batch = self.collator(rows)
        if EXAMPLE in rows[0]:
            of_tokens = isinstance(rows[0][EXAMPLE], list)
            numbers = [row[EXAMPLE] if of_tokens else [row[EXAMPLE]] for row in rows]
            width = batch["input_ids"].shape[1] if of_tokens else 1
            batch[EXAMPLE] = pad_batch(numbers, NO_EXAMPLE, length=width)["input_ids"]
        return batch


class ShadowAdapters(TrainerCallback):
    """K shadows of a PeftModel: `backward` after each main micro-batch, `score` for the column.

    settings: the trainer's. rows: the training examples with their column EXAMPLE. trained: how
    many rows an epoch has; fewer where they are packed. resume: a checkpoint's folder to go on
    from. As a callback it takes the optimizer steps. Raises ValueError where the checkpoint's
    shadows are others or none."""

    def __init__(
        self,
        settings: Settings,
        model: PeftModel,
        rows: Dataset,
        trained: int,
        collator: CausalCollator,
        resume: Optional[str] = None,
    ):
        stop, training = settings.stop, settings.training
        self.model = model
        folds = make_folds(rows[EXAMPLE], stop.shadows, training.seed)
        self.names = [f"shadow_{number}" for number in range(stop.shadows)]
        self.fused = FusedLora(model)
        self.adapters = [
            self.fused.add(
                name,
                rank=stop.shadow_rank,
                alpha=training.lora_alpha,  # learns as fast as the main adapter: see es_lora/shadows.py
                target_modules=training.lora_modules,
                dropout=training.lora_dropout,
                seed=seed_of(training.seed, name) % 2**31,
            )
            for name in self.names
        ]
        self.training = ShadowTraining(
            folds,
            [[{"params": adapter.parameters()}] for adapter in self.adapters],
            max_norm=training.max_grad_norm,
            interval=stop.shadow_interval,
            seed=f"{training.seed}/{training.process_index}",
            average=stop.average_width,
            sum_over_processes=_sum_over_processes if training.world_size > 1 else None,
        )
        self._rows, self._packed_into = trained, len(rows) / trained
        self._fold_of = torch.full((len(rows),), NO_EXAMPLE)
        self._fold_of[list(folds)] = torch.tensor(list(folds.values()))
        self._rows_a_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        self._fold_batches = _fold_batches(folds, rows, collator, training.per_device_eval_batch_size)
        if resume is not None:
            self._resume(Path(resume))

    def _resume(self, checkpoint: Path) -> None:
        if not (checkpoint / STATE_NAME).is_file():
            raise ValueError(
                f"{checkpoint} holds no {STATE_NAME}: that run had no shadows; go on without, or start anew"
            )
        self.training.load_state_tensors(dict(stored_tensors(checkpoint / STATE_NAME)))

    @contextmanager
    def _passing(self, rows_of_each: Sequence[int]) -> Iterator[None]:
        """For one pass and its gradients: so many rows through each shadow, main adapter off."""
        with self.training.apart(), self.model.disable_adapter():
            for adapter in self.adapters:
                adapter.passes = self.training.pass_seed()
            with self.fused.rows([(name, count) for name, count in zip(self.names, rows_of_each) if count]):
                yield

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss and number of predicted tokens of each row, (N,) both."""
        logits = self.model(**{name: batch[name] for name in INPUTS if name in batch}).logits  # (N, T, V)
        return row_losses(logits, batch["labels"]), predicted(batch["labels"])

    def backward(self, batch: Batch, examples: torch.Tensor) -> None:
        """Add each shadow's gradients of a micro-batch: (N, T) `input_ids`, `labels`, ...; examples
        of each row or token. No token of its fold is learnt; others may stand before it in a packed
        sequence."""
        if not self.training.trains_now():
            return
        folds = self._fold_of[examples.cpu()].masked_fill(examples.cpu() == NO_EXAMPLE, NO_EXAMPLE)
        folds = folds.to(batch["labels"].device)
        labels = [batch["labels"].masked_fill(folds == shadow, IGNORE_INDEX) for shadow in range(len(self.names))]
        rows = [predicted(own).nonzero().flatten() for own in labels]
        if not sum(map(len, rows)):
            return
        chosen = {name: batch[name][torch.cat(rows)] for name in INPUTS if name in batch}
        chosen["labels"] = torch.cat([own[kept] for own, kept in zip(labels, rows)])
        with self._passing([len(own) for own in rows]):
            losses, tokens = self._losses(chosen)
            counts = [int(part.sum()) for part in tokens.split([len(own) for own in rows])]
            self.training.backward(losses.sum(), counts)

    def save_state(self, checkpoint: Path) -> None:
        """Write what a resumed run needs into a checkpoint's folder, on rank 0."""
        save_file(self.training.state_tensors(), str(checkpoint / STATE_NAME))

    def state_saved(self, checkpoint: Path) -> None:
        """The checkpoint has its name; nothing is left to do."""

    def score(self) -> Optional[float]:
        """The mean of the folds' losses a token, of the shadows' averages where they have some;
        None where it is not due."""
        if self.training.interval is None:
            fold = sum(shadow == 0 for shadow in self.training.folds.values())
            measured_rows = self._rows_a_step * self.training.steps_a_measurement
            self.training.interval = auto_interval(fold / self._packed_into, measured_rows, self._rows)
        if not self.training.score_is_due():
            return None
        with self.training.weights_to_score():
            losses = self.fold_losses()
        return sum(losses) / len(losses)

    @torch.no_grad()
    def fold_losses(self) -> list[float]:
        """Each shadow's loss a token on its own fold, its weights as they are."""
        sums = torch.zeros(self.training.count, 2, dtype=torch.float64)  # (K, loss and tokens)
        was_training = self.model.training
        self.model.eval()
        for batch, rows_of_each in self._fold_batches:
            with self._passing(rows_of_each):
                on_device = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
                facts = torch.stack(self._losses(on_device), 1).double().cpu()  # (N, 2)
            sums += torch.stack([part.sum(0) for part in facts.split(rows_of_each)])
        self.model.train(was_training)
        return (sums[:, 0] / sums[:, 1].clamp_min(1)).tolist()

    # -------------------------------------------------------------------------------- as a callback

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training.step(kwargs["optimizer"])
        self.training.average()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.fused.close()


def _sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(tensor)
    return tensor


def _fold_batches(
    folds: Mapping[int, int], rows: Dataset, collator: CausalCollator, batch_size: int
) -> list[tuple[Batch, list[int]]]:
    """The examples of all folds as batches of like length: (batch, each shadow's rows in order)."""
    shadows = max(folds.values()) + 1
    indices = [index for index, example in enumerate(rows[EXAMPLE]) if example in folds and example == index]
    lengths = dict(zip(indices, collator.lengths(rows.select(indices))))
    indices.sort(key=lambda index: lengths[index])
    batches = []
    for start in range(0, len(indices), batch_size):
        part = sorted(indices[start : start + batch_size], key=folds.get)
        members = [folds[index] for index in part]
        counts = [members.count(shadow) for shadow in range(shadows)]
        batches.append((collator([rows[index] for index in part]), counts))
    return batches
