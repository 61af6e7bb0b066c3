"""What goes to TensorBoard and wandb, under the published names."""

from argparse import Namespace
from typing import Any, Optional

from accelerate import Accelerator

from es_lora.monitor import scalars
from settings.checks import plain_settings
from settings.toml_files import read_toml
from training.optimizers import Optimization

LEARNING_RATE_NAMES = {"unet": "unet", "te": "textencoder", "te1": "textencoder 1", "te2": "textencoder 2"}


def start_trackers(accelerator: Accelerator, args: Namespace) -> None:
    """Open TensorBoard and wandb where they were asked for."""
    if not accelerator.log_with:
        return
    init = read_toml(args.log_tracker_config, "--log_tracker_config") if args.log_tracker_config else {}
    if args.log_with in ("wandb", "all"):
        import wandb

        if args.wandb_api_key:
            wandb.login(key=args.wandb_api_key)
        if args.wandb_run_name:
            init.setdefault("wandb", {})["name"] = args.wandb_run_name
    config = None
    if args.log_config:
        settings = plain_settings(args).items()
        config = {name: v if isinstance(v, (int, float, str, bool)) else str(v) for name, v in settings}
    accelerator.init_trackers(args.log_tracker_name or "network_train", config=config, init_kwargs=init)


def log_measurement(accelerator: Accelerator, record: dict[str, Any]) -> None:
    """The similarities and the fluctuation of a history line."""
    if accelerator.trackers:
        accelerator.log(scalars(record), step=record["step"])


def log_step(
    accelerator: Accelerator,
    step: int,
    losses: tuple[float, float],
    optimization: Optimization,
    norms: Optional[tuple[int, float, float]] = None,
) -> None:
    """The losses (step, epoch's mean), each part's rate, what --scale_weight_norms scaled."""
    if not accelerator.trackers:
        return
    values = {"loss/current": losses[0], "loss/average": losses[1]}
    for group, rate in zip(optimization.raw.param_groups, optimization.scheduler.get_last_lr()):
        part, _, plus = group.get("name", "").partition(" ")  # "plus": the up matrices of LoRA+
        name = f"{LEARNING_RATE_NAMES.get(part, part)} {plus}".strip()
        values[f"lr/{name}"] = float(rate)
        if "d" in group:  # Prodigy and D-Adaptation: the rate they have found
            values[f"lr/d*lr/{name}"] = float(group["d"] * rate)
    if norms is not None:
        values.update(zip(("max_norm/keys_scaled", "max_norm/average_key_norm", "max_norm/max_key_norm"), norms))
    accelerator.log(values, step=step)
