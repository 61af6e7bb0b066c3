"""The base model made ready for training: folded LoRAs, devices, precision, attention, and cached latents."""

import torch
from lora_file import load_lora
from sd_model import set_attention
from training_setup import choose_attention, weights_key


def fold_base_weights(args, model):
    """Fold the LoRA files of --base_weights into the model, each by its multiplier."""
    if not args.base_weights:
        return
    from merge_lora import fold_lora

    multipliers = args.base_weights_multiplier or [1.0] * len(args.base_weights)
    for path, multiplier in zip(args.base_weights, multipliers):
        fold_lora(model, load_lora(path)[0], multiplier)


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
