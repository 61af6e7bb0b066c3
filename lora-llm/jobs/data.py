"""A job's examples as token ids, and its measurements: what is wrong is found before training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch

from base.layers import Positions, positions_notices
from es_lora.monitor import MEASURED
from es_lora.rules import AVERAGED
from es_lora.settings import MeasurementPlan
from jobs.config import Job
from text.collator import IGNORE_INDEX, CausalCollator, pad_batch
from text.conversations import conversation_format, with_chat_template
from text.sources import load_splits
from text.usable import Cuts, Limit, usable_rows
from training.epoch_order import epoch_order

COMPONENT = "lm"
# Columns of the history that every job records; held-out examples add `heldout_loss`.
RECORDED = {*MEASURED, "grad_evidence"}


@dataclass(frozen=True)
class Example:
    """Token ids of source and target, and the labels: IGNORE_INDEX where nothing is learned."""

    ids: list[int]
    labels: list[int]

    @property
    def targets(self) -> int:
        """How many tokens are predicted; nothing predicts the first."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def encode_examples(rows: Any, collator: CausalCollator) -> list[Example]:
    """Examples of the rows {"input", "output"}, as the collator cuts and masks them."""
    return [Example(*collator.labelled(row)) for row in rows]


def _learnt_examples(
    rows: Any, collator: CausalCollator, what: str, positions: Optional[Positions], limit: Optional[Limit] = None
) -> tuple[list[Example], list[str]]:
    """(the examples of which a token is learnt, notices of what is cut and left out).

    limit: of conversations, None: nothing is said of those that are cut. Raises ValueError where
    there is no such example, and where one is longer than a table of positions.
    """
    cuts = Cuts(collator, "source_max_len", "target_max_len", conversations=limit)
    rows, sizes, notices = usable_rows(rows, cuts, what)
    longest = max((size.kept for size in sizes), default=0)
    notices += positions_notices(positions, longest, "source_max_len and target_max_len")
    return encode_examples(rows, collator), notices


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, each (rows, longest), padded on the right."""
    batch = pad_batch([example.ids for example in examples], pad_id)
    return {**batch, "labels": pad_batch([example.labels for example in examples], IGNORE_INDEX)["input_ids"]}


@dataclass
class JobData:
    """A job that can be trained: examples, budget in optimizer steps, when it is measured, and the
    tokenizer to save. chats: a chat template writes its rows."""

    job: Job
    train: list[Example]
    heldout: Optional[list[Example]]
    source: str
    steps_per_epoch: int
    total_steps: int
    plan: MeasurementPlan
    tokenizer: Any
    chats: bool
    notices: list[str]

    @property
    def longest(self) -> int:
        """Tokens of the longest training example."""
        return max(len(example.ids) for example in self.train)

    def micro_batches(self, epoch: int) -> list[list[Example]]:
        """The micro-batches of an epoch, in order; the last may be smaller."""
        job, lengths = self.job, [len(example.ids) for example in self.train]
        order = epoch_order(lengths, job.batch_size * job.accumulation, job.seed, epoch, job.group_by_length)
        return [
            [self.train[index] for index in order[at : at + job.batch_size]]
            for at in range(0, len(order), job.batch_size)
        ]


def prepare_job(
    job: Job, tokenizer: Any, cache_dir: Optional[str] = None, positions: Optional[Positions] = None
) -> JobData:
    """Load, encode and plan. positions: the base's.

    Raises ValueError or FileNotFoundError for a job that cannot train.
    """
    problems = job.problems()
    if problems:
        raise ValueError("; ".join(problems))
    limit = Limit(job.source_max_len + job.target_max_len, "source_max_len or target_max_len")
    conversations = conversation_format(tokenizer) if job.learn_turns == "all" else None
    splits = load_splits(job.data_spec(cache_dir, conversations))
    if splits.chats:
        tokenizer = with_chat_template(tokenizer)
    collator = CausalCollator(tokenizer, job.source_max_len, job.target_max_len, job.train_on_source)
    train, notices = _learnt_examples(splits.train, collator, "training", positions, limit)
    steps_per_epoch = math.ceil(math.ceil(len(train) / job.batch_size) / job.accumulation)
    total_steps = job.max_steps or math.ceil(job.epochs * steps_per_epoch)
    plan = job.stop_settings()[0].plan([COMPONENT], steps_per_epoch, total_steps)
    heldout = None
    if splits.evaluation is not None:
        heldout, more = _learnt_examples(splits.evaluation, collator, "held-out", positions)
        notices += more
    notices = [*plan.notices, *notices]
    data = JobData(
        job, train, heldout, splits.source, steps_per_epoch, total_steps, plan, tokenizer, splits.chats, notices
    )
    recorded = RECORDED | ({"heldout_loss", "heldout_loss" + AVERAGED} if heldout else set())
    missing = [name for name in plan.rule().needs if name not in recorded]
    if missing:
        raise ValueError(
            f"stop_rule {job.stop_rule} needs {', '.join(missing)}, which this job does not record; choose another"
        )
    return data
