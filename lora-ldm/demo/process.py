"""Start a training from settings that a person filled in, follow it, and end it.

The command is a list of words, of checked values and offered names; no shell reads it."""

import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.loading import is_sdxl
from base.sampling import parse_prompt_line
from demo.run_folders import LOG_NAME, TREE, Places
from es_lora.files import split_lines
from es_lora.rules import DEFAULT_RULE, RULES

PROMPTS_NAME = "preview_prompts.txt"
WHOLE = ("resolution_px", "rank", "epochs", "batch_size", "pictures_every_epochs", "cs_interval", "window", "seed")
PRECISIONS = ("no", "fp16", "bf16")
# name: (least, most) of what a form may ask for
LIMITS = {
    "resolution_px": (64, 2048),
    "rank": (1, 1024),
    "alpha": (0.001, 1024),
    "epochs": (1, 10_000),
    "batch_size": (1, 256),
    "unet_rate": (0, 1),
    "text_rate": (0, 1),
    "pictures_every_epochs": (0, 10_000),
    "cs_interval": (0, 100_000),
    "window": (0, 1000),
    "seed": (0, 2**31 - 1),
}

MOST_PROMPTS, MOST_LETTERS, MOST_RUNNING = 20, 2000, 4
# What a picture may be asked for; prompts of a training are held to the same.
PICTURE_LIMITS = {
    "sample_steps": (1, 150),
    "scale": (0, 30),
    "seed": (0, 2**31 - 1),
    "width": (0, 2048),
    "height": (0, 2048),
    "strength": (0, 2),
}

# The rules that need no held-out pictures, the default first.
OFFERED_RULES = tuple(
    dict.fromkeys([DEFAULT_RULE, *(name for name in RULES if "heldout_loss" not in RULES[name].needs)])
)


@dataclass
class TrainingSettings:
    """The settings that matter. 0 is automatic for cs_interval and window only."""

    name: str
    base: str  # as Places offers it
    images: str  # as Places offers it
    prompts: str = ""  # prompt lines of kohya's kind, one a line
    resolution_px: int = 512
    rank: int = 16
    alpha: float = 16
    epochs: int = 15
    batch_size: int = 2
    unet_rate: float = 1e-3
    text_rate: float = 1e-4
    pictures_every_epochs: int = 0
    early_stop: bool = True
    cs_interval: int = 0
    window: int = 0
    precision: str = "no"
    seed: int = 1337
    stop_rule: str = DEFAULT_RULE

    def validate(self) -> None:
        """Raises ValueError with one line per problem."""
        problems = []
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,60}", self.name):
            problems.append(f"name {self.name!r}: letters, digits, - and _ only, at most 61")
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if not _within(value, least, most) or (isinstance(value, float) and name in WHOLE):
                problems.append(f"{name} {value!r:.60} must be from {least} to {most}{', whole' * (name in WHOLE)}")
        if self.precision not in PRECISIONS:
            problems.append(f"precision {self.precision!r} must be one of {', '.join(PRECISIONS)}")
        if self.stop_rule not in OFFERED_RULES:
            problems.append(f"stop rule {self.stop_rule!r} must be one of {', '.join(OFFERED_RULES)}")
        if len(self.prompt_lines()) > MOST_PROMPTS:
            problems.append(f"{len(self.prompt_lines())} prompts: {MOST_PROMPTS} are the most")
        for line in self.prompt_lines()[:MOST_PROMPTS]:
            try:
                refuse_picture(vars(parse_prompt_line(line)))
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))

    def prompt_lines(self) -> list[str]:
        return [line.strip() for line in split_lines(self.prompts) if line.strip() and not line.strip().startswith("#")]


def _within(value, least, most):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def refuse_picture(wanted: dict[str, Any]) -> None:
    """Raise ValueError where a picture is asked for beyond what the page makes. wanted: by the
    names of PICTURE_LIMITS and of a prompt's texts; None: what the base takes."""
    problems = [
        f"{name} {wanted[name]!r:.60} must be from {least} to {most}"
        for name, (least, most) in PICTURE_LIMITS.items()
        if wanted.get(name) is not None and not _within(wanted[name], least, most)
    ]
    for name in ("prompt", "negative_prompt"):
        if len(wanted.get(name, "")) > MOST_LETTERS:
            problems.append(
                f"the {name.replace('_', ' ')} has {len(wanted[name])} letters: {MOST_LETTERS} are the most"
            )
    if problems:
        raise ValueError("\n".join(problems))


def command(settings: TrainingSettings, places: Places, folder: str | Path) -> list[str]:
    """The words of the training command. Raises ValueError for settings not allowed or offered."""
    settings.validate()
    base, images = places.base(settings.base), places.image_folder(settings.images)
    sdxl = is_sdxl_base(base)
    script = TREE / ("es_lora_sdxl.py" if sdxl else "es_lora_ldm.py")
    words = [sys.executable, str(script), "--pretrained_model_name_or_path", str(base)]
    words += [
        "--train_data_dir",
        str(images),
        "--caption_extension",
        ".txt",
        "--resolution",
        str(settings.resolution_px),
    ]
    words += ["--enable_bucket", "--min_bucket_reso", "64", "--bucket_no_upscale", "--cache_latents"]
    words += ["--output_dir", str(folder), "--output_name", settings.name]
    words += ["--network_dim", str(settings.rank), "--network_alpha", f"{settings.alpha:g}"]
    words += ["--max_train_epochs", str(settings.epochs), "--train_batch_size", str(settings.batch_size)]
    words += ["--learning_rate", f"{settings.unet_rate:g}", "--unet_lr", f"{settings.unet_rate:g}"]
    if settings.text_rate:
        words += ["--text_encoder_lr", f"{settings.text_rate:g}"]
    else:
        words += ["--network_train_unet_only", *(["--cache_text_encoder_outputs"] if sdxl else [])]
    words += ["--lr_scheduler", "cosine"]
    if sdxl and settings.precision == "fp16":
        words.append("--no_half_vae")  # SDXL's VAE gives NaN in fp16
    words += ["--mixed_precision", settings.precision, "--seed", str(settings.seed)]
    words += ["--calculate_cs", "--early_stop", str(settings.early_stop), "--stop_rule", settings.stop_rule]
    words += ["--cs_interval", str(settings.cs_interval or "auto"), "--window_size", str(settings.window or "auto")]
    if settings.prompt_lines():
        words += ["--sample_prompts", str(Path(folder) / PROMPTS_NAME)]
        if settings.pictures_every_epochs:
            words += ["--sample_every_n_epochs", str(settings.pictures_every_epochs)]
    return words


def is_sdxl_base(base: str | Path) -> bool:
    """Whether a base is SDXL: what its files say, or, so that nothing is fetched, the hub name."""
    path = Path(base)
    return is_sdxl(path) if path.exists() else "xl" in str(base).lower()


def own_group() -> dict[str, Any]:
    """Arguments of Popen for a process that a Ctrl-C of this page does not reach. On Windows only
    such a group can be sent Ctrl-Break."""
    group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", None)
    return {"start_new_session": True} if group is None else {"creationflags": group}


class TrainingProcess:
    """A training of this page. Its output goes to train.log in its folder, which must be new."""

    def __init__(self, settings: TrainingSettings, places: Places, folder: str | Path):
        self.words, self.folder = command(settings, places, folder), Path(folder)
        self.folder.mkdir(parents=True)
        if settings.prompt_lines():
            (self.folder / PROMPTS_NAME).write_text("\n".join(settings.prompt_lines()) + "\n", encoding="utf-8")
        with open(self.folder / LOG_NAME, "wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(self.words, **streams, **own_group())

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def stop(self) -> None:
        """As Ctrl-C would: the trainer ends its step and saves its state."""
        if self.exit_code is None:
            self.process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT))
