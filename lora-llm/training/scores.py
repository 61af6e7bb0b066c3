"""MMLU scored by the logits of the four letters, at every evaluation of a Trainer."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from text.collator import pad_batch
from text.formats import MMLU_LETTERS
from text.mmlu import Row, fit_prompt


def letter_token_ids(tokenizer: Any) -> torch.Tensor:
    """(4, V) token ids whose logits stand for A, B, C, D after "Answer:"; V = 1 or 2 spellings.

    A pre-trained model goes on with the letter as in "Answer: A", which many tokenizers merge with
    its blank; a model trained on targets that are the bare letter (`CausalCollator`) goes on with
    that. Both count; where the tokenizer writes them alike, V is 1. Raises ValueError where the
    letters have no distinguishing token."""
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
    """Scores rows {"subject", "input", "output"} by the logits of the four letters at the last
    token of the prompt. `source_max_len` in tokens. Prompts are tokenized once, here."""

    def __init__(self, tokenizer: Any, rows: Sequence[Row], source_max_len: int, batch_size: int = 1) -> None:
        if not rows:
            raise ValueError("no MMLU questions to score: give at least one row")
        if source_max_len < 2 or batch_size < 1:
            raise ValueError(
                f"--mmlu_source_max_len {source_max_len} (2 or more) or batch size {batch_size} (1 or more)"
            )
        self.letter_ids = letter_token_ids(tokenizer)  # (4, V)
        self.subjects = [row["subject"] for row in rows]
        self.answers = [MMLU_LETTERS.index(row["output"]) for row in rows]
        self.prompts = [
            fit_prompt(tokenizer, row["input"], source_max_len) for row in tqdm(rows, desc="MMLU prompts", leave=False)
        ]
        self.batch_size = batch_size

    @torch.no_grad()
    def score(self, model: torch.nn.Module) -> dict[str, Any]:
        """{"accuracy", "per_subject": {subject: accuracy}, "loss", "count"} of the model.

        loss: mean negative log-likelihood (nats, over the whole vocabulary) of the right letter.
        The model is scored in eval mode and left in the mode it was in."""
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
            # Right padding, whatever side the tokenizer pads: positions are the unpadded prompt's.
            batch = {name: tensor.to(device) for name, tensor in pad_batch(prompts, pad_id=0).items()}
            logits = _last_logits(model, batch, [len(prompt) - 1 for prompt in prompts])  # (B, vocabulary)
            log_probabilities = logits.float().log_softmax(-1)[:, self.letter_ids.to(device)]  # (B, 4, V)
            result[indices] = log_probabilities.logsumexp(-1).cpu()
        return result


def _last_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor], last: Sequence[int]) -> torch.Tensor:
    """(B, vocabulary): the logits at position last[b] of row b.

    Where the architecture can, only the positions that are some row's last are turned into logits:
    those of a whole batch of five-shot prompts would take gigabytes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    positions = sorted(set(last))
    if "logits_to_keep" in inspect.signature(type(base).forward).parameters:
        logits = model(**batch, logits_to_keep=torch.tensor(positions, device=batch["input_ids"].device)).logits
        columns = [positions.index(position) for position in last]
    else:
        logits, columns = model(**batch).logits, list(last)  # (B, T, vocabulary)
    return logits[list(range(len(columns))), columns]


class MMLUCallback(TrainerCallback):
    """Scores before training (baseline), at every evaluation and at the end, and logs them.

    Logged as `eval_mmlu_accuracy`, `eval_mmlu_loss` and `eval_mmlu_accuracy_<subject>`, which
    TensorBoard shows under eval/. `results` holds {"step", "when": baseline | evaluation | end,
    **score} in order. Weights that were just scored are not scored again.
    """

    def __init__(self, trainer: Any, scorer: MMLUScorer) -> None:
        self.trainer = trainer
        self.scorer = scorer
        self.results: list[dict[str, Any]] = []
        self._scored_weights: tuple[float, ...] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if state.global_step == 0:  # a resumed run has its baseline behind it
            self._score("baseline", state, kw["model"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = self._score("evaluation", state, kwargs["model"])
        if kwargs["metrics"] is not None:
            kwargs["metrics"].update(logs)  # so that --metric_for_best_model eval_mmlu_accuracy finds it

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._score("end", state, kw["model"])

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
