"""How a run ended: the one sentence, the one schema of result.json, the last lines, the exit code.

Both trainers, the jobs of multi_lora.py, the callback and the patches leave the same result.json:

    format          "es-lora-result/1"
    outcome         as in EXIT_CODES: stopped_early, budget_reached, no_turning_point, ...
    exit_code       0, 3 where training diverged, 130 where it was interrupted
    verdict         one sentence: what happened and which weights are kept
    reason          the rule's own sentence
    keep_step       the turning point: the step whose weights the rule keeps
    detected_step   the step at which the rule said so
    usable_steps    [first, last] step whose weights would do as well
    last_step       completed optimizer steps; total_steps: the budget
    rule, window, cs_interval   by what it was decided
    average         the width of the average that is kept; 0: single steps are
    files           {"kept", "last", "turning_point", "state": {"path", "step", "averaged"}}
    held_step       the step whose weights the model holds, where a caller goes on
    heldout         {"before", "kept", "last": held-out loss}; kept: the turning point. "average":
                    of the averaged weights at the end, where these lie under the normal name
    parts           {component: the rule's verdict on its own CS}
    shadows         what shadow adapters have cost
    seconds, seed, settings, versions

A value that is not known is null. What only one trainer knows (name and group of a job, MMLU,
general text, test loss, trainable parameters) stands beside these under its own name.
"""

import json
import math
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from es_lora.command_line import shown_path, without_secret_flags
from es_lora.files import write_text_whole
from es_lora.rules import Decision
from es_lora.settings import MeasurementPlan

RESULT_NAME, REPORT_NAME = "result.json", "report.html"
RESULT_FORMAT = "es-lora-result/1"
EXIT_CODES = dict.fromkeys(("stopped_early", "budget_reached", "no_turning_point", "stopped_by_other"), 0)
EXIT_CODES.update(diverged=3, interrupted=130)
WEIGHTS = {"before": "before training", "kept": "kept", "average": "average at the end", "last": "last step"}
PART_NAMES = {"unet": "U-Net", "te": "text encoder", "te1": "first text encoder", "te2": "second text encoder"}


@dataclass(frozen=True)
class SavedWeights:
    """A file or folder of the run: its place below the output folder, and its weights' step."""

    path: str
    step: Optional[int] = None
    averaged: bool = False


@dataclass
class Outcome:
    """How a run ended, filled in while its weights are scored and saved.

    name: a key of EXIT_CODES. last_step, total_steps: completed optimizer steps, and the budget.
    plan: of the measurements; None where nothing was measured. diverged: why, where it did.
    stopped_by: who else ended the training. held_step: whose weights the model holds, where they
    are left to the caller and not saved. extra: what only this trainer knows."""

    name: str
    last_step: int
    total_steps: int
    plan: Optional[MeasurementPlan] = None
    decision: Optional[Decision] = None
    diverged: Optional[str] = None
    stopped_by: Optional[str] = None
    held_step: Optional[int] = None
    files: Dict[str, SavedWeights] = field(default_factory=dict)
    heldout: Dict[str, Optional[float]] = field(default_factory=dict)
    parts: Dict[str, Any] = field(default_factory=dict)
    shadows: Optional[Dict[str, Any]] = None
    seconds: Optional[float] = None
    seed: Optional[int] = None
    extra: Dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.name]

    @property
    def averages(self) -> bool:
        """Whether averaged weights are kept."""
        return self.plan is not None and self.plan.average > 0

    @property
    def keeps_last(self) -> bool:
        """Whether the turning point's weights are the last ones: they are scored and saved once."""
        return not self.averages and self.decision is not None and self.decision.keep_step == self.last_step

    @property
    def keeps_average_of_all(self) -> bool:
        """Whether the average at the end of the training is what is kept."""
        return self.averages and self.name in ("budget_reached", "no_turning_point")

    def saved(self, what: str, path: str, step: Optional[int] = None, averaged: Optional[bool] = None) -> None:
        """Note a file by its path relative to the output folder, and the step of its weights.
        what: "kept" lies under the normal name, "last", "turning_point" and "state" beside it.
        averaged: None: as the run averages; the last weights and a state never are."""
        if averaged is None:
            averaged = self.averages and what in ("kept", "turning_point")
        self.files[what] = SavedWeights(path, step, averaged)

    # ------------------------------------------------------------------------------------- in words

    def sentence(self) -> str:
        """The verdict in plain words."""
        return {
            "stopped_early": self._stopped_early,
            "stopped_by_other": self._stopped_by_other,
            "diverged": self._diverged,
            "interrupted": self._interrupted,
        }.get(self.name, self._trained_on)()

    def _stopped_early(self) -> str:
        stopped = f"Stopped early at step {self.last_step} of {self.total_steps}."
        if self.last_step == self.total_steps:
            stopped = f"Trained to its budget of {self.total_steps} steps."
        if self.keeps_last:
            return (
                f"{stopped} The last weights are those of the turning point, {self._turning_point()}.{self._compared()}"
            )
        weights = f"The {'averaged ' if self.averages else ''}weights of the turning point, {self._turning_point()}"
        return f"{stopped} {weights}, are kept.{self._compared()}"

    def _stopped_by_other(self) -> str:
        stopped = f"Stopped at step {self.last_step} of {self.total_steps} by {self.stopped_by}."
        return f"{stopped} {self._found()}"

    def _trained_on(self) -> str:
        trained = f"Trained to its budget of {self.total_steps} steps."
        if self.last_step < self.total_steps:
            trained = f"Trained to the end of the data, step {self.last_step} of {self.total_steps}."
        return f"{trained} {self._found()}".rstrip()

    def _found(self) -> str:
        if self.plan is None:
            return ""
        if self.decision is None:
            others = self.held_step not in (None, self.last_step)  # load_best_model_at_end
            kept = "average of the weights is" if self.keeps_average_of_all else "last weights are"
            found = "No evidence of overfitting yet" + ("." if others else f": the {kept} kept.")
            return f"{found}{self._compared()}"
        found = f"The turning point was {self._turning_point()}, found at step {self.decision.detected_step}."
        return f"{found}{self._compared()}"

    def _diverged(self) -> str:
        step = self.files["kept"].step if "kept" in self.files else self.held_step
        told = "No finite weights are known, so none are kept."
        if step == self.last_step:
            told = "The weights of that moment are finite and kept."
        elif step is not None:
            told = f"The weights of step {step}, the last finite ones known, are kept."
        advice = "Lower the learning rate and start again."
        return f"Training diverged at step {self.last_step}: {self.diverged}. {told} {advice}"

    def _interrupted(self) -> str:
        return f"Interrupted at step {self.last_step} of {self.total_steps}; everything needed to go on is saved."

    def _turning_point(self) -> str:
        if self.decision is None or self.plan is None:
            return "unknown"
        step = self.decision.keep_step
        return f"step {step} (epoch {step / self.plan.steps_per_epoch:.1f})"

    def _compared(self) -> str:
        """The held-out losses of the kept and of the last weights, as far as known; else empty."""
        kept, last = self.heldout.get("kept" if self.decision else "average"), self.heldout.get("last")
        if kept is None:
            return ""
        if self.keeps_last or last is None:
            return f" Held-out loss: {kept:.4f} there."
        change = 100 * (last / kept - 1)
        direction = "higher" if change > 0 else "lower"
        return f" Held-out loss: {kept:.4f} there, {last:.4f} at the last step ({abs(change):.1f}% {direction})."

    # --------------------------------------------------------------------------------- for machines

    def facts(self, what: str) -> Dict[str, Any]:
        """What the saved weights say of themselves in their metadata: step and verdict."""
        weights = self.files[what]
        known = {"outcome": self.name, "step": weights.step, "averaged": weights.averaged, "last_step": self.last_step}
        return {**known, **self._decided()}

    def metadata(self, what: str) -> Dict[str, str]:
        """The same for a file whose metadata holds text alone: {"es_lora_step": "12", ...}."""
        known = {name: value for name, value in self.facts(what).items() if value is not None}
        return {f"es_lora_{name}": str(value) for name, value in known.items()}

    def _decided(self) -> Dict[str, Any]:
        if self.plan is None:
            return {}
        found = self.decision
        return {
            "rule": self.plan.stop.stop_rule,
            "keep_step": found.keep_step if found else None,
            "detected_step": found.detected_step if found else None,
            "usable_steps": list(found.usable) if found else None,
            "reason": found.reason if found else None,
        }

    def as_result(self, settings: Dict[str, Any], packages: Sequence[str]) -> Dict[str, Any]:
        """The content of result.json. settings: plain values. packages: to note the versions of."""
        nothing = dict.fromkeys(("rule", "keep_step", "detected_step", "usable_steps", "reason"))
        plan = self.plan
        return {
            "format": RESULT_FORMAT,
            "outcome": self.name,
            "exit_code": self.exit_code,
            "verdict": self.sentence(),
            **nothing,
            **self._decided(),
            "window": plan.window if plan else None,
            "cs_interval": plan.cs_interval if plan else None,
            "average": plan.average if plan else None,
            "last_step": self.last_step,
            "total_steps": self.total_steps,
            "files": {what: vars(weights) for what, weights in self.files.items()},
            "held_step": self.held_step,
            "heldout": self.heldout,
            "parts": self.parts,
            "shadows": self.shadows,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
            "seed": self.seed,
            **self.extra,
            "settings": without_secret_flags(settings),
            "versions": installed_versions(packages),
        }

    def write(self, folder: Path, settings: Dict[str, Any], packages: Sequence[str]) -> Dict[str, Any]:
        """Write result.json into the output folder, whole or not at all; gives its content."""
        result = self.as_result(settings, packages)
        write_text_whole(Path(folder) / RESULT_NAME, json.dumps(_finite(result), indent=1, ensure_ascii=False) + "\n")
        return result

    # ------------------------------------------------------------------------------- for the person

    def tables(self) -> List[Tuple[str, List[str], List[List[Any]]]]:
        """(title, head, rows) of the report: held-out losses, each part by itself, files."""
        losses = [(WEIGHTS[key], value) for key, value in self.heldout.items() if value is not None]
        parts = [
            [PART_NAMES.get(part, part), v["turning_step"] or "none", v["stop_step"] or "", v["reason"]]
            for part, v in self.parts.items()
        ]
        files = [
            [what.replace("_", " "), weights.path, weights.step or "", "averaged" if weights.averaged else ""]
            for what, weights in self.files.items()
        ]
        rows = [[name, f"{loss:.4f}", f"{math.exp(min(loss, 50)):.2f}"] for name, loss in losses]
        return [
            table
            for table in (
                ("Held-out loss", ["weights", "loss", "its exponential"], rows),
                ("Each part by itself", ["part", "turning point (step)", "detected at step", "verdict"], parts),
                ("Files", ["what", "file", "step", ""], files),
            )
            if table[2]
        ]

    def last_lines(self, folder: Path, more: Sequence[str], commands: Dict[str, str]) -> List[str]:
        """The last lines on the screen: verdict, reason, files, and what to type next.
        more: further sentences. commands: {what for: the exact command}."""
        lines = ["", self.sentence()]
        if self.decision is not None:
            lines.append(f"Why: {self.decision.reason}")
        for part, verdict in self.parts.items() if len(self.parts) > 1 else ():
            told = f"turning point {verdict['turning_step']}" if verdict["stopped"] else "none yet"
            lines.append(f"  {PART_NAMES.get(part, part)} alone: {told}")
        lines += [sentence for sentence in more if sentence]
        if self.shadows:
            lines.append(self.shadows["sentence"])
        places = {what.replace("_", " "): weights.path for what, weights in self.files.items()}
        places.update({"result": RESULT_NAME, "report": REPORT_NAME})
        for what, name in places.items():
            if (Path(folder) / name).exists():
                lines.append(f"{what + ':':15} {shown_path(Path(folder) / name)}")
        return lines + [f"{what + ':':15} {command}" for what, command in commands.items()]


def in_order(heldout: Dict[str, Optional[float]]) -> Dict[str, Optional[float]]:
    """Held-out losses in the order of time, None if not known; an average where there is one."""
    return {name: heldout.get(name) for name in WEIGHTS if name != "average" or name in heldout}


def installed_versions(packages: Sequence[str]) -> Dict[str, str]:
    """{"python" and each package that is installed: version}."""
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
