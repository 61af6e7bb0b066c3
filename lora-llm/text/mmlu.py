"""MMLU: its questions, from the authors' archive, a folder or a hub, as prompts with and without
examples."""

from __future__ import annotations

import csv
import difflib
import io
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from es_lora.files import decoded, read_text
from text.collator import encode_source
from text.formats import MMLU_LETTERS, mmlu_prompt, mmlu_question
from text.hub import hub_dataset
from text.tables import read_table

SHOTS = {"mmlu-zs": 0, "mmlu-fs": 5}
SPLITS = {"eval": "val", "test": "test"}  # --mmlu_split -> folder of the archive
_HUB_SPLITS = {"dev": "dev", "val": "validation", "test": "test"}
_TABLE_NAME = re.compile(r"(?:^|/)(dev|val|test)/([a-z0-9_]+)_\1\.csv$")
_TABLE_LIMIT_BYTES = 32 * 1024**2  # the largest of the real ones has 2.5 MB
_END_OF_EXAMPLE = re.compile(r"(?<=\nAnswer: [ABCD]\n\n)")
Row = dict[str, str]


class Question(NamedTuple):
    """One question with its four choices; `answer` is the letter."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: str


def load_mmlu(
    mmlu_dir: str | Path,
    *,
    dataset: str = "mmlu-fs",
    split: str = "eval",
    limit: int | None = None,
    cache_dir: str | None = None,
) -> list[Row]:
    """The rows {"subject", "input", "output"} to score, by subject; input is the prompt, output the
    letter.

    dataset: "mmlu-zs" (no example) or "mmlu-fs" (five from dev). split: "eval" (the validation
    questions) or "test". limit: that many questions, evenly spread over all subjects.
    mmlu_dir: the folder of the archive, one that holds data.tar or a jsonl of ready prompts, or
    that file itself. Raises ValueError or FileNotFoundError.
    """
    asked = (("mmlu_dataset", dataset, SHOTS), ("mmlu_split", split, SPLITS))
    problems = [
        f"--{name} '{value}' is unknown. Allowed: {', '.join(allowed)}"
        for name, value, allowed in asked
        if value not in allowed
    ]
    if limit is not None and limit < 1:
        problems.append(f"--max_mmlu_samples {limit}: at least 1 is needed; leave the flag out for all")
    if problems:
        raise ValueError("; ".join(problems))
    ready = _ready_prompts(Path(mmlu_dir).expanduser(), dataset, SPLITS[split])
    rows = read_prompts(ready) if ready is not None else _rows_of_tables(mmlu_dir, dataset, SPLITS[split], cache_dir)
    return rows if limit is None or limit >= len(rows) else [rows[i * len(rows) // limit] for i in range(limit)]


def _rows_of_tables(mmlu_dir: str | Path, dataset: str, split: str, cache_dir: str | None) -> list[Row]:
    tables = read_questions(mmlu_dir, ("dev", split), cache_dir=cache_dir)
    examples = defaultdict(list)
    for item in tables["dev"]:
        examples[item.subject].append(mmlu_question(item.question, item.choices, item.answer))
    return [_prompt_row(item, examples[item.subject][: SHOTS[dataset]]) for item in tables[split]]


def train_split_for_subject(
    mmlu_dir: str | Path, subject: str | None, cache_dir: str | None = None
) -> tuple[list[Row], list[Row]]:
    """(rows to train on: dev + validation, rows to evaluate on: test) of one subject, or of all
    where it is None.

    Zero-shot prompts. Raises ValueError that names the nearest subject where there is no such one.
    """
    tables = read_questions(mmlu_dir, ("dev", "val", "test"), subject, cache_dir)
    train, evaluation = tables["dev"] + tables["val"], tables["test"]
    return [_prompt_row(item) for item in train], [_prompt_row(item) for item in evaluation]


def _prompt_row(item: Question, examples: Iterable[str] = ()) -> Row:
    prompt = mmlu_prompt(item.subject, mmlu_question(item.question, item.choices), examples)
    return {"subject": item.subject, "input": prompt, "output": item.answer}


def read_questions(
    mmlu_dir: str | Path, splits: Sequence[str], subject: str | None = None, cache_dir: str | None = None
) -> dict[str, list[Question]]:
    """{split: questions in the order of their subjects} for splits out of dev, val, test.

    From the folder of the archive, the archive (never unpacked: it is read in place), or else the
    hub. Raises FileNotFoundError where none of them is there, ValueError on a broken table or an
    unknown subject.
    """
    found: dict[str, dict[str, list[Question]]] = {split: {} for split in splits}
    folder = Path(mmlu_dir).expanduser()
    archive = _archive_in(folder)
    if archive is not None:
        tables, origin = _tables_in_archive(archive, splits), str(archive)
    elif any(folder.glob("**/*_test.csv")) or any(folder.glob("**/*_val.csv")):
        tables, origin = _tables_in_folder(folder, splits), str(folder)
    else:
        tables, origin = None, "cais/mmlu"
        found = _questions_on_hub(folder, splits, cache_dir)
    for split, name, where, text in tables or ():
        found[split][name] = parse_table(text, name, where)
    for split in splits:
        if not found[split]:
            raise FileNotFoundError(f"MMLU in {origin} has no {split} questions: files {split}/<subject>_{split}.csv")
        if subject is not None and subject not in found[split]:
            nearest = difflib.get_close_matches(subject, found[split], n=1, cutoff=0)
            raise ValueError(
                f"--train_subject '{subject}' is no MMLU subject of the {split} split in {origin}; "
                f"did you mean '{nearest[0]}'? There are {len(found[split])}"
            )
    names = {split: [subject] if subject else sorted(found[split]) for split in splits}
    return {split: [item for name in names[split] for item in found[split][name]] for split in splits}


def parse_table(text: str, subject: str, where: str) -> list[Question]:
    """Questions of one headless CSV table; ValueError that names the line of a row that is none."""
    reader = csv.reader(io.StringIO(text, newline=""))
    questions = []
    for cells in reader:
        if len(cells) != 6 or cells[5].strip() not in tuple(MMLU_LETTERS):
            raise ValueError(
                f"{where}, line {reader.line_num}: a question, four choices and the letter A-D are needed, "
                f"not {len(cells)} cells that end with {cells[-1] if cells else ''!r:.40}"
            )
        questions.append(Question(subject, cells[0], tuple(cells[1:5]), cells[5].strip()))
    return questions


def _archive_in(folder: Path) -> Path | None:
    if folder.is_file():
        return folder if ".tar" in folder.suffixes or folder.suffix == ".tgz" else None
    return next((folder / name for name in ("data.tar", "data.tar.gz", "data.tgz") if (folder / name).is_file()), None)


def _tables_in_folder(folder: Path, splits: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    for path in sorted(folder.glob("**/*.csv")):
        match = _TABLE_NAME.search(path.as_posix())
        if match and match[1] in splits:
            yield match[1], match[2], str(path), read_text(path)


def _tables_in_archive(archive: Path, splits: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tqdm(tar, desc=f"Read {archive.name}", leave=False):
                match = _TABLE_NAME.search(member.name)
                if not match or match[1] not in splits:
                    continue
                where = f"{archive}: {member.name}"
                path = PurePosixPath(member.name)
                if not member.isfile() or path.is_absolute() or ".." in path.parts or member.size > _TABLE_LIMIT_BYTES:
                    raise ValueError(f"{where} is no plain table inside the archive: fetch the authors' data.tar anew")
                yield match[1], match[2], where, decoded(tar.extractfile(member).read(), where)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive} is broken ({error}): fetch the authors' data.tar anew") from error


def _questions_on_hub(
    folder: Path, splits: Sequence[str], cache_dir: str | None
) -> dict[str, dict[str, list[Question]]]:
    try:
        loaded = hub_dataset({"path": "cais/mmlu", "name": "all"}, cache_dir)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no MMLU in {folder}, and the hub gives none ({error.__cause__}). Put the authors' archive data.tar "
            f"(hendrycks/test on GitHub links to it) or its unpacked folder there, or name its place with --mmlu_dir"
        ) from error
    found: dict[str, dict[str, list[Question]]] = {split: defaultdict(list) for split in splits}
    for split in splits:
        for row in tqdm(loaded[_HUB_SPLITS[split]], desc=f"MMLU {split}", leave=False):
            letter = MMLU_LETTERS[row["answer"]]
            found[split][row["subject"]].append(
                Question(row["subject"], row["question"], tuple(row["choices"]), letter)
            )
    return found


def _ready_prompts(folder: Path, dataset: str, split: str) -> Path | None:
    """A json(l) of ready prompts under the names that qlora and this project give it, or mmlu_dir
    itself if it is one."""
    if folder.is_file() and folder.suffix in (".json", ".jsonl"):
        return folder
    shots = "zero_shot" if SHOTS[dataset] == 0 else "five_shot"
    names = [
        f"{name}.{kind}" for name in (f"mmlu_{shots}_{split}", f"{shots}_mmlu_{split}") for kind in ("jsonl", "json")
    ]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_prompts(path: Path) -> list[Row]:
    """Rows {"subject", "input", "output"} of a json or jsonl; ValueError that names the row that is
    none."""
    rows = []
    for line, row in read_table(path):
        texts = {key: row.get(key) for key in ("subject", "input", "output")}
        if not all(isinstance(text, str) and text for text in texts.values()):
            raise ValueError(
                f"{path}, line {line}: text is needed under subject, input and output; found {texts!r:.120}"
            )
        letter = texts["output"].strip()
        if letter not in tuple(MMLU_LETTERS):
            raise ValueError(f"{path}, line {line}: the output is {texts['output']!r:.40}, not one of A, B, C, D")
        rows.append({**texts, "output": letter})
    return rows


def fit_prompt(tokenizer: Any, prompt: str, source_max_len: int) -> list[int]:
    """Token ids (bos included) of at most `source_max_len` tokens.

    Examples are dropped from the front, one by one, until it fits; a question that alone is too
    long loses its beginning, never the "Answer:" at its end.
    """
    header, separator, body = prompt.partition("\n\n")
    parts = _END_OF_EXAMPLE.split(body)
    while True:
        ids = encode_source(tokenizer, header + separator + "".join(parts))
        if len(ids) <= source_max_len:
            return ids
        if len(parts) == 1:
            n_bos = 0 if tokenizer.bos_token_id is None else 1
            return ids[:n_bos] + ids[len(ids) - (source_max_len - n_bos) :]
        parts = parts[1:]
