"""Where training text comes from: a hub name, a local table or MMLU, split by a seed into train,
evaluation and test.

The flags mean what they mean in qlora: the evaluation split is taken from the training rows where
the source has none of its own, `--max_train_samples` and `--max_eval_samples` truncate after the
split. Beside them `--eval_dataset` names a separate held-out file and `--test_dataset_size` asks
for a third split. What is held out never stays in train: not the row, and not a copy of it.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from text.deeplake_rows import PREFIX, deeplake_rows
from text.formats import (
    LEARN,
    Format,
    Row,
    check_columns,
    convert_row,
    described,
    to_input_output,
    unused_columns,
    with_asides,
)
from text.hub import hub_dataset
from text.mmlu import train_split_for_subject
from text.spec import DataSpec
from text.tables import TABLE_SUFFIXES, read_table
from text.usable import StreamTally

logger = logging.getLogger(__name__)
# Name as qlora spells it -> arguments of datasets.load_dataset.
HUB_DATASETS: dict[str, dict[str, str]] = {
    "alpaca": {"path": "tatsu-lab/alpaca"},
    "alpaca-clean": {"path": "yahma/alpaca-cleaned"},
    "chip2": {"path": "laion/OIG", "data_files": "unified_chip2.jsonl"},
    "self-instruct": {"path": "yizhongw/self_instruct", "name": "self_instruct"},
    "hh-rlhf": {"path": "Anthropic/hh-rlhf"},
    "longform": {"path": "akoksal/LongForm"},
    "oasst1": {"path": "timdettmers/openassistant-guanaco"},
    "lima": {"path": "GAIR/lima", "data_files": "train.jsonl"},  # its test questions have no answers
}
_EVALUATION_NAMES = ("eval", "validation", "valid", "val")
Pools = dict[str, Optional[Dataset]]


@dataclass
class Splits:
    """Three data sets of columns "input" and "output" (text), and "learn" of conversations; one
    that was not asked for is None.

    chats: rows are written by a chat template. tally: counts the rows of a stream, None of a table.
    """

    train: Dataset | IterableDataset | None
    evaluation: Dataset | None
    test: Dataset | None
    format: str
    source: str
    chats: bool = False
    tally: StreamTally | None = None


def load_splits(spec: DataSpec) -> Splits:
    """The rows of a DataSpec as {"input", "output"}, split; the same seed gives the same splits.

    Raises FileNotFoundError or ValueError with one message that says what is wrong and what to do.
    """
    spec.check()
    pools, format_name, source = _load_pools(spec)
    if spec.eval_dataset:
        pools["evaluation"], _ = read_pairs(spec.eval_dataset, spec)
        pools["train"] = _without_copies(pools["train"], pools["evaluation"])
    pools = _hold_out(pools, spec)
    train, evaluation = pools["train"], pools["evaluation"]
    if spec.train and not len(train):
        raise ValueError(f"no training rows are left of {source}: hold out fewer rows or give more data")
    return Splits(
        train=_truncated(train, spec.max_train_samples) if spec.train else None,
        evaluation=_truncated(evaluation, spec.max_eval_samples) if evaluation is not None else None,
        test=pools["test"],
        format=format_name,
        source=source,
        chats=any(LEARN in pool.column_names for pool in pools.values() if pool is not None),
    )


@dataclass(frozen=True)
class Source:
    """One data set of --dataset; weight is its share of what is drawn, None where all rows of all
    sets are taken."""

    name: str
    weight: float | None


def data_sources(given: str | Sequence[str]) -> list[Source]:
    """NAME or NAME:WEIGHT, one or several. Raises ValueError on a weight that is none and where
    only some have one."""
    sources = [_source_of(text) for text in ([given] if isinstance(given, str) else given)]
    if len(sources) == 1:
        return [Source(sources[0].name, None)]
    if len({source.weight is None for source in sources}) > 1:
        raise ValueError("--dataset: give every data set a weight, or none: --dataset a.jsonl:0.7 b.jsonl:0.3")
    if any(source.name == "mmlu" for source in sources):
        raise ValueError("--dataset mmlu cannot be mixed with others: it is split by its authors")
    return sources


def _source_of(text: str) -> Source:
    name, colon, number = text.rpartition(":")
    try:
        weight = float(number) if colon and not Path(text).exists() else None
    except ValueError:  # deeplake:PATH, https://...
        weight = None
    if weight is None:
        return Source(text, None)
    if not 0 < weight < float("inf"):
        raise ValueError(f"--dataset {text}: the weight must be a number above 0")
    return Source(name, weight)


def mixed(datasets: Sequence[Dataset], sources: Sequence[Source], seed: int) -> Dataset:
    """All rows of all sets; with weights, rows drawn by them until one set is used up, none
    twice."""
    if sources[0].weight is None:
        return concatenate_datasets(list(datasets))
    total = sum(source.weight for source in sources)
    shares = [source.weight / total for source in sources]
    return interleave_datasets(list(datasets), probabilities=shares, seed=seed, stopping_strategy="first_exhausted")


def read_table_as_pairs(path: str | Path, format_name: str | Format | None = None) -> tuple[Dataset, str]:
    """A local table as (data set of "input"/"output", its format's name); without a name the
    columns tell the format.

    Raises FileNotFoundError, or ValueError that names the line, on a broken line, a missing column,
    a cell that is no text, an empty output and an empty file.
    """
    return read_pairs(path, DataSpec(str(path), format_name))


def read_pairs(path: str | Path, spec: DataSpec) -> tuple[Dataset, str]:
    """The same, by the formats of a DataSpec."""
    return _as_pairs(read_table(path), str(path), spec, "line")


def _as_pairs(rows: list[tuple[int, dict[str, Any]]], path: str, spec: DataSpec, unit: str) -> tuple[Dataset, str]:
    columns = sorted({column for _, row in rows for column in row})
    try:
        format_name = spec.format_of(columns, rows[0][1])
        check_columns(columns, format_name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    pairs = [convert_row(row, format_name, f"{path}, {unit} {number}") for number, row in rows]
    empty = [str(number) for (number, _), pair in zip(rows, pairs) if not pair["output"].strip()]
    if empty:
        raise ValueError(
            f"{path}: {len(empty)} row(s) have an empty output, first at {unit} {', '.join(empty[:3])}: "
            "there is nothing to learn from them, remove them or fill them in"
        )
    say_unused(path, (row for _, row in rows), format_name)
    name = format_name if isinstance(format_name, str) else described(format_name)
    return Dataset.from_list(pairs), name + with_asides((row for _, row in rows), format_name)


def say_unused(name: str, rows: Iterable[Row], format_name: str | Format) -> None:
    """Name the columns that hold something and that the format does not read."""
    unused = unused_columns(rows, format_name)
    if unused:
        logger.warning("%s: columns that are not used: %s", name, ", ".join(unused))


def _load_pools(spec: DataSpec) -> tuple[Pools, str, str]:
    """The source's own splits named train, evaluation and test (None where it has none), its format
    and description."""
    sources = data_sources(spec.dataset)
    loaded = [_load_source(source.name, spec) for source in sources]
    if len(loaded) == 1:
        return loaded[0]
    own = [pools["evaluation"] for pools, _, _ in loaded]
    train = mixed([pools["train"] for pools, _, _ in loaded], sources, spec.seed)
    evaluation = None if any(split is None for split in own) else concatenate_datasets(own)
    formats = dict.fromkeys(format_name for _, format_name, _ in loaded)
    pools = {"train": train, "evaluation": evaluation, "test": None}
    return pools, ", ".join(formats), f"{len(train)} rows of {' and '.join(source for _, _, source in loaded)}"


def _load_source(name: str, spec: DataSpec) -> tuple[Pools, str, str]:
    if name == "mmlu":
        return _load_mmlu(spec)
    if name.startswith(PREFIX):
        rows = list(deeplake_rows(name))
        if not rows:
            raise ValueError(f"{name} has no rows: give at least one")
        train, format_name = _as_pairs(rows, name, spec, "row")
        return {"train": train, "evaluation": None, "test": None}, format_name, f"{name} ({len(train)} rows)"
    if is_path(name):
        train, format_name = read_pairs(name, spec)
        return {"train": train, "evaluation": None, "test": None}, format_name, f"{name} ({len(train)} rows)"
    return _load_from_hub(name, spec)


def _load_mmlu(spec: DataSpec) -> tuple[Pools, str, str]:
    subject = spec.train_subject
    train, evaluation = (
        Dataset.from_list(rows).select_columns(["input", "output"])
        for rows in train_split_for_subject(spec.mmlu_dir, subject, spec.cache_dir)
    )
    test = None
    n_test = _row_count(spec.test_dataset_size, len(evaluation))
    if n_test:  # a subject trains on a handful of questions, so the third split is taken from the many that evaluate
        if n_test >= len(evaluation):
            raise ValueError(f"--test_dataset_size {n_test}: MMLU has {len(evaluation)} held-out rows here, give fewer")
        evaluation, test = _carve(evaluation, n_test, spec.seed)
    source = f"MMLU {subject or 'all subjects'}: dev + validation questions to train, test questions to evaluate"
    return {"train": train, "evaluation": evaluation, "test": test}, "mmlu", source


def is_path(name: str) -> bool:
    # A folder is left to load_dataset: a hub repository that was downloaded whole loads from there.
    if Path(name).expanduser().is_dir():
        return False
    return name.lower().endswith(TABLE_SUFFIXES) or name.startswith((".", "~", os.sep)) or Path(name).is_file()


def _load_from_hub(name: str, spec: DataSpec) -> tuple[Pools, str, str]:
    if name not in HUB_DATASETS and "/" not in name:
        nearest = difflib.get_close_matches(name, [*HUB_DATASETS, "mmlu"], n=1, cutoff=0.7)
        if nearest:
            raise ValueError(f"--dataset '{name}' is unknown; did you mean '{nearest[0]}'?")
    request = HUB_DATASETS.get(name, {"path": name})
    loaded = hub_dataset(request, spec.cache_dir)
    train = loaded.get("train")
    if train is None or not len(train):
        raise ValueError(f"{request['path']} has no training rows; its splits are {', '.join(loaded)}")
    format_name = spec.format_of(train.column_names, train[0], name)
    own = {
        "train": train,
        "evaluation": next((loaded[key] for key in _EVALUATION_NAMES if key in loaded), None),
        "test": loaded.get("test"),
    }
    sizes = {"evaluation": spec.eval_dataset_size, "test": spec.test_dataset_size}
    pools: Pools = {}
    for key, pool in own.items():
        if pool is None:
            pools[key] = None
            continue
        if sizes.get(key):  # published held-out splits can be large: a sample of the size asked for
            pool = _sample(pool, _row_count(sizes[key], len(train)), spec.seed)
        pools[key] = _without_empty_outputs(to_input_output(pool, format_name), f"{name} {key}")
    say_unused(name, [train[0]], format_name)
    format_name = format_name if isinstance(format_name, str) else described(format_name)
    return pools, format_name, f"{request['path']} from the Hugging Face hub ({len(train)} rows)"


def _without_empty_outputs(dataset: Dataset, what: str) -> Dataset:
    """Published sets have a few empty answers that nobody here can fix (alpaca has 28): dropped,
    and said so."""
    kept = dataset.filter(lambda output: bool(output.strip()), input_columns="output", desc="Empty outputs")
    if len(kept) < len(dataset):
        logger.warning("%s: %d rows with an empty output were left out", what, len(dataset) - len(kept))
    return kept


def _hold_out(pools: Pools, spec: DataSpec) -> Pools:
    """Takes evaluation, then test rows out of train where the source has no such split of its own.

    Evaluation comes first, so that asking for a test split does not change which rows evaluate.
    """
    train, evaluation, test = pools["train"], pools["evaluation"], pools["test"]
    test_size = spec.test_dataset_size
    wants_evaluation = spec.evaluate
    n_evaluation = _row_count(spec.eval_dataset_size, len(train)) if wants_evaluation and evaluation is None else 0
    n_test = _row_count(test_size, len(train)) if test is None else 0

    if wants_evaluation and evaluation is None and not n_evaluation:
        raise ValueError("--eval_dataset_size 0 leaves the evaluation split empty: give 1 or more, or --do_eval False")
    if n_evaluation + n_test > len(train) - bool(spec.train):
        raise ValueError(
            f"--eval_dataset_size {spec.eval_dataset_size} and --test_dataset_size {test_size} hold out "
            f"{n_evaluation + n_test} rows, but there are only {len(train)} and training needs some: "
            "hold out fewer, for example --eval_dataset_size 0.1 (a tenth)"
        )
    if n_evaluation:
        train, evaluation = _carve(train, n_evaluation, spec.seed)
    if n_test:
        train, test = _carve(train, min(n_test, len(train)), spec.seed)
    return {"train": train, "evaluation": evaluation if wants_evaluation else None, "test": test if test_size else None}


def _row_count(size: float | None, rows: int) -> int:
    """Rows that a --..._size asks for: at least one for a fraction, as many as it says
    otherwise."""
    size = size or 0
    return max(1, round(size * rows)) if 0 < size < 1 else int(size)


def _carve(dataset: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """(what stays, `count` rows drawn by the seed); copies of a drawn row do not stay either."""
    if count == len(dataset):
        return dataset.select([]), dataset
    parts = dataset.train_test_split(test_size=count, shuffle=True, seed=seed)
    return _without_copies(parts["train"], parts["test"]), parts["test"]


def _without_copies(dataset: Dataset, held_out: Dataset) -> Dataset:
    known = set(zip(held_out["input"], held_out["output"]))
    kept = [index for index, pair in enumerate(zip(dataset["input"], dataset["output"])) if pair not in known]
    if len(kept) == len(dataset):
        return dataset
    logger.warning("%d training rows that are also held out were left out of training", len(dataset) - len(kept))
    return dataset.select(kept)


def _sample(dataset: Dataset, count: int, seed: int) -> Dataset:
    return dataset if count >= len(dataset) else dataset.shuffle(seed=seed).select(range(count))


def _truncated(dataset: Dataset, limit: int | None) -> Dataset:
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
