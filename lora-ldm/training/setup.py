"""What a run needs before its first step: the accelerator, the trackers, the model in its place."""

import datetime
import os
import time

import toml
import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from base.attention import choose_attention, set_attention
from base.files import weights_key

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(args):
    """The accelerate.Accelerator of the run. Raises ValueError for a precision that the device does not have."""
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--mixed_precision fp16 needs a GPU; use no or bf16 on a CPU")
    handlers = [InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=args.ddp_timeout))] if args.ddp_timeout else []
    trackers = {"all": ["tensorboard", "wandb"], None: None}.get(args.log_with, [args.log_with])
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    accelerator = Accelerator(
        cpu=on_cpu,  # said outright, several processes on a CPU find each other
        mixed_precision=args.mixed_precision,
        log_with=trackers,
        project_dir=_logging_folder(args) if trackers else None,
        kwargs_handlers=handlers,
    )
    if args.full_fp16:
        _allow_fp16_gradients(accelerator)
    return accelerator


def _logging_folder(args):
    """kohya's layout: a folder a run, named by its time, inside --logging_dir."""
    stamp = time.strftime("%Y%m%d%H%M%S", time.localtime())
    return os.path.join(args.logging_dir or os.path.join(args.output_dir, "logs"), f"{args.log_prefix or ''}{stamp}")


def _allow_fp16_gradients(accelerator):
    """torch's scaler refuses gradients in fp16 unless told that this is meant (--full_fp16)."""
    unscale = accelerator.scaler._unscale_grads_
    accelerator.scaler._unscale_grads_ = lambda *words: unscale(*words[:3], True)


def start_trackers(accelerator, args):
    """Open TensorBoard and wandb where they were asked for."""
    if not accelerator.log_with:
        return
    init = toml.load(args.log_tracker_config) if args.log_tracker_config else {}
    if args.log_with in ("wandb", "all"):
        import wandb

        if args.wandb_api_key:
            wandb.login(key=args.wandb_api_key)
        if args.wandb_run_name:
            init.setdefault("wandb", {})["name"] = args.wandb_run_name
    secret = ("wandb_api_key", "huggingface_token")
    plain = {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in vars(args).items()}
    config = {key: value for key, value in plain.items() if key not in secret} if args.log_config else None
    accelerator.init_trackers(args.log_tracker_name or "network_train", config=config, init_kwargs=init)


def place_model(trainer):
    """Put model and network on the device in their precisions, with the attention and checkpointing asked for."""
    args, model, device = trainer.args, trainer.model, trainer.accelerator.device
    set_attention(model.unet, choose_attention(args, device))
    model.unet.to(device)
    for encoder in model.text_encoders:
        encoder.to(device)
        if args.gradient_checkpointing and trainer.trains_text:
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            encoder.train()  # transformers checkpoints in training mode only
    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    whole_vae = args.no_half_vae or args.train_full_unet  # the latter saves it beside the U-Net
    model.vae.to(device, torch.float32 if whole_vae else trainer.weight_dtype)
    trainer.network.to(device, trainer.weight_dtype if args.full_fp16 or args.full_bf16 else torch.float32)


def cache_latents(trainer):
    """Encode every picture once, training and validation; the VAE leaves the device afterwards (not with --highvram)."""
    args, accelerator = trainer.args, trainer.accelerator

    def encode(pixels):
        return trainer.encode_images(pixels, torch.Generator().manual_seed(trainer.seed)).cpu()

    key = weights_key(trainer.model.vae)
    settings = {"to_disk": args.cache_latents_to_disk, "batch_size": args.vae_batch_size}
    for batches in filter(None, (trainer.batches, trainer.validation_batches)):
        if args.cache_latents_to_disk and not trainer.is_main:
            accelerator.wait_for_everyone()  # the first process writes the files
        batches.cache_latents(encode, key, **settings, write=trainer.is_main)
        if args.cache_latents_to_disk and trainer.is_main:
            accelerator.wait_for_everyone()
    if not args.highvram:
        trainer.model.vae.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
