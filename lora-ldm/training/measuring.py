"""Early stopping in this trainer: the monitor made from the command line, and the verdict of each trained part."""

from es_lora.gradient_evidence import GradientEvidence
from es_lora.history import read_history, redecide
from es_lora.monitor import EarlyStopMonitor
from es_lora.settings import StopSettings, read_stop_settings
from training.validation import validation_loss

USUAL = StopSettings(calculate_cs=False, cs_reduction="matrix")
PROBE_BATCHES = 2  # micro-batches whose loss the column probe_loss follows


def plan(args, components, steps_per_epoch, total_steps):
    """The MeasurementPlan of the command line. components: the trained parts, "unet" and/or "te"."""
    return read_stop_settings(vars(args), USUAL).plan(components, steps_per_epoch, total_steps)


def columns_of_rule(trainer, rule):
    """{column: function} of what the rule needs beyond the usual measurements. Raises ValueError without held-out pictures."""
    columns = {}
    if "heldout_loss" in rule.needs:
        if trainer.validation_batches is None:
            raise ValueError(
                f"--stop_rule {rule.name} decides on held-out pictures: add --validation_split, or choose a rule that needs none"
            )
        columns["heldout_loss"] = lambda: validation_loss(trainer)
    if "probe_loss" in rule.needs:
        probe = [trainer.batches[index] for index in range(min(PROBE_BATCHES, len(trainer.batches)))]
        columns["probe_loss"] = lambda: validation_loss(trainer, probe)
    return columns


def make_monitor(args, plan, network, header, batches_per_epoch, columns):
    """The EarlyStopMonitor over the network's live layers, its history in --output_dir.

    batches_per_epoch: backward passes of this process in an epoch. columns: {name: function} of further columns.
    """
    return EarlyStopMonitor(
        args.output_dir,
        plan,
        network.layers(),
        network.tensors,
        header=header,
        resume_from=args.resume,
        evidence=GradientEvidence(network.tensors().values(), batches_per_epoch),
        columns=columns,
    )


def verdict_of_each_part(monitor):
    """{component: the rule's verdict on its own CS}, as cs_replay gives it: stopped, turning_step, stop_step, reason."""
    if not monitor.measurements:
        return {}
    history = read_history(monitor.history_path)
    parts = [name for name in history.records[-1]["cs"] if name != "all"]
    return {part: redecide(history, "recorded", component=part) for part in parts}
