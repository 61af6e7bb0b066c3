"""The grid of judge_checkpoints.py for a run that the page shows."""

from collections.abc import Sequence
from pathlib import Path

from base.sampling import Prompt, parse_prompt_line
from demo.process import refuse_picture
from demo.run_folders import Places, Run
from es_lora.files import split_lines
from es_lora.judge.base_index import Base
from es_lora.judge.grid_page import grid_html
from es_lora.judge.run_folder import read_run
from es_lora.judge.verdict import judge, measure_run
from grid.drawing import Drawing, Request, unrelated_prompts
from grid.features import training_pictures
from grid.pictures import PictureMaker

MOST_PROMPTS, MOST_SEEDS, MOST_STRENGTHS, MOST_CHECKPOINTS = 6, 8, 3, 12


def asked_prompts(text: str) -> list[Prompt]:
    """The prompts of a form, one a line. Raises ValueError for none, too many, one too large."""
    prompts = [parse_prompt_line(line) for line in split_lines(text) if line.strip()]
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts: give 1 to {MOST_PROMPTS}")
    for prompt in prompts:
        refuse_picture(vars(prompt))
    return prompts


def asked_numbers(text: str, name: str, most: int) -> list[float]:
    """Numbers between commas, as the limits of pictures (`name`) allow. Raises ValueError."""
    try:
        values = list(dict.fromkeys(float(word) for word in text.split(",")))
    except ValueError:
        raise ValueError(f"{name} {text!r:.60}: give numbers with commas between them, as 1,2,3") from None
    if len(values) > most:
        raise ValueError(f"{len(values)} of {name}: {most} are the most")
    for value in values:
        refuse_picture({name: value})
    return values


def run_grid(
    run: Run, places: Places, base: str, maker: PictureMaker, prompts: list[Prompt], columns: Sequence[Sequence[float]]
) -> str:
    """HTML of the grid of a run's LoRA files. columns: (seeds, strengths).

    Training pictures are compared with where the page offers their folder. Raises ValueError or
    FileNotFoundError where the run holds no LoRA files that can be judged."""
    found = read_run(run.folder)
    measure_run(found, Base(Path(base)))
    verdict, _, _ = judge(found)
    folder = places.images_of(run)
    seeds, strengths = columns
    request = Request(
        prompts,
        unrelated_prompts(prompts[0]),
        [int(seed) for seed in seeds],
        strengths,
        training_pictures(folder) if folder else (),
        MOST_CHECKPOINTS,
    )
    return grid_html(Drawing(request, lambda: maker).draw(found, verdict), verdict)
