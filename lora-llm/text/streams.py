"""--streaming: training rows are read as training asks for them; the data set never lies in memory
as a whole.

What is held out is the head of the stream. Rows are shuffled within a buffer, in an order given by
the seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, interleave_datasets

from text.deeplake_rows import PREFIX, deeplake_rows
from text.formats import Format, check_columns, convert_row, described
from text.hub import hub_dataset
from text.sources import HUB_DATASETS, Splits, data_sources, is_path, read_pairs, say_unused
from text.spec import DataSpec
from text.tables import csv_rows, json_line, text_lines
from text.usable import StreamTally

SHUFFLE_ROWS = 1000


class StreamedRowError(ValueError):
    """A row that cannot be used, found while training."""


def load_streamed_splits(spec: DataSpec) -> Splits:
    """As load_splits, with an IterableDataset for training.

    Evaluation rows are `eval_dataset`, or else the first `eval_dataset_size` of the stream, and
    test rows the next ones. Raises FileNotFoundError or ValueError where the first row of a source
    cannot be used.
    """
    spec.check()
    sources = data_sources(spec.dataset)
    if len(sources) > 1 and sources[0].weight is None:
        raise ValueError(
            "--streaming: several data sets need weights to be mixed by: --dataset a.jsonl:0.7 b.jsonl:0.3"
        )
    opened = [_open(source.name, spec) for source in sources]
    streams, formats = [stream for stream, _ in opened], dict.fromkeys(described(name) for _, name in opened)
    chats = any(isinstance(name, Format) and name.chats for _, name in opened)
    stream, seed = streams[0], spec.seed
    if len(sources) > 1:
        total = sum(source.weight for source in sources)
        shares = [source.weight / total for source in sources]
        stream = interleave_datasets(streams, probabilities=shares, seed=seed, stopping_strategy="first_exhausted")
    tally, evaluation, test = StreamTally(), None, None
    stream = stream.filter(tally.has_answer)
    if spec.eval_dataset:
        evaluation, _ = read_pairs(spec.eval_dataset, spec)
    elif spec.evaluate:
        evaluation, stream = _head(stream, int(spec.eval_dataset_size))
    if spec.test_dataset_size:
        test, stream = _head(stream, int(spec.test_dataset_size))
    held_out = [(row["input"], row["output"]) for part in (evaluation, test) if part is not None for row in part]
    if held_out:
        known = set(held_out)
        stream = stream.filter(lambda row: (row["input"], row["output"]) not in known)
    if spec.max_train_samples:
        stream = stream.take(spec.max_train_samples)
    if evaluation is not None and spec.max_eval_samples:
        evaluation = evaluation.select(range(min(spec.max_eval_samples, len(evaluation))))
    tally.counts.zero_()  # of the rows that were held out
    return Splits(
        train=stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS) if spec.train else None,
        evaluation=evaluation,
        test=test,
        format=", ".join(formats),
        source=f"the stream of {' and '.join(source.name for source in sources)}",
        chats=chats,
        tally=tally,
    )


def _head(stream: IterableDataset, count: int) -> tuple[Dataset, IterableDataset]:
    rows = list(stream.take(count))
    if len(rows) < count:
        raise ValueError(f"the stream ends after {len(rows)} rows, but {count} are to be held out: hold out fewer")
    return Dataset.from_list(rows), stream.skip(count)


def _open(name: str, spec: DataSpec) -> tuple[IterableDataset, str | Format]:
    """(stream of {"input", "output"}, its format), the format told by the first row where it is not
    given."""
    if is_path(name) or name.startswith(PREFIX):
        first = next(_raw_rows(name), None)
        if first is None:
            raise ValueError(f"{name} has no rows: give at least one")
        format_name = spec.format_of(first[1], first[1])
        check_columns(first[1], format_name)
        convert_row(first[1], format_name, _where(name, first[0]))
        say_unused(name, [first[1]], format_name)
        return IterableDataset.from_generator(
            _pairs, gen_kwargs={"name": name, "format_name": format_name}
        ), format_name
    loaded = hub_dataset({**HUB_DATASETS.get(name, {"path": name}), "streaming": True}, spec.cache_dir)
    first = next(iter(loaded["train"]))
    format_name = spec.format_of(first, first, name)
    check_columns(first, format_name)
    say_unused(name, [first], format_name)
    columns = list(first)
    pairs = loaded["train"].map(lambda row: _pair(row, format_name, f"a row of {name}"), remove_columns=columns)
    return pairs, format_name


def _pairs(name: str, format_name: str | Format) -> Iterator[dict[str, Any]]:
    try:
        for number, row in _raw_rows(name):
            yield _pair(row, format_name, _where(name, number))
    except ValueError as error:  # a broken line, or one that is no text
        raise StreamedRowError(str(error)) from None


def _pair(row: dict[str, Any], format_name: str | Format, where: str) -> dict[str, Any]:
    try:
        return convert_row(row, format_name, where)
    except ValueError as error:
        raise StreamedRowError(str(error)) from None


def _where(name: str, number: int) -> str:
    return f"{name}, {'row' if name.startswith(PREFIX) else 'line'} {number}"


def _raw_rows(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if name.startswith(PREFIX):
        yield from deeplake_rows(name)
        return
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"the data file {path} does not exist, check the path")
    if path.suffix.lower() not in (".jsonl", ".csv", ".tsv"):
        raise ValueError(f"--streaming reads jsonl, csv and tsv files, not '{path.suffix}' ({path}): save it as jsonl")
    if path.suffix.lower() != ".jsonl":
        yield from csv_rows(path, text_lines(path))
        return
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip():
            yield number, json_line(path, number, line)
