"""Learning rate schedules by kohya's names: diffusers', transformers', Adafactor's, any class."""

from argparse import Namespace
from typing import Any

import torch

from es_lora.command_line import nearest
from settings.key_values import key_values
from training.optimizers import built, import_class, is_schedule_free

DIFFUSERS_SCHEDULERS = "constant constant_with_warmup linear cosine cosine_with_restarts polynomial".split()
TRANSFORMERS_SCHEDULERS = "inverse_sqrt cosine_with_min_lr warmup_stable_decay".split()
SCHEDULERS = [*DIFFUSERS_SCHEDULERS, "piecewise_constant", *TRANSFORMERS_SCHEDULERS, "adafactor"]
# Settings that only some schedulers have: refused, with the reason, for the others.
SCHEDULER_SETTINGS = {
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
}


def make_scheduler(args: Namespace, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """The scheduler of --lr_scheduler / --lr_scheduler_type; step it after each optimizer step.

    total_steps: of the run. Raises ValueError for unknown names and settings without effect."""
    if is_schedule_free(optimizer):
        if args.lr_scheduler != "constant" or args.lr_scheduler_type:
            raise ValueError("a schedule-free optimizer needs no schedule: drop --lr_scheduler and --lr_scheduler_type")
        return _diffusers_scheduler("constant", optimizer)
    if args.lr_scheduler_type:
        return _foreign_scheduler(args, optimizer)
    name = args.lr_scheduler.split(":")[0]
    if getattr(optimizer, "defaults", {}).get("relative_step") and name in ("constant", "adafactor"):
        name = "adafactor"
    elif getattr(optimizer, "defaults", {}).get("relative_step"):
        raise ValueError(
            f"--lr_scheduler {name}: Adafactor with relative steps sets its own rate; drop it, or add "
            "--optimizer_args relative_step=False"
        )
    if name not in SCHEDULERS:
        raise ValueError(
            f"--lr_scheduler {name} is unknown{nearest(name, SCHEDULERS)}; there are {', '.join(SCHEDULERS)}"
        )
    _refuse_settings_without_effect(args, name)
    warmup_steps, decay_steps = _steps(args.lr_warmup_steps, total_steps), _steps(args.lr_decay_steps, total_steps)
    extra = key_values(args.lr_scheduler_args)
    if name == "adafactor":
        return _adafactor_scheduler(args, optimizer)
    if name == "piecewise_constant":
        if "step_rules" not in extra:
            raise ValueError(
                "--lr_scheduler piecewise_constant needs --lr_scheduler_args step_rules=1:100,0.1:200,0.01"
            )
        rules = next(word for word in args.lr_scheduler_args if word.startswith("step_rules=")).partition("=")[2]
        return _diffusers_scheduler(name, optimizer, step_rules=rules.strip("'\""))
    if name in DIFFUSERS_SCHEDULERS:
        cycles = {"num_cycles": args.lr_scheduler_num_cycles} if name == "cosine_with_restarts" else {}
        power = {"power": args.lr_scheduler_power} if name == "polynomial" else {}
        needed = {} if name == "constant" else {"num_warmup_steps": warmup_steps, "num_training_steps": total_steps}
        return _diffusers_scheduler(name, optimizer, **needed, **cycles, **power, **extra)
    return _transformers_scheduler(args, name, optimizer, warmup_steps, decay_steps, total_steps, extra)


def _refuse_settings_without_effect(args, name):
    for setting, names in SCHEDULER_SETTINGS.items():
        if getattr(args, setting) and name not in names:
            raise ValueError(f"--{setting} has no effect with --lr_scheduler {name}; it is for {' and '.join(names)}")
    if args.lr_warmup_steps and name in ("constant", "piecewise_constant", "adafactor"):
        raise ValueError(f"--lr_warmup_steps has no effect with --lr_scheduler {name}; use constant_with_warmup")
    if args.lr_scheduler_args and name in ("constant", "adafactor"):
        raise ValueError(f"--lr_scheduler_args has no effect with --lr_scheduler {name}")


def _steps(value, total_steps):
    """A number of steps, or below 1 a fraction of all of them."""
    return int(value * total_steps) if isinstance(value, float) and value < 1 else int(value)


def _diffusers_scheduler(name, optimizer, **settings):
    from diffusers.optimization import get_scheduler

    return built(name, lambda: get_scheduler(name, optimizer, **settings))


def _transformers_scheduler(args, name, optimizer, warmup_steps, decay_steps, total_steps, extra):
    from transformers.optimization import get_scheduler

    settings = {}
    if name == "inverse_sqrt":
        settings = {"timescale": args.lr_scheduler_timescale}
    elif name == "cosine_with_min_lr":
        settings = {
            "num_cycles": args.lr_scheduler_num_cycles / 2,
            "min_lr_rate": args.lr_scheduler_min_lr_ratio or 0.0,
        }
    elif name == "warmup_stable_decay":
        settings = {
            "num_decay_steps": decay_steps,
            "num_stable_steps": total_steps - warmup_steps - decay_steps,
            "min_lr_ratio": args.lr_scheduler_min_lr_ratio or 0.0,
            "num_cycles": args.lr_scheduler_num_cycles / 2,
        }
        total_steps = None  # it wants either the total or the stable steps
    settings.update(extra)
    return built(name, lambda: get_scheduler(name, optimizer, warmup_steps, total_steps, settings))


def _adafactor_scheduler(args, optimizer):
    from transformers.optimization import AdafactorSchedule

    text = args.lr_scheduler.partition(":")[2]
    return AdafactorSchedule(optimizer, float(text) if text else args.learning_rate)


def _foreign_scheduler(args, optimizer):
    package, _, class_name = args.lr_scheduler_type.rpartition(".")
    scheduler_class = import_class(package or "torch.optim.lr_scheduler", class_name, "--lr_scheduler_type")
    return built(args.lr_scheduler_type, lambda: scheduler_class(optimizer, **key_values(args.lr_scheduler_args)))
