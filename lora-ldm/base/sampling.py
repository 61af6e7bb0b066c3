"""Pictures of prompts at fixed seeds: the prompts of a file, and the sampler."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Optional, Union

import torch
from PIL.Image import Image
from tqdm import tqdm

from base.random_state import untouched_random_state
from es_lora.files import read_text, split_lines
from es_lora.inputs.json_text import parsed_json
from settings.bounds import MOST_SIDE_PX, shown
from settings.toml_files import read_toml

if TYPE_CHECKING:
    from base.sd import SDModel

OPTIONS = {"n": "negative_prompt", "w": "width", "h": "height", "d": "seed", "l": "scale", "s": "sample_steps",
           "ss": "sample_sampler"}  # fmt: skip
MOST_PROMPTS = 1000
MOST_OF = {"width": MOST_SIDE_PX, "height": MOST_SIDE_PX, "seed": 2**63 - 1, "scale": 1000, "sample_steps": 1000}
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}


@dataclass
class Prompt:
    """One picture to make. Sizes in pixels, None: the base's. seed None: given by the caller."""

    prompt: str
    negative_prompt: str = ""
    width: Optional[int] = None
    height: Optional[int] = None
    seed: Optional[int] = None
    scale: float = 7.5
    sample_steps: int = 30
    sample_sampler: Optional[str] = None

    def __post_init__(self):
        kinds = {"width": int, "height": int, "seed": int, "scale": float, "sample_steps": int}
        for name, kind in kinds.items():
            value = getattr(self, name)
            try:
                setattr(self, name, value if value is None else kind(value))
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"prompt '{self.prompt:.80}': {name} {value!r:.40} is not a number") from None
        for name, most in MOST_OF.items():
            value = getattr(self, name)
            if value is not None and not abs(value) <= most:
                raise ValueError(f"prompt '{self.prompt:.80}': {name} {shown(value)} is not allowed: at most {most}")
        if self.sample_steps < 1 or (self.width or 8) < 8 or (self.height or 8) < 8:
            raise ValueError(f"prompt '{self.prompt}': steps must be at least 1, width and height at least 8 px")
        if self.sample_sampler is not None and self.sample_sampler not in SCHEDULERS:
            raise ValueError(
                f"prompt '{self.prompt}': sampler '{self.sample_sampler}': choose from {', '.join(SCHEDULERS)}"
            )


def parse_prompt_line(line: str) -> Prompt:
    """A Prompt from one line of a prompt file. Raises ValueError for an unknown option."""
    text, *options = re.split(r"\s--(?=[A-Za-z])", " " + line.strip())
    settings = {}
    for option in options:
        name, _, value = option.partition(" ")
        if name not in OPTIONS:
            nearest = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0) or ["n"]
            raise ValueError(f"prompt line '{line.strip()}': --{name} is unknown; there are --{', --'.join(OPTIONS)}"
                             f" (did you mean --{nearest[0]}?)")  # fmt: skip
        settings[OPTIONS[name]] = value.strip()
    return Prompt(text.strip(), **settings)


def read_prompts(path: Union[str, Path]) -> list[Prompt]:
    """The Prompts of a file.

    path: .txt (one a line, # comments), .toml ([prompt] with [[prompt.subset]]) or .json (a list).
    Raises ValueError for a file that cannot be read, an unknown key, and where there is no prompt.
    """
    path = Path(path)
    try:
        text = read_text(path)
    except OSError as error:
        raise ValueError(f"prompt file {path} cannot be read: {error}") from error
    if path.suffix.lower() in (".toml", ".json"):
        prompts = [_prompt_of(entry, path) for entry in _entries(path, text)]
    else:
        lines = [line.strip() for line in split_lines(text)]
        prompts = [parse_prompt_line(line) for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"prompt file {path} has no prompts")
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(f"prompt file {path} has {len(prompts)} prompts: {MOST_PROMPTS} are the most")
    return prompts


def _entries(path, text):
    """The tables of a TOML file, or the objects of a JSON file."""
    if path.suffix.lower() == ".toml":
        table = read_toml(path, "prompt file").get("prompt", {})
        subsets = table.get("subset", []) if isinstance(table, dict) else [table]
        if not (isinstance(subsets, list) and all(isinstance(subset, dict) for subset in subsets)):
            raise ValueError(
                f"prompt file {path} must hold [prompt] with common settings and [[prompt.subset]] for each"
            )
        common = {key: value for key, value in table.items() if key != "subset"}
        return [{**common, **subset} for subset in subsets] or ([common] if "prompt" in common else [])
    try:
        entries = parsed_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompt file {path} is not valid JSON: {error}") from error
    return entries if isinstance(entries, list) else [entries]


def _prompt_of(entry, path):
    """The Prompt of a line, or of {name: value}."""
    if isinstance(entry, str):
        return parse_prompt_line(entry)
    known = {field.name for field in fields(Prompt)}
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f'prompt file {path}: {entry!r} has no "prompt" with a text')
    for key in set(entry) - known:
        raise ValueError(f"prompt file {path}: unknown key '{key}'; there are {', '.join(sorted(known))}")
    return Prompt(**entry)


def make_scheduler(name: str, config: dict) -> Any:
    """The diffusers scheduler of a sampler's name, over the base model's noise schedule."""
    import diffusers

    class_name, changes = SCHEDULERS[name]
    try:
        return getattr(diffusers, class_name).from_config({**config, "clip_sample": False}, **changes)
    except ImportError as error:
        raise ValueError(f"sampler '{name}' needs another package: {str(error).strip().splitlines()[0]}") from error


class Sampler:
    """Makes pictures with the live parts of a model, so that LoRA layers in it take effect.
    encode_text: [captions] -> what the U-Net is conditioned on, the function that training uses."""

    def __init__(
        self,
        model: SDModel,
        encode_text: Callable[[list[str]], Any],
        *,
        sampler: str = "ddim",
        device: Union[str, torch.device] = "cpu",
    ):
        self.model, self.encode_text, self.sampler, self.device = model, encode_text, sampler, device
        self.pipeline = model.to_pipeline()
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def picture(self, prompt: Prompt) -> Image:
        """One PIL image of a Prompt whose seed is set."""
        native_px = self.model.unet.config.sample_size * self.model.vae_scale
        width, height = (max(8, (side or native_px) // 8 * 8) for side in (prompt.width, prompt.height))
        with untouched_random_state():
            self.pipeline.scheduler = make_scheduler(prompt.sample_sampler or self.sampler, self.model.scheduler_config)
            generator = torch.Generator().manual_seed(prompt.seed)
            negative = self.encode_text([prompt.negative_prompt]) if prompt.scale > 1 else None
            prompts = self.model.pipeline_prompts(self.encode_text([prompt.prompt]), negative)
            latents = self.pipeline(
                **prompts, width=width, height=height,
                num_inference_steps=prompt.sample_steps, guidance_scale=prompt.scale, generator=generator,
                output_type="latent",
            ).images  # (1, 4, h, w)  # fmt: skip
            home = self.model.vae.device
            pixels = self.model.vae.to(self.device)
            pixels = self.model.decode_latents(latents)  # (1, 3, H, W)
            self.model.vae.to(home)
        return self.pipeline.image_processor.postprocess(pixels.float(), output_type="pil")[0]

    def save_pictures(
        self, prompts: list[Prompt], folder: Union[str, Path], name: str, run_seed: int = 0
    ) -> list[tuple[Prompt, Path]]:
        """Make and save a picture for each prompt; -> [(Prompt with its seed, PNG path)].
        A prompt without a seed has `run_seed` plus its place: equal prompts, equal seeds."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        results = []
        for number, prompt in enumerate(tqdm(prompts, desc="previews", leave=False, disable=len(prompts) < 2)):
            prompt = prompt if prompt.seed is not None else replace(prompt, seed=run_seed + number)
            path = Path(folder) / f"{name}_{number:02d}_{prompt.seed}.png"
            aside = path.with_name(f".{path.name}")
            self.picture(prompt).save(aside, format="png")
            aside.replace(path)
            results.append((prompt, path))
        return results
