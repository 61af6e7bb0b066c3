"""Optimizers and learning-rate schedulers by the names sd-scripts gives them, each from its own package.

Names are matched without regard to case. Any other class can be named with its package: `torch.optim.Adamax`.
"""

import ast
import contextlib
import difflib
import importlib

# Name in lower case -> package, class, settings that the name stands for.
OPTIMIZERS = {
    "adamw": ("torch.optim", "AdamW", {}),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", {}),
    "pagedadamw": ("bitsandbytes.optim", "PagedAdamW", {}),
    "pagedadamw8bit": ("bitsandbytes.optim", "PagedAdamW8bit", {}),
    "pagedadamw32bit": ("bitsandbytes.optim", "PagedAdamW32bit", {}),
    "lion": ("lion_pytorch", "Lion", {}),
    "lion8bit": ("bitsandbytes.optim", "Lion8bit", {}),
    "pagedlion8bit": ("bitsandbytes.optim", "PagedLion8bit", {}),
    "sgdnesterov": ("torch.optim", "SGD", {"momentum": 0.9, "nesterov": True}),
    "sgdnesterov8bit": ("bitsandbytes.optim", "SGD8bit", {"momentum": 0.9, "nesterov": True}),
    "dadaptation": ("dadaptation.experimental", "DAdaptAdamPreprint", {}),
    "dadaptadam": ("dadaptation", "DAdaptAdam", {}),
    "dadaptadampreprint": ("dadaptation.experimental", "DAdaptAdamPreprint", {}),
    "dadaptadagrad": ("dadaptation", "DAdaptAdaGrad", {}),
    "dadaptadan": ("dadaptation", "DAdaptAdan", {}),
    "dadaptadanip": ("dadaptation.experimental", "DAdaptAdanIP", {}),
    "dadaptlion": ("dadaptation", "DAdaptLion", {}),
    "dadaptsgd": ("dadaptation", "DAdaptSGD", {}),
    "prodigy": ("prodigyopt", "Prodigy", {}),
    "adafactor": ("transformers.optimization", "Adafactor", {}),
    "adamwschedulefree": ("schedulefree", "AdamWScheduleFree", {}),
    "radamschedulefree": ("schedulefree", "RAdamScheduleFree", {}),
    "sgdschedulefree": ("schedulefree", "SGDScheduleFree", {}),
    "prodigyplusschedulefree": ("prodigyplus", "ProdigyPlusScheduleFree", {}),
}
INSTALL = {"lion_pytorch": "lion-pytorch", "prodigyplus": "prodigy-plus-schedule-free"}
ONE_RATE_FOR_ALL = ("dadapt", "prodigy")  # they find the rate themselves and refuse different ones

DIFFUSERS_SCHEDULERS = "constant constant_with_warmup linear cosine cosine_with_restarts polynomial".split()
TRANSFORMERS_SCHEDULERS = "inverse_sqrt cosine_with_min_lr warmup_stable_decay".split()
SCHEDULERS = [*DIFFUSERS_SCHEDULERS, "piecewise_constant", *TRANSFORMERS_SCHEDULERS, "adafactor"]
# Settings that only some schedulers have: refused, with the reason, for the others.
SCHEDULER_SETTINGS = {
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
}


def key_values(words):
    """{"key": value} of words such as `weight_decay=0.01`, `betas=0.9,0.999`, `decouple=True`, `decay_type=linear`."""
    result = {}
    for word in words or []:
        key, equals, text = word.partition("=")
        if not (key and equals):
            raise ValueError(f"'{word}' is not of the form key=value")
        try:
            result[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            result[key] = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return result


def make_optimizer(args, groups):
    """The optimizer of --optimizer_type over parameter groups [{"params": [...], "lr": float}, ...].

    Raises ValueError for an unknown name, a missing package, a setting the class does not take, or rates it refuses.
    """
    name = args.optimizer_type.lower()
    if name in OPTIMIZERS:
        package, class_name, settings = OPTIMIZERS[name]
    elif "." in args.optimizer_type:
        package, _, class_name = args.optimizer_type.rpartition(".")
        settings = {}
    else:
        raise ValueError(
            f"--optimizer_type {args.optimizer_type} is unknown{_nearest(name, OPTIMIZERS)}; "
            "a class of another package is named package.Class"
        )
    settings = {"lr": args.learning_rate, **settings, **key_values(args.optimizer_args)}
    if name == "adafactor":
        settings, groups = _adafactor_settings(settings, groups)
    rates = {group["lr"] for group in groups if group.get("lr")}
    if name.startswith(ONE_RATE_FOR_ALL) and len(rates) > 1:
        raise ValueError(
            f"--optimizer_type {args.optimizer_type} finds the rate itself and needs the same --unet_lr and "
            f"--text_encoder_lr (1.0 is usual), not {sorted(rates)}"
        )
    optimizer_class = _import_class(package, class_name, "--optimizer_type")
    try:
        return optimizer_class(groups, **settings)
    except TypeError as error:
        raise ValueError(
            f"--optimizer_args {' '.join(args.optimizer_args or [])}: {class_name} refuses them: {error}"
        ) from error


def _adafactor_settings(settings, groups):
    """Adafactor with relative steps (its default) takes no rate, neither of its own nor of a group."""
    settings.setdefault("relative_step", True)
    if not settings["relative_step"]:
        return settings, groups
    settings.update(lr=None, warmup_init=settings.get("warmup_init", True))
    return settings, [{key: value for key, value in group.items() if key != "lr"} for group in groups]


def make_scheduler(args, optimizer, total_steps):
    """The scheduler of --lr_scheduler / --lr_scheduler_type; step it once after each optimizer step.

    total_steps: optimizer steps of the whole run. Raises ValueError for unknown names and settings without effect.
    """
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
        raise ValueError(f"--lr_scheduler {name} is unknown{_nearest(name, SCHEDULERS)}; there are {', '.join(SCHEDULERS)}")
    _refuse_settings_without_effect(args, name)
    warmup_steps, decay_steps = _steps(args.lr_warmup_steps, total_steps), _steps(args.lr_decay_steps, total_steps)
    extra = key_values(args.lr_scheduler_args)
    if name == "adafactor":
        return _adafactor_scheduler(args, optimizer)
    if name == "piecewise_constant":
        if "step_rules" not in extra:
            raise ValueError("--lr_scheduler piecewise_constant needs --lr_scheduler_args step_rules=1:100,0.1:200,0.01")
        return _diffusers_scheduler(name, optimizer, step_rules=_step_rules(args.lr_scheduler_args))
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


def _step_rules(words):
    return next(word for word in words if word.startswith("step_rules=")).partition("=")[2].strip("'\"")


def _diffusers_scheduler(name, optimizer, **settings):
    from diffusers.optimization import get_scheduler

    return _built(name, lambda: get_scheduler(name, optimizer, **settings))


def _transformers_scheduler(args, name, optimizer, warmup_steps, decay_steps, total_steps, extra):
    from transformers.optimization import get_scheduler

    settings = {}
    if name == "inverse_sqrt":
        settings = {"timescale": args.lr_scheduler_timescale}
    elif name == "cosine_with_min_lr":
        settings = {"num_cycles": args.lr_scheduler_num_cycles / 2, "min_lr_rate": args.lr_scheduler_min_lr_ratio or 0.0}
    elif name == "warmup_stable_decay":
        settings = {
            "num_decay_steps": decay_steps,
            "num_stable_steps": total_steps - warmup_steps - decay_steps,
            "min_lr_ratio": args.lr_scheduler_min_lr_ratio or 0.0,
            "num_cycles": args.lr_scheduler_num_cycles / 2,
        }
        total_steps = None  # it wants either the total or the stable steps
    settings.update(extra)
    return _built(name, lambda: get_scheduler(name, optimizer, warmup_steps, total_steps, settings))


def _adafactor_scheduler(args, optimizer):
    from transformers.optimization import AdafactorSchedule

    text = args.lr_scheduler.partition(":")[2]
    return AdafactorSchedule(optimizer, float(text) if text else args.learning_rate)


def _foreign_scheduler(args, optimizer):
    package, _, class_name = args.lr_scheduler_type.rpartition(".")
    scheduler_class = _import_class(package or "torch.optim.lr_scheduler", class_name, "--lr_scheduler_type")
    return _built(args.lr_scheduler_type, lambda: scheduler_class(optimizer, **key_values(args.lr_scheduler_args)))


def _built(name, build):
    try:
        return build()
    except TypeError as error:
        raise ValueError(f"--lr_scheduler_args: {name} refuses them: {error}") from error


def _import_class(package, class_name, flag):
    try:
        return getattr(importlib.import_module(package), class_name)
    except ImportError as error:
        top = package.split(".")[0]
        raise ValueError(f"{flag} needs the package {top}: pip install {INSTALL.get(top, top)} ({error})") from error
    except AttributeError as error:
        raise ValueError(f"{flag}: {package} has no class {class_name}") from error


def _nearest(name, known):
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def is_schedule_free(optimizer):
    """Schedule-free optimizers hold averaged weights, shown between eval() and train()."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


@contextlib.contextmanager
def averaged_weights(optimizer):
    """Within it the parameters are those to use and to save; for ordinary optimizers they always are."""
    if is_schedule_free(optimizer):
        optimizer.eval()
    yield
    if is_schedule_free(optimizer):
        optimizer.train()
