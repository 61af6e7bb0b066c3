"""The grid of answers: every checkpoint and strength by seeds, over one base, measured."""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import quiet_libraries  # noqa: F401  (first, before the libraries speak)
from generate_text import BASE, Speaker, read_requests
from peft.helpers import rescale_adapter_scale
from tqdm import tqdm

from adapters.fitting import check_adapters, put_adapters_on, swap_adapter
from adapters.folders import CHAT, WEIGHTS_FILE, AdapterFolder, load_frozen_base, load_tokenizer_of, open_adapter
from adapters.folders import prompt_of as prompt_of_training
from base.layers import positions_of
from es_lora.judge.grid_page import (
    BASE_NAME,
    Figure,
    Grid,
    Row,
    announce,
    announce_rows,
    answer_cell,
    chosen_checkpoints,
    trained_on,
)
from es_lora.judge.run_folder import Checkpoint, Run
from grid.copies import RUN_WORDS, TrainingText
from settings.flags import GenerationArguments
from training.forgetting import GeneralText, read_general_text

GENERAL_TEXT = Path(__file__).resolve().parents[1] / "tiny_base" / "general_text.jsonl"
MOST_PASSAGES, PASSAGES_AT_ONCE = 24, 4
MOST_ANSWERS = 1000  # of a row
COPIED = (
    f"Copying: the share of runs of {RUN_WORDS} words in the answers that stand in the training data as they are. "
    "They are marked. The row of the training data says how much of it stands in it twice."
)
PERPLEXITY = "Perplexity on {file}, of {tokens} predicted tokens; above the base's, something was forgotten."


@dataclass
class Request:
    """What is to be answered. seeds None: the likeliest token is taken, once. data: what was
    trained on, None where it is not known. unrelated: the file whose perplexity is told."""

    prompts: list[str]
    seeds: Optional[Sequence[int]]
    strengths: Sequence[float]
    data: Optional[TrainingText]
    unrelated: Path
    most_checkpoints: int
    base: str
    bits: Optional[int]
    prompt_as: Optional[str]
    generation: GenerationArguments


def drawing_of(arguments: argparse.Namespace) -> "Drawing":
    """The drawing that the command line asks for. Raises ValueError, FileNotFoundError."""
    prompts = [request["input"] for request in read_requests(arguments.grid)]
    if len(prompts) * len(arguments.seeds or [0]) > MOST_ANSWERS:
        raise ValueError(f"--grid {arguments.grid}: {len(prompts)} prompts; {MOST_ANSWERS} answers a row are the most")
    data = arguments.training_data or trained_on(arguments.folder, "dataset")
    unrelated = Path(arguments.unrelated or GENERAL_TEXT)
    read_general_text(str(unrelated), MOST_PASSAGES, "--unrelated")
    generation = GenerationArguments(
        max_new_tokens=arguments.max_new_tokens,
        do_sample=arguments.seeds is not None,
        temperature=arguments.temperature,
    )
    return Drawing(
        Request(
            prompts,
            arguments.seeds,
            arguments.strength,
            TrainingText(Path(data)) if data else None,
            unrelated,
            arguments.grid_checkpoints,
            str(arguments.base),
            arguments.bits,
            arguments.prompt_as,
            generation,
        )
    )


def _adapter_of(checkpoint: Checkpoint) -> AdapterFolder:
    if checkpoint.file.name != WEIGHTS_FILE:
        raise ValueError(f"{checkpoint.file} is no adapter of PEFT's, so that no answers can be had of it")
    return open_adapter(str(checkpoint.file.parent))


class Drawing:
    """A request, and the grid that comes of it."""

    def __init__(self, request: Request):
        self.request = request

    def draw(self, run: Run, verdict: dict[str, Any]) -> Grid:
        """The Grid of a measured run. Raises ValueError where an adapter does not fit the base."""
        request, began = self.request, time.monotonic()
        checkpoints = chosen_checkpoints(run.checkpoints, verdict["keep"], request.most_checkpoints)
        folders = [_adapter_of(checkpoint) for checkpoint in checkpoints]
        each = len(request.prompts) * len(request.seeds or [0])
        left_out = len(run.checkpoints) - len(checkpoints)
        rows = announce_rows(len(checkpoints), len(run.checkpoints), len(request.strengths), f"{each} answers")
        if request.data is None:
            announce("the training data are not known: without --training_data no copying is told")
        check_adapters(request.base, folders)
        writer = Writer(request, folders[0])
        with tqdm(total=rows * each, desc="answers", leave=False) as bar:
            drawn = [writer.row(BASE_NAME, None, 1.0, bar)]
            for checkpoint, folder in zip(checkpoints, folders):
                writer.put_on(folder)
                drawn += [writer.row(name, checkpoint, strength, bar) for name, strength in self._named(checkpoint)]
        how = f"sampled at temperature {request.generation.temperature:g}" if request.seeds else "the likeliest tokens"
        limit = request.generation.max_new_tokens
        taken = f"{rows * each} answers, {how}, of {limit} tokens at most"
        notes = [f"{taken}, in {time.monotonic() - began:.0f} seconds with the perplexities."]
        notes += [f"{left_out} checkpoints are not drawn."] if left_out else []
        columns = [f"seed {seed}" for seed in request.seeds or []] or ["answer"]
        return Grid(request.prompts, columns, self._figures(writer), [*self._reference(), *drawn], notes)

    def _named(self, checkpoint: Checkpoint) -> Iterator[tuple[str, float]]:
        several = len(self.request.strengths) > 1
        for strength in self.request.strengths:
            yield checkpoint.name + (f" x {strength:g}" if several else ""), strength

    def _figures(self, writer: "Writer") -> list[Figure]:
        told = PERPLEXITY.format(file=self.request.unrelated.name, tokens=writer.text.tokens)
        return [*([Figure("copied", COPIED)] if self.request.data else []), Figure("perplexity", told, 2)]

    def _reference(self) -> list[Row]:
        data = self.request.data
        return [Row("training data, each row to the others", {"copied": data.among_itself()})] if data else []


class Writer:
    """One base and the adapter that is on it now; answers, and measures them."""

    def __init__(self, request: Request, first: AdapterFolder):
        self.request, self._number = request, 0
        base, _ = load_frozen_base(request.base, request.bits, [first])
        tokenizer = load_tokenizer_of(request.base, [first])
        if request.prompt_as == CHAT and not tokenizer.chat_template:
            raise ValueError("--prompt_as chat: the tokenizer has no chat template; leave it out")
        model = put_adapters_on(base, tokenizer, [first])
        told = request.prompt_as or prompt_of_training(first.facts, tokenizer)
        names: dict[str, Optional[str]] = {BASE: None, "adapter": "adapter0"}
        self.speaker = Speaker(model, tokenizer, names, dict.fromkeys(names, told), request.generation, 0)
        self.text = GeneralText(str(request.unrelated), tokenizer, MOST_PASSAGES, PASSAGES_AT_ONCE, "--unrelated")
        self.text.cut(positions_of(model))
        self._on = first

    def put_on(self, folder: AdapterFolder) -> None:
        """Lay the next adapter over the base, in place of the one before it."""
        if folder is self._on:
            return
        self._number += 1
        name = f"adapter{self._number}"
        swap_adapter(self.speaker.model, folder, self.speaker.adapters["adapter"], name)
        self.speaker.adapters["adapter"], self._on = name, folder

    def row(self, name: str, of: Optional[Checkpoint], strength: float, bar: Any) -> Row:
        """Answers and figures of the adapter that is on; without a checkpoint, of the base."""
        request, speaker = self.request, self.speaker
        who, answers = ("adapter" if of else BASE), []
        with ExitStack() as scaled:
            if of is None:
                scaled.enter_context(speaker.model.disable_adapter())
            elif strength != 1:
                scaled.enter_context(rescale_adapter_scale(speaker.model, strength))
            for prompt in request.prompts:
                source = speaker.source(prompt, who)
                for seed in request.seeds or [0]:
                    answers.append(replace(speaker, seed=seed).answer(source, who, stream=False))
                    bar.update()
            loss = self.text.loss(speaker.model)
        figures: dict[str, Optional[float]] = {"perplexity": math.exp(min(loss, 50))}
        if request.data is not None:
            figures["copied"] = request.data.shares(answers)
        cells, seeds = [self._cell(answer) for answer in answers], len(request.seeds or [0])
        by_prompt = [cells[at : at + seeds] for at in range(0, len(cells), seeds)]
        return Row(name, figures, by_prompt, of.name if of else None, strength if of else None)

    def _cell(self, answer: str) -> str:
        data = self.request.data
        if data is None:
            return answer_cell([(answer, False)], "")
        share = data.shares([answer])
        said = "too short to tell" if share is None else f"{share:.0%} copied"
        return answer_cell(data.marked(answer), said)
