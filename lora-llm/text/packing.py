"""Short samples packed into sequences of one length, so that no time goes into padding.

`samples`: whole samples share a sequence (TRL's best-fit packing); position ids restart with each
and none attends to another, so that the losses are those of the samples apart. `wrapped`: one
contiguous stream, cut every seq_length tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Union

import torch
from datasets import Dataset, IterableDataset
from transformers import DataCollatorWithFlattening
from transformers.utils import is_flash_attn_2_available

from text.collator import IGNORE_INDEX, CausalCollator, pad_batch
from text.formats import LEARN

PACKINGS = ("samples", "wrapped")
LEAK = 0.5  # share of what attention across samples would change, from which it is said to go across


def uses_varlen_kernel(on_cpu: bool, half_precision: bool) -> bool:
    """Whether packed samples go through flash attention's kernel for sequences of several
    lengths."""
    return is_flash_attn_2_available() and not on_cpu and half_precision


def encode_sample(collator: CausalCollator, row: Mapping[str, Any]) -> dict[str, list[int]]:
    """One sample as `input_ids` and `labels` of the same length, ending with the end-of-text token.

    Its first token is not learnt: what comes before it belongs to another sample. Nor is an end
    that a cut has made.
    """
    ids, labels = collator.labelled(row)
    end = collator.tokenizer.eos_token_id
    if ids[-1] != end:
        ids, labels = [*ids, end], [*labels, IGNORE_INDEX]
    return {"input_ids": ids, "labels": [IGNORE_INDEX, *labels[1:]]}


def pack(
    samples: Union[Dataset, IterableDataset],
    collator: CausalCollator,
    packing: str,
    seq_length: int,
    spread: Sequence[str] = (),
) -> Union[Dataset, IterableDataset]:
    """Rows {"input", "output"} as rows of at most seq_length tokens: `input_ids`, `labels` and, for
    `samples`, `seq_lengths`.

    A sample longer than seq_length is cut there. Sequences without a learnt token are left out.
    A stream's rows are packed a thousand at a time. spread: columns whose value every token of a
    sample gets.
    """
    from trl import pack_dataset  # not above: only packing needs it

    def encoded_sample(row: Mapping[str, Any]) -> dict[str, list[int]]:
        sample = encode_sample(collator, row)
        return {**sample, **{column: [row[column]] * len(sample["labels"]) for column in spread}}

    named = isinstance(samples, Dataset)  # a stream shows no progress
    encoded = samples.map(
        encoded_sample,
        remove_columns=samples.column_names or ["input", "output", LEARN],
        **({"desc": "Reading tokens"} if named else {}),
    )
    strategy = "bfd" if packing == "samples" else "wrapped"
    packed = pack_dataset(encoded, seq_length, strategy, {"desc": "Packing"} if named else {})
    return packed.filter(_learns, input_columns="labels", **({"desc": "Learnt sequences"} if named else {}))


def _learns(labels: Sequence[int]) -> bool:
    """Whether a token of a sequence is learnt; nothing predicts its first."""
    return any(label != IGNORE_INDEX for label in labels[1:])


def packing_notice(samples: int, packed: Dataset, seq_length: int) -> str:
    """How many sequences there are and how full they are, in plain words."""
    tokens = sum(map(len, packed["input_ids"]))
    share = 100 * tokens / (len(packed) * seq_length)
    return f"Packed: {samples} samples in {len(packed)} sequences of {seq_length} tokens, {share:.0f} % of them filled."


class PackedCollator:
    """Packed rows as tensors; rows of text go to the collator for single samples (evaluation is
    never packed).

    N packed rows become `input_ids`, `labels` and `position_ids` (N, T), T = seq_length, and
    `attention_mask`: for `samples` (N, 1, T, T), True where a token may look at another (itself and
    earlier ones of its sample), the form that SDPA takes; for `wrapped` (N, T). With `varlen` there
    is one row (1, tokens) without padding, and the lengths for flash attention.
    """

    def __init__(self, single: CausalCollator, packing: str, seq_length: int, varlen: bool = False):
        self.single, self.packing, self.seq_length = single, packing, seq_length
        self._flatten = (
            DataCollatorWithFlattening(return_flash_attn_kwargs=True) if varlen and packing == "samples" else None
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if "input_ids" not in rows[0]:
            return self.single(rows)
        if self._flatten is not None:
            return self._flatten([sample for row in rows for sample in _samples_of(row)])
        batch = pad_batch(
            [row["input_ids"] for row in rows], self.single.tokenizer.eos_token_id, length=self.seq_length
        )
        batch["labels"] = pad_batch([row["labels"] for row in rows], IGNORE_INDEX, length=self.seq_length)["input_ids"]
        if self.packing == "samples":
            lengths = [[*row["seq_lengths"], self.seq_length - len(row["input_ids"])] for row in rows]
            batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
            batch["attention_mask"] = block_mask(lengths)
        return batch


def _samples_of(row: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    start, samples = 0, []
    for length in row["seq_lengths"]:
        part = slice(start, start + length)
        samples.append({"input_ids": row["input_ids"][part], "labels": row["labels"][part]})
        start += length
    return samples


def block_mask(lengths: Sequence[Sequence[int]]) -> torch.Tensor:
    """(N, 1, T, T) for N rows of samples of these lengths: True on and below the diagonal of each
    sample's block."""
    owners = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])  # (N, T)
    same = owners[:, None, :, None] == owners[:, None, None, :]
    return same.tril()


@torch.no_grad()
def check_base_keeps_samples_apart(model: torch.nn.Module) -> None:
    """Two samples in one sequence: the second must give the logits that it gives alone, whatever
    the first is.

    Raises ValueError for a base that takes no block mask or no position ids.
    """
    training, (first, other, second) = model.training, torch.arange(3, 27).view(3, 8).to(model.device)
    mask = block_mask([[8, 8]]).to(model.device)
    positions = torch.arange(8, device=model.device).repeat(2)[None]
    model.eval()

    def logits(*samples: torch.Tensor, **inputs: Any) -> torch.Tensor:
        return model(input_ids=torch.cat(samples)[None], **inputs).logits[0, -8:].float()  # (8, vocabulary)

    try:
        packed = {"attention_mask": mask, "position_ids": positions}
        alone, apart, changed = logits(second), logits(first, second, **packed), logits(other, second, **packed)
        open_effect = (logits(first, second) - alone).abs().max()
        leak = torch.maximum((apart - changed).abs().max(), (apart - alone).abs().max())
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(_not_packable(model, str(error).strip().splitlines()[0])) from error
    finally:
        model.train(training)
    if not leak < LEAK * open_effect:
        raise ValueError(_not_packable(model, "packed samples see each other or have wrong positions"))


def _not_packable(model: torch.nn.Module, why: str) -> str:
    kind = model.config.model_type
    return (
        f"--packing: a {kind} base does not keep packed samples apart ({why}); use --packing wrapped, or leave it out"
    )
