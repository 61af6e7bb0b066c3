"""The grid of pictures: every checkpoint and strength by seeds, drawn with one base, measured."""

import argparse
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from PIL.Image import Image
from tqdm import tqdm

from base.sampling import MOST_PROMPTS, Prompt, read_prompts
from es_lora.judge.grid_page import (
    BASE_NAME,
    Figure,
    Grid,
    Row,
    announce,
    announce_rows,
    chosen_checkpoints,
    picture_cell,
    trained_on,
)
from es_lora.judge.run_folder import Checkpoint, Run
from grid.features import (
    Encoder,
    Features,
    TrainingSet,
    drift,
    encode_training_set,
    loaded_encoder,
    training_pictures,
    vae_encoder,
)
from grid.pictures import PictureMaker

SEEDS = (1, 2, 3)
# Everyday things, for what a LoRA does to prompts that it was not trained for.
UNRELATED = ("a red apple", "a mountain at sunrise", "a dog", "a house with a garden")
SHARP_PX, MOST_PX = 256, 768  # pictures up to the first stay as they are, larger ones are JPEG up to the second
LIKENESS = "Likeness to the training pictures: the mean cosine of the features of all pairs. 1 is the same picture."
NEAREST = (
    "Copying: 1 - cosine to the nearest training picture, the mean over the pictures. Far below what training "
    "pictures have among themselves, pictures are copies."
)
DRIFT = (
    "Drift of prompts without the subject: the mean of 1 - cosine to the base's picture of the same prompt and seed. "
    "0 is no change. The prompts: {prompts}."
)


@dataclass
class Request:
    """What is to be drawn. pictures: the training pictures, none where they are not known."""

    prompts: list[Prompt]
    unrelated: list[Prompt]
    seeds: Sequence[int] = SEEDS
    strengths: Sequence[float] = (1.0,)
    pictures: Sequence[Path] = ()
    most_checkpoints: int = 12


def drawing_of(arguments: argparse.Namespace) -> "Drawing":
    """The drawing that the command line asks for. Raises ValueError, FileNotFoundError."""
    prompts = read_prompts(arguments.grid)
    data = arguments.training_data or trained_on(arguments.folder, "train_data_dir")
    request = Request(
        prompts,
        unrelated_prompts(prompts[0], arguments.unrelated),
        arguments.seeds or SEEDS,
        arguments.strength,
        training_pictures(Path(data)) if data else (),
        arguments.grid_checkpoints,
    )
    if len(prompts) * len(request.seeds) > MOST_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts by {len(request.seeds)} seeds: {MOST_PROMPTS} pictures a row at most")
    settings = {"v2": arguments.v2, "v_parameterization": arguments.v_parameterization}

    def maker() -> PictureMaker:
        return PictureMaker(arguments.base, clip_skip=arguments.clip_skip, **settings)

    return Drawing(request, maker, arguments.encoder)


def unrelated_prompts(like: Prompt, file: Optional[str] = None) -> list[Prompt]:
    """The prompts of a file, or UNRELATED with size, steps and guidance of the prompt `like`."""
    if file:
        return read_prompts(file)
    return [replace(like, prompt=text, negative_prompt="") for text in UNRELATED]


class Drawing:
    """A request with what draws it. maker: makes the PictureMaker, once and late."""

    def __init__(self, request: Request, maker: Callable[[], PictureMaker], encoder: Optional[str] = None):
        self.request, self._maker, self._encoder = request, maker, encoder

    def draw(self, run: Run, verdict: dict[str, Any]) -> Grid:
        """The Grid of a measured run. Raises ValueError where a file does not fit the base."""
        request, began = self.request, time.monotonic()
        checkpoints = chosen_checkpoints(run.checkpoints, verdict["keep"], request.most_checkpoints)
        each = len(request.prompts) * len(request.seeds) + len(request.unrelated)
        left_out = len(run.checkpoints) - len(checkpoints)
        rows = announce_rows(len(checkpoints), len(run.checkpoints), len(request.strengths), f"{each} pictures")
        if not request.pictures:
            announce("the training pictures are not known: without --training_data neither likeness nor copying")
        maker = self._maker()
        encoder = loaded_encoder(self._encoder, maker.model.unet.device) if self._encoder else None
        encoder = encoder or vae_encoder(maker.model)
        training, unread = encode_training_set(request.pictures, encoder) if request.pictures else (None, [])
        painter = Painter(request, maker, encoder, training)
        with tqdm(total=rows * each, desc="pictures", leave=False) as bar:
            drawn = [painter.row(BASE_NAME, None, 1.0, bar.update)]
            drawn += [painter.row(name, of, strength, bar.update) for name, of, strength in self._rows(checkpoints)]
        notes = [f"{rows * each} pictures in {time.monotonic() - began:.0f} seconds. Features are {encoder.about}."]
        notes += [f"Training pictures that cannot be read: {', '.join(unread)}."] if unread else []
        notes += [f"{left_out} checkpoints are not drawn."] if left_out else []
        columns = [f"seed {seed}" for seed in request.seeds]
        prompts = [prompt.prompt for prompt in request.prompts]
        return Grid(prompts, columns, self._figures(), [*_reference(training), *drawn], notes)

    def _rows(self, checkpoints: list[Checkpoint]) -> Iterator[tuple[str, Checkpoint, float]]:
        several = len(self.request.strengths) > 1
        for checkpoint in checkpoints:
            for strength in self.request.strengths:
                yield checkpoint.name + (f" x {strength:g}" if several else ""), checkpoint, strength

    def _figures(self) -> list[Figure]:
        unrelated = ", ".join(prompt.prompt for prompt in self.request.unrelated)
        of_pictures = [Figure("likeness", LIKENESS), Figure("nearest", NEAREST)]
        return [*(of_pictures if self.request.pictures else []), Figure("drift", DRIFT.format(prompts=unrelated))]


def _reference(training: Optional[TrainingSet]) -> list[Row]:
    """The row of the training pictures among themselves, by which the others are read."""
    if training is None:
        return []
    likeness, nearest = training.among_themselves()
    return [Row("training pictures, each to the others", {"likeness": likeness, "nearest": nearest})]


class Painter:
    """Draws and measures rows. The first one is the base's, from which drift is counted."""

    def __init__(self, request: Request, maker: PictureMaker, encoder: Encoder, training: Optional[TrainingSet]):
        self.request, self.maker, self.encoder, self.training = request, maker, encoder, training
        self._unrelated_of_base: Optional[Features] = None

    def row(self, name: str, of: Optional[Checkpoint], strength: float, drawn: Callable[[], Any]) -> Row:
        """drawn: called after each picture."""
        request, seeds = self.request, self.request.seeds
        wanted = [replace(prompt, seed=seed) for prompt in request.prompts for seed in seeds]
        unrelated = [replace(prompt, seed=seeds[0]) for prompt in request.unrelated]
        made = []
        for picture in self.maker.pictures([*wanted, *unrelated], of.file if of else None, strength):
            made.append(picture)
            drawn()
        mine, others = made[: len(wanted)], self.encoder.encode(made[len(wanted) :])
        figures: dict[str, Optional[float]] = {}
        captions = [""] * len(mine)
        if self.training is not None:
            features = self.encoder.encode(mine)
            nearest = self.training.nearest(features)
            figures["likeness"] = self.training.likeness(features)
            figures["nearest"] = sum(distance for distance, _ in nearest) / len(nearest)
            captions = [f"{distance:.3f} to {file}" for distance, file in nearest]
        if self._unrelated_of_base is None:
            self._unrelated_of_base = others
        figures["drift"] = drift(others, self._unrelated_of_base) if of else None
        cells = [picture_cell(*compressed(picture), caption) for picture, caption in zip(mine, captions)]
        by_prompt = [cells[at : at + len(seeds)] for at in range(0, len(cells), len(seeds))]
        return Row(name, figures, by_prompt, of.name if of else None, strength if of else None)


def compressed(picture: Image) -> tuple[bytes, str]:
    """(bytes, "png" or "jpeg") of a picture for a page; large ones are made smaller."""
    buffer = io.BytesIO()
    if max(picture.size) <= SHARP_PX:
        picture.save(buffer, format="png")
        return buffer.getvalue(), "png"
    picture = picture.copy()
    picture.thumbnail((MOST_PX, MOST_PX))
    picture.save(buffer, format="jpeg", quality=88)
    return buffer.getvalue(), "jpeg"
