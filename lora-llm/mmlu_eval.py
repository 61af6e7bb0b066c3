"""MMLU: prompts from the authors' archive, a jsonl or the hub, and accuracy from the logits of A, B, C and D.

Source: Hendrycks et al., "Measuring Massive Multitask Language Understanding" (ICLR 2021). The archive holds
dev (5 questions a subject), val and test as headless CSV files: question, four choices, the letter of the answer.
"""

from __future__ import annotations

import csv
import difflib
import inspect
import io
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from causal_collator import encode_source, pad_batch
from dataset_sources import hub_dataset, read_table
from instruction_formats import MMLU_LETTERS, mmlu_prompt, mmlu_question
from tqdm import tqdm
from transformers import TrainerCallback

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


def load_mmlu(args: Any) -> list[Row]:
    """The rows {"subject", "input", "output"} to score, by subject; input is the prompt, output the letter.

    Reads args.mmlu_dir, mmlu_dataset ("mmlu-zs": no example, "mmlu-fs": five from dev), mmlu_split ("eval": the
    validation questions, "test"), max_mmlu_samples (that many, evenly spread over all subjects) and cache_dir.
    mmlu_dir may be the folder of the archive, one that holds data.tar or a jsonl of ready prompts, or that file itself.
    """
    problems = [
        f"--{name} '{value}' is unknown. Allowed: {', '.join(allowed)}"
        for name, value, allowed in (
            ("mmlu_dataset", args.mmlu_dataset, SHOTS), ("mmlu_split", args.mmlu_split, SPLITS)
        )
        if value not in allowed
    ]  # fmt: skip
    limit = args.max_mmlu_samples
    if limit is not None and limit < 1:
        problems.append(f"--max_mmlu_samples {limit}: at least 1 is needed; leave the flag out for all")
    if problems:
        raise ValueError("; ".join(problems))
    split = SPLITS[args.mmlu_split]
    ready = _ready_prompts(Path(args.mmlu_dir).expanduser(), args.mmlu_dataset, split)
    if ready is not None:
        rows = read_prompts(ready)
    else:
        tables = read_questions(args.mmlu_dir, ("dev", split), cache_dir=args.cache_dir)
        examples = defaultdict(list)
        for item in tables["dev"]:
            examples[item.subject].append(mmlu_question(item.question, item.choices, item.answer))
        rows = [_prompt_row(item, examples[item.subject][: SHOTS[args.mmlu_dataset]]) for item in tables[split]]
    return rows if limit is None or limit >= len(rows) else [rows[i * len(rows) // limit] for i in range(limit)]


def train_split_for_subject(
    mmlu_dir: str | Path, subject: str | None, cache_dir: str | None = None
) -> tuple[list[Row], list[Row]]:
    """(rows to train on: dev + validation, rows to evaluate on: test) of one subject, or of all where it is None.

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

    From the folder of the archive, the archive (never unpacked: it is read in place), or else the hub. Raises
    FileNotFoundError where none of them is there, ValueError on a broken table or an unknown subject.
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
            yield match[1], match[2], str(path), _decoded(path.read_bytes(), str(path))


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
                yield match[1], match[2], where, _decoded(tar.extractfile(member).read(), where)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive} is broken ({error}): fetch the authors' data.tar anew") from error


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start} is not UTF-8 text") from None


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
            found[split][row["subject"]].append(Question(row["subject"], row["question"], tuple(row["choices"]), letter))
    return found


def _ready_prompts(folder: Path, dataset: str, split: str) -> Path | None:
    """A json(l) of ready prompts under the names that qlora and this project give it, or mmlu_dir itself if it is one."""
    if folder.is_file() and folder.suffix in (".json", ".jsonl"):
        return folder
    shots = "zero_shot" if SHOTS[dataset] == 0 else "five_shot"
    names = [f"{name}.{kind}" for name in (f"mmlu_{shots}_{split}", f"{shots}_mmlu_{split}") for kind in ("jsonl", "json")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_prompts(path: Path) -> list[Row]:
    """Rows {"subject", "input", "output"} of a json or jsonl; ValueError that names the row that is none."""
    rows = []
    for line, row in read_table(path):
        texts = {key: row.get(key) for key in ("subject", "input", "output")}
        if not all(isinstance(text, str) and text for text in texts.values()):
            raise ValueError(f"{path}, line {line}: text is needed under subject, input and output; found {texts!r:.120}")
        letter = texts["output"].strip()
        if letter not in tuple(MMLU_LETTERS):
            raise ValueError(f"{path}, line {line}: the output is {texts['output']!r:.40}, not one of A, B, C, D")
        rows.append({**texts, "output": letter})
    return rows


def fit_prompt(tokenizer: Any, prompt: str, source_max_len: int) -> list[int]:
    """Token ids (bos included) of at most `source_max_len` tokens.

    Examples are dropped from the front, one by one, until it fits; a question that alone is too long loses its
    beginning, never the "Answer:" at its end.
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


def letter_token_ids(tokenizer: Any) -> torch.Tensor:
    """(4, V) token ids whose logits stand for A, B, C, D after "Answer:", V = 1 or 2 ways to write a letter.

    A pre-trained model goes on with the letter as in "Answer: A", which many tokenizers merge with its blank; a model
    trained on targets that are the bare letter (`causal_collator`) goes on with that. Both count; where the tokenizer
    writes them alike, V is 1. Raises ValueError where the letters have no distinguishing token.
    """
    ways = []
    for before in ("Answer: ", ""):
        encoded = [tokenizer(before + letter, add_special_tokens=False)["input_ids"] for letter in MMLU_LETTERS]
        distinct = (column for column in zip(*encoded) if len(set(column)) == len(MMLU_LETTERS))
        ways.append(next(distinct, None))
    ways = list(dict.fromkeys(way for way in ways if way is not None))
    if not ways:
        raise ValueError("the tokenizer has no tokens that tell A, B, C and D apart: MMLU cannot be scored with it")
    return torch.tensor(ways).T


class MMLUScorer:
    """Scores rows {"subject", "input", "output"} by the logits of the four letters at the last token of the prompt.

    `source_max_len` in tokens. Prompts are tokenized once, here.
    """

    def __init__(self, tokenizer: Any, rows: Sequence[Row], source_max_len: int, batch_size: int = 1) -> None:
        if not rows:
            raise ValueError("no MMLU questions to score: give at least one row")
        if source_max_len < 2 or batch_size < 1:
            raise ValueError(f"--mmlu_source_max_len {source_max_len} (2 or more) or batch size {batch_size} (1 or more)")
        self.letter_ids = letter_token_ids(tokenizer)  # (4, V)
        self.subjects = [row["subject"] for row in rows]
        self.answers = [MMLU_LETTERS.index(row["output"]) for row in rows]
        self.prompts = [
            fit_prompt(tokenizer, row["input"], source_max_len) for row in tqdm(rows, desc="MMLU prompts", leave=False)
        ]
        self.batch_size = batch_size

    @torch.no_grad()
    def score(self, model: torch.nn.Module) -> dict[str, Any]:
        """{"accuracy", "per_subject": {subject: accuracy}, "loss", "count"} of the model, on the model's own device.

        loss: mean negative log-likelihood (nats, over the whole vocabulary) of the right letter. The model is scored in
        eval mode and left in the mode it was in.
        """
        was_training = model.training
        model.eval()
        try:
            letters = self._letter_log_probabilities(model)  # (N, 4)
        finally:
            model.train(was_training)
        answers = torch.tensor(self.answers)
        right = letters.argmax(-1) == answers  # (N,)
        by_subject = defaultdict(list)
        for subject, is_right in zip(self.subjects, right.tolist()):
            by_subject[subject].append(is_right)
        return {
            "accuracy": right.float().mean().item(),
            "per_subject": {subject: sum(hits) / len(hits) for subject, hits in sorted(by_subject.items())},
            "loss": -letters[torch.arange(len(answers)), answers].mean().item(),
            "count": len(answers),
        }

    def _letter_log_probabilities(self, model: torch.nn.Module) -> torch.Tensor:
        """(N, 4) on the CPU, float32, in the order of the rows."""
        device = next(model.parameters()).device
        result = torch.empty(len(self.prompts), len(MMLU_LETTERS))
        # Longest first: little padding, and a batch that does not fit in memory fails at once.
        order = sorted(range(len(self.prompts)), key=lambda index: -len(self.prompts[index]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        for indices in tqdm(batches, desc="MMLU", leave=False):
            prompts = [self.prompts[index] for index in indices]
            # Right padding, whatever side the tokenizer pads: positions are those of the unpadded prompt.
            batch = {name: tensor.to(device) for name, tensor in pad_batch(prompts, pad_id=0).items()}
            logits = _last_logits(model, batch, [len(prompt) - 1 for prompt in prompts])  # (B, vocabulary)
            log_probabilities = logits.float().log_softmax(-1)[:, self.letter_ids.to(device)]  # (B, 4, V)
            result[indices] = log_probabilities.logsumexp(-1).cpu()
        return result


def _last_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor], last: Sequence[int]) -> torch.Tensor:
    """(B, vocabulary): the logits at position last[b] of row b.

    Where the architecture can, only the positions that are some row's last are turned into logits: those of a whole
    batch of five-shot prompts would take gigabytes.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    positions = sorted(set(last))
    if "logits_to_keep" in inspect.signature(type(base).forward).parameters:
        logits = model(**batch, logits_to_keep=torch.tensor(positions, device=batch["input_ids"].device)).logits
        columns = [positions.index(position) for position in last]
    else:
        logits, columns = model(**batch).logits, list(last)  # (B, T, vocabulary)
    return logits[list(range(len(columns))), columns]


class MMLUCallback(TrainerCallback):
    """Scores before training (baseline), at every evaluation and at the end, and logs what it finds.

    Logged as `eval_mmlu_accuracy`, `eval_mmlu_loss` and `eval_mmlu_accuracy_<subject>`, which TensorBoard shows under
    eval/. `results` holds {"step", "when": baseline | evaluation | end, **score} in order. Weights that were just
    scored are not scored again.
    """

    def __init__(self, trainer: Any, scorer: MMLUScorer) -> None:
        self.trainer = trainer
        self.scorer = scorer
        self.results: list[dict[str, Any]] = []
        self._scored_weights: tuple[float, ...] | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step == 0:  # a resumed run has its baseline behind it
            self._score("baseline", state, model)

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs) -> None:
        logs = self._score("evaluation", state, model)
        if metrics is not None:
            metrics.update(logs)  # so that --metric_for_best_model eval_mmlu_accuracy finds it

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        self._score("end", state, model)

    def _score(self, when: str, state: Any, model: torch.nn.Module) -> dict[str, float]:
        weights = tuple(p.detach().sum(dtype=torch.float64).item() for p in model.parameters() if p.requires_grad)
        if self.results and weights == self._scored_weights:
            score = {key: self.results[-1][key] for key in ("accuracy", "per_subject", "loss", "count")}
        else:
            score = self.scorer.score(model)
        self._scored_weights = weights
        self.results.append({"step": state.global_step, "when": when, **score})
        logs = {"eval_mmlu_accuracy": score["accuracy"], "eval_mmlu_loss": score["loss"]}
        logs.update({f"eval_mmlu_accuracy_{subject}": value for subject, value in score["per_subject"].items()})
        self.trainer.log(logs)
        return logs
