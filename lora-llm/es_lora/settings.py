"""The settings of early stopping: every flag with help and check, and the plan made of them.

Both trainers, a job of multi_lora.py, the callback and the patches make their parsers and their
checks of `StopSettings`. Python 3.8, as all of es_lora/."""

import argparse
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from es_lora.average import DEFAULT_WIDTH, width_or_auto
from es_lora.command_line import auto_word, number_or_auto, truth
from es_lora.inputs.bounds import MOST
from es_lora.rules import DEFAULT_RULE, RULES, RuleSettings, StopRule, check_rule, make_rule, value_of_valley
from es_lora.shadows import DEFAULT_SHADOWS

VALLEY_HELP = "N of the rule nth-valley: another name of its --rule_value"
LEAST = {"shadows": 0, "shadow_rank": 1}
LARGEST = {"shadows": 1000, "shadow_rank": 65_536}  # others: MOST
KNOW_AUTO = (number_or_auto, width_or_auto)


def _flag(default: Any, text: str, read: Callable[[Any], Any] = str, **more: Any) -> Any:
    """A setting with its default, its help and the function that reads a given value."""
    return field(default=default, metadata={"help": text, "read": read, **more})


@dataclass(frozen=True)
class StopSettings:
    """What a person can set about early stopping. None means automatic, or the rule's own number.

    cs_interval: in optimizer steps. window_size (M), shadow_interval: in measurements.
    cs_component: None is the U-Net where it is trained, else the part, or all parts, that are.
    shadows: None is DEFAULT_SHADOWS where the rule needs them, else 0 (`complete`)."""

    calculate_cs: bool = _flag(True, "measure CS and CS-Fluctuation, and report the turning point", truth)
    early_stop: bool = _flag(False, "stop at the turning point and keep its weights (measures CS)", truth)
    cs_interval: Optional[int] = _flag(
        None, "optimizer steps between measurements, or auto: ten an epoch", number_or_auto, aliases=("--cs_steps",)
    )
    window_size: Optional[int] = _flag(None, "measurements in the window M, or auto: about one epoch", number_or_auto)
    stop_rule: str = _flag(DEFAULT_RULE, f"the rule that decides: {', '.join(RULES)}")
    rule_value: Optional[float] = _flag(
        None, "the rule's number: epochs, a patience, valleys (default: the rule's own)", float
    )
    cs_reduction: str = _flag("row", "row (mean cosine of the rows) or matrix (flattened)", choices=("row", "matrix"))
    cs_component: Optional[str] = _flag(None, "whose CS decides: a trained part, or all (default: unet, where trained)")
    shadows: Optional[int] = _flag(
        None, "adapters beside, each scored on a fold it is not trained on; 1 with --stop_rule shadow, else 0", int
    )
    shadow_rank: int = _flag(8, "LoRA rank of a shadow", int)
    shadow_interval: Optional[int] = _flag(
        1, "score the shadows at every so many measurements; auto: few, cheap ones", number_or_auto
    )
    average: Optional[float] = _flag(
        None,
        "width of the average of the weights that is kept, as a share of the steps; 0 and auto: off",
        width_or_auto,
    )
    snapshot_disk_gb: float = _flag(20.0, "disk that the snapshots may use, in GB", float)

    def given(self, values: Mapping[str, Any]) -> Tuple["StopSettings", List[str]]:
        """(these settings with the given values, every problem as a sentence that names its flag).

        values: by flag name, as text or already read; None and other names are passed over."""
        read, problems = {}, []
        for entry in fields(self):
            value = values.get(entry.name)
            if value is None:
                continue
            try:
                read[entry.name] = entry.metadata["read"](value)
            except (ValueError, TypeError, OverflowError) as error:
                problems.append(f"--{entry.name} {value!s:.60}: {str(error):.200}")
        settings = replace(self, **read)
        if values.get("valley") is not None:
            try:
                number = value_of_valley(settings.stop_rule, int(values["valley"]))
                settings = settings if number is None else replace(settings, rule_value=number)
            except (ValueError, TypeError, OverflowError) as error:
                problems.append(f"--valley {values['valley']!s:.60}: {str(error):.200}")
        settings = replace(settings, calculate_cs=settings.calculate_cs or settings.early_stop)
        return settings, problems + settings.problems()

    def problems(self) -> List[str]:
        """What is wrong with the values, each by itself and together, a sentence each."""
        found = []
        try:
            check_rule(self.stop_rule, self.rule_value)
        except ValueError as error:
            found.append(f"--stop_rule {self.stop_rule}: {error}")
        for entry in fields(self):
            value, choices = getattr(self, entry.name), entry.metadata.get("choices")
            if choices and value not in choices:
                found.append(f"--{entry.name} {value}: choose {' or '.join(choices)}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                found.append(f"--{name} {value}: must be at least {least}")
        for entry in fields(self):
            value, most = getattr(self, entry.name), LARGEST.get(entry.name, MOST)
            if isinstance(value, (int, float)) and most < value < math.inf:
                found.append(f"--{entry.name} {value:g}: must be at most {most}")
        if not (math.isfinite(self.snapshot_disk_gb) and self.snapshot_disk_gb > 0):
            found.append(f"--snapshot_disk_gb {self.snapshot_disk_gb:g}: must be above 0")
        if self.average and not self.calculate_cs:
            found.append(f"--average {self.average:g}: the average is kept where CS is measured; add --early_stop")
        if self.shadows == 0 and self.calculate_cs and self.needs_shadows:
            found.append(
                f"--stop_rule {self.stop_rule} decides on shadows: leave out --shadows 0, or give --shadows 1 or more"
            )
        return found

    @property
    def needs_shadows(self) -> bool:
        """Whether the rule reads the loss of shadow adapters."""
        return self.stop_rule in RULES and "shadow_loss" in RULES[self.stop_rule].needs

    @property
    def needs_heldout(self) -> bool:
        """Whether the rule reads the loss of held-out examples."""
        return self.stop_rule in RULES and "heldout_loss" in RULES[self.stop_rule].needs

    @property
    def shadow_count(self) -> int:
        """How many shadows are trained: those asked for, or what the rule needs."""
        if self.shadows is not None:
            return self.shadows
        return DEFAULT_SHADOWS if self.calculate_cs and self.needs_shadows else 0

    @property
    def average_width(self) -> float:
        """The width of the average that is kept; 0: single steps are kept."""
        if self.average is not None:
            return self.average
        return DEFAULT_WIDTH if self.early_stop else 0.0

    def without_average(self, optimizer: str) -> "StopSettings":
        """These settings for an optimizer that averages its weights itself. Raises ValueError where
        an average is asked for."""
        if self.average:
            raise ValueError(f"--average {self.average:g}: {optimizer} averages its weights itself; give --average 0")
        return replace(self, average=0.0)

    def as_flags(self) -> Dict[str, Any]:
        """{flag: value} as they are written down: automatic ones as `auto`, unset ones as None."""
        given = ((entry.name, entry.metadata["read"], getattr(self, entry.name)) for entry in fields(self))
        return {name: auto_word(value) if read in KNOW_AUTO else value for name, read, value in given}

    def plan(self, components: Sequence[str], steps_per_epoch: float, total_steps: int) -> "MeasurementPlan":
        """Resolve what is automatic against a run.

        components: the trained parts. steps_per_epoch, total_steps: completed optimizer steps, all
        counted in (repeats, ...). Raises ValueError for a component that is not trained."""
        interval = self.cs_interval or max(1, round(steps_per_epoch / 10))
        window = self.window_size or auto_window(steps_per_epoch, interval)
        component, averaged = self._component(components), self.average_width > 0
        rule = RuleSettings(window, component, steps_per_epoch, interval, self.rule_value, averaged)
        return MeasurementPlan(self, rule, tuple(_notices(make_rule(self.stop_rule, rule), total_steps)), total_steps)

    def _component(self, components: Sequence[str]) -> str:
        if self.cs_component is None:
            return "unet" if "unet" in components else components[0] if len(components) == 1 else "all"
        if self.cs_component not in (*components, "all"):
            raise ValueError(f"--cs_component {self.cs_component}: trained are {', '.join(components)} (or give all)")
        return self.cs_component


@dataclass(frozen=True)
class MeasurementPlan:
    """By which rule a run is decided, when CS is measured, and what to know before it starts.
    total_steps: the budget, in optimizer steps."""

    stop: StopSettings
    rule_settings: RuleSettings
    notices: Tuple[str, ...]
    total_steps: int

    @property
    def cs_interval(self) -> int:
        return self.rule_settings.cs_interval

    @property
    def window(self) -> int:
        return self.rule_settings.window

    @property
    def component(self) -> str:
        return self.rule_settings.component

    @property
    def steps_per_epoch(self) -> float:
        return self.rule_settings.steps_per_epoch

    @property
    def average(self) -> float:
        """The width of the average that is kept; 0: single steps are kept."""
        return self.stop.average_width

    def due(self, step: int) -> bool:
        """Whether `step`, counted in completed optimizer steps, is one to measure at."""
        return step > 0 and step % self.cs_interval == 0

    def is_last(self, step: int) -> bool:
        """Whether no measurement of the budget comes after that of `step`."""
        return step + self.cs_interval > self.total_steps

    def rule(self) -> StopRule:
        """A fresh rule."""
        return make_rule(self.stop.stop_rule, self.rule_settings)

    def header(self) -> Dict[str, Any]:
        """What the first line of the history says of the plan."""
        return {
            "cs_interval": self.cs_interval,
            "reduction": self.stop.cs_reduction,
            "decided_on": self.component,
            "rule": self.stop.stop_rule,
            "window": self.window,
            "steps_per_epoch": self.steps_per_epoch,
            "rule_value": self.stop.rule_value,
            "average": self.average,
        }


def _notices(rule: StopRule, total_steps: int) -> List[str]:
    window, interval, per_epoch = rule.settings.window, rule.settings.cs_interval, rule.settings.steps_per_epoch
    notices = []
    if window * interval > math.ceil(per_epoch * 1.05):
        notices.append(
            f"The window of {window} measurements every {interval} steps spans {window * interval / per_epoch:.1f} "
            f"epochs of {per_epoch:g} steps."
        )
    if total_steps // interval < rule.first_answer():
        notices.append(
            f"This run is too short for the rule {rule.name} to decide: it answers after "
            f"{rule.first_answer() * interval} steps at the earliest and the budget is {total_steps}. Train longer, or "
            "lower --cs_interval or --window_size."
        )
    return notices


def auto_window(steps_per_epoch: float, cs_interval: int) -> int:
    """M = about one epoch, and at least 5 measurements."""
    return max(5, round(steps_per_epoch / cs_interval))


def add_stop_arguments(group: Any, usual: StopSettings, leave_out: Sequence[str] = ()) -> None:
    """Add every flag of early stopping to a parser or a group; `StopSettings.given` reads them.

    usual: the trainer's defaults, shown in its help. Values stay text, to be checked at once."""
    shown = usual.as_flags()
    for entry in fields(StopSettings):
        if entry.name in leave_out:
            continue
        words: Dict[str, Any] = {"help": f"{entry.metadata['help']} (default: {shown[entry.name]})", "default": None}
        if shown[entry.name] is None:
            words["help"] = entry.metadata["help"]
        if entry.metadata["read"] is truth:
            words.update(nargs="?", const=True)
        group.add_argument(f"--{entry.name}", *entry.metadata.get("aliases", ()), **words)
    group.add_argument("--valley", default=None, help=VALLEY_HELP)


def read_stop_settings(values: Mapping[str, Any], usual: StopSettings) -> StopSettings:
    """The settings that these values make. Raises ValueError with every problem at once."""
    settings, problems = usual.given(values)
    if problems:
        raise ValueError("; ".join(problems))
    return settings


def stop_values(arguments: argparse.Namespace) -> Dict[str, Any]:
    """The flags of early stopping out of all parsed arguments, those that were given."""
    names = [entry.name for entry in fields(StopSettings)] + ["valley"]
    return {name: value for name, value in vars(arguments).items() if name in names and value is not None}
