"""Optimizers by sd-scripts' names, each from its own package, and an optimizer with its schedule.

Case does not matter. Any other class of torch.optim is named as there (`Adamax`), one of another
package with it (`bitsandbytes.optim.AdEMAMix8bit`)."""

import contextlib
import importlib
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from es_lora.command_line import nearest
from es_lora.weights import is_finite
from settings.key_values import key_values

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Optimization:
    """What turns gradients into steps. raw: the optimizer itself; prepared: the accelerator's."""

    raw: torch.optim.Optimizer
    prepared: Any
    scheduler: Any
    parameters: list[torch.Tensor]

    @classmethod
    def of(cls, accelerator: Accelerator, optimizer: torch.optim.Optimizer, scheduler: Any) -> "Optimization":
        """Ready to train with."""
        prepared = accelerator.prepare(optimizer)
        if hasattr(optimizer, "train"):
            optimizer.train()
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        return cls(optimizer, prepared, scheduler, weights)

    def step(self, accelerator: Accelerator) -> None:
        """An optimizer step and one of the schedule; gradients are gone afterwards."""
        self.prepared.step()
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.prepared.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """All that `load` needs: whose state it is, and of which weights."""
        optimizer = self.prepared.state_dict()
        about = {"class": _class_name(self.raw), "shapes": [list(weight.shape) for weight in self.parameters]}
        about["entries"] = len(optimizer["state"])
        return {"optimizer": optimizer, "scheduler": self.scheduler.state_dict(), "about": about}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`. Raises ValueError where it is of another optimizer or weights, or
        not whole."""
        optimizer, own, about = state["optimizer"], self.prepared.state_dict(), state.get("about", {})
        entries = optimizer["state"]
        if about.get("class", _class_name(self.raw)) != _class_name(self.raw):
            raise ValueError(f"of the optimizer {about['class']}, this is {_class_name(self.raw)}")
        if about.get("shapes", shapes := [list(weight.shape) for weight in self.parameters]) != shapes:
            raise ValueError("of weights of another shape")
        if about.get("entries", len(entries)) != len(entries):
            raise ValueError(f"of {about['entries']} weights, {about['entries'] - len(entries)} have no state")
        bad = [key for key, entry in entries.items() if not all(map(is_finite, _tensors_in(entry)))]
        if bad:
            raise ValueError(f"{len(bad)} of {len(entries)} weights have NaN or Inf in their state")
        for saved, group in zip(optimizer["param_groups"], own["param_groups"]):
            _refuse_lacking("group of the optimizer", saved, group)
        _refuse_lacking("scheduler", state["scheduler"], self.scheduler.state_dict())
        self.prepared.load_state_dict(optimizer)
        self.scheduler.load_state_dict(state["scheduler"])

    @contextlib.contextmanager
    def weights_to_use(self) -> Iterator[None]:
        """Within it parameters are those to measure and save: schedule-free optimizers average."""
        if is_schedule_free(self.raw):
            self.raw.eval()
        yield
        if is_schedule_free(self.raw):
            self.raw.train()


def _class_name(optimizer):
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _tensors_in(entry):
    return [value for value in entry.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]


def _refuse_lacking(what, saved, own):
    """Raise ValueError where saved values lack, or are of another kind than the object's own."""
    lacking = sorted(own.keys() - saved.keys())
    if lacking:
        raise ValueError(f"the {what} lacks {', '.join(lacking)}")
    for name, value in own.items():
        numbers = isinstance(value, (int, float)) and isinstance(saved[name], (int, float))
        if value is not None and saved[name] is not None and not numbers and type(saved[name]) is not type(value):
            raise ValueError(f"the {what} has a {name} of another kind")


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Schedule-free optimizers hold averaged weights, shown between eval() and train()."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def make_optimizer(args: Namespace, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of --optimizer_type over groups [{"params": [...], "lr": float}, ...].
    Raises ValueError for an unknown name, a missing package, refused settings or rates."""
    name = args.optimizer_type.lower()
    if name in OPTIMIZERS:
        package, class_name, settings = OPTIMIZERS[name]
    elif "." in args.optimizer_type:
        package, _, class_name = args.optimizer_type.rpartition(".")
        settings = {}
    elif isinstance(getattr(torch.optim, args.optimizer_type, None), type):
        package, class_name, settings = "torch.optim", args.optimizer_type, {}
    else:
        raise ValueError(
            f"--optimizer_type {args.optimizer_type} is unknown{nearest(name, OPTIMIZERS)}; "
            "a class of another package is named package.Class"
        )
    settings = {"lr": args.learning_rate, **settings, **key_values(args.optimizer_args)}
    if name == "adafactor":
        settings, groups = _adafactor_settings(settings, groups)
    rates = {group["lr"] for group in groups if group.get("lr")}
    if name.startswith(ONE_RATE_FOR_ALL) and len(rates) > 1:
        raise ValueError(
            f"--optimizer_type {args.optimizer_type} finds the rate itself and needs the same --unet_lr and "
            "--text_encoder_lr (1.0 is usual), and no rates of blocks or LoRA+ in --network_args, "
            f"not {', '.join(f'{rate:g}' for rate in sorted(rates)[:5])}"
        )
    optimizer_class = import_class(package, class_name, "--optimizer_type")
    try:
        return optimizer_class(groups, **settings)
    except TypeError as error:
        raise ValueError(
            f"--optimizer_args {' '.join(args.optimizer_args or []):.200}: {class_name} refuses them: {error}"
        ) from error


def _adafactor_settings(settings, groups):
    """Adafactor with relative steps (its default) takes no rate, nor does a group of it.
    warmup_init means relative steps."""
    settings["relative_step"] = bool(settings.get("relative_step", True) or settings.get("warmup_init"))
    if not settings["relative_step"]:
        return settings, groups
    if len({group.get("lr") for group in groups}) > 1:
        logger.warning("Adafactor with relative steps sets its own rate, one for all: the rates given have no effect")
    return {**settings, "lr": None}, [{key: group[key] for key in group if key != "lr"} for group in groups]


def built(name: str, build: Callable[[], Any]) -> Any:
    """What `build` makes. Raises ValueError where the class refuses its settings."""
    try:
        return build()
    except TypeError as error:
        raise ValueError(f"--lr_scheduler_args: {name} refuses them: {error}") from error


def import_class(package: str, class_name: str, flag: str) -> type:
    """A class by its name. Raises ValueError, naming the flag, if it or its package is missing."""
    try:
        return getattr(importlib.import_module(package), class_name)
    except ImportError as error:
        top = package.split(".")[0]
        raise ValueError(f"{flag} needs the package {top}: pip install {INSTALL.get(top, top)} ({error})") from error
    except AttributeError as error:
        raise ValueError(f"{flag}: {package} has no class {class_name}") from error
