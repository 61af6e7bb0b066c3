"""What goes to TensorBoard and wandb, under the published names."""

LEARNING_RATE_NAMES = {"unet": "unet", "te": "textencoder", "te1": "textencoder 1", "te2": "textencoder 2"}


def log_measurement(accelerator, monitor):
    """unet_cs/step, te_cs/step, total_cs/step and fluctuation/step of the newest measurement."""
    if not accelerator.trackers:
        return
    record = next(line for line in reversed(monitor.state_dict()["lines"]) if "event" not in line)
    values = {f"{part}_cs/step": value for part, value in record["cs"].items() if part != "all"}
    values["total_cs/step"] = record["cs"]["all"]
    if record["fluctuation"] is not None:
        values["fluctuation/step"] = record["fluctuation"]
    accelerator.log(values, step=record["step"])


def log_step(trainer, loss):
    """The loss, the learning rate of each part and, with --scale_weight_norms, the norms."""
    if not trainer.accelerator.trackers:
        return
    values = {"loss/current": loss, "loss/average": trainer.progress.epoch_mean_loss}
    for group, rate in zip(trainer.raw_optimizer.param_groups, trainer.scheduler.get_last_lr()):
        name = LEARNING_RATE_NAMES.get(group.get("name"), group.get("name"))
        values[f"lr/{name}"] = float(rate)
        if "d" in group:  # Prodigy and D-Adaptation: the rate they have found
            values[f"lr/d*lr/{name}"] = float(group["d"] * rate)
    if trainer.args.scale_weight_norms:
        scaled, mean, largest = trainer.norm_facts
        values["max_norm/keys_scaled"] = scaled
        values["max_norm/average_key_norm"] = mean
        values["max_norm/max_key_norm"] = largest
    trainer.accelerator.log(values, step=trainer.progress.step)
