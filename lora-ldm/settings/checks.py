"""What is wrong with a set of settings, all at once, and what follows from those given."""

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from es_lora.command_line import without_secret_flags
from es_lora.settings import StopSettings
from es_lora.shadows import rate_is_adams
from settings.bounds import out_of_bounds
from settings.entry_point import missing_package
from settings.key_values import key_values
from settings.network_args import parse_network_args
from settings.output_folder import output_problems

HUB = "the trainer does not talk to a hub; upload the finished file with `hf upload`"
DEEPSPEED = "a LoRA and its optimizer state fit on one device without DeepSpeed"
FP8 = "the base is held in 16 or 32 bits; use --mixed_precision bf16 or fp16"
DDP = "gradients are averaged once a step, without DistributedDataParallel; there is nothing to tune"
COMPILE = "compiled models hide the layers whose similarity is measured"

# {flag: (takes a value, why it is refused)}
REJECTED = {
    **dict.fromkeys("huggingface_repo_id huggingface_repo_type huggingface_path_in_repo".split(), (True, HUB)),
    **dict.fromkeys("huggingface_token huggingface_repo_visibility".split(), (True, HUB)),
    **dict.fromkeys("save_state_to_huggingface resume_from_huggingface async_upload".split(), (False, HUB)),
    "deepspeed": (False, DEEPSPEED),
    **dict.fromkeys("zero_stage offload_optimizer_device offload_optimizer_nvme_path".split(), (True, DEEPSPEED)),
    **dict.fromkeys("offload_param_device offload_param_nvme_path".split(), (True, DEEPSPEED)),
    **dict.fromkeys("zero3_init_flag zero3_save_16bit_model".split(), (False, DEEPSPEED)),
    "fp16_master_weights_and_gradients": (False, DEEPSPEED),
    "fp8_base": (False, FP8),
    "fp8_base_unet": (False, FP8),
    "torch_compile": (False, COMPILE),
    "dynamo_backend": (True, COMPILE),
    "ddp_gradient_as_bucket_view": (False, DDP),
    "ddp_static_graph": (False, DDP),
    "fused_backward_pass": (False, "it is meant for full fine-tuning; a LoRA's gradients are small"),
    "cpu_offload_checkpointing": (False, "use --gradient_checkpointing, which keeps activations out of memory"),
    "lowram": (False, "the base model is loaded once, in the precision of training, whatever the memory"),
    "dataset_class": (True, "foreign dataset classes cannot be resumed bit for bit; use --dataset_config"),
    "disable_mmap_load_safetensors": (False, "files are read through a memory map; copy the base to a fast disk"),
    "cache_info": (False, "image sizes are read fast enough without a cache"),
    "skip_cache_check": (False, "every cached latent is checked against its image, its VAE and the resolution"),
}
REJECTED_CHOICES = {"save_model_as": {"diffusers": "a LoRA is one file", "diffusers_safetensors": "a LoRA is one file"}}

POSITIVE = """
    train_batch_size gradient_accumulation_steps max_train_steps max_train_epochs vae_batch_size network_dim
    clip_skip save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs save_last_n_steps
    sample_every_n_steps sample_every_n_epochs dataset_repeats multires_noise_iterations
    validate_every_n_steps validate_every_n_epochs max_validation_steps bucket_reso_steps min_bucket_reso
    max_bucket_reso initial_epoch lr_scheduler_num_cycles network_alpha huber_c huber_scale
    min_snr_gamma scale_weight_norms num_class_images
""".split()
NOT_NEGATIVE = """
    learning_rate unet_lr max_grad_norm prior_loss_weight lr_warmup_steps lr_decay_steps
    max_data_loader_n_workers initial_step keep_tokens noise_offset ip_noise_gamma
    caption_dropout_every_n_epochs token_warmup_step
    caption_dropout_rate caption_tag_dropout_rate
""".split()
FRACTION = "network_dropout validation_split".split()
EXCLUDE = [
    ("network_train_unet_only", "network_train_text_encoder_only"),
    ("full_fp16", "full_bf16"),
    ("xformers", "sdpa"),
    ("xformers", "mem_eff_attn"),
    ("sdpa", "mem_eff_attn"),
    ("use_8bit_adam", "use_lion_optimizer"),
    ("resume", "initial_step"),
    ("resume", "initial_epoch"),
    ("initial_step", "initial_epoch"),
    ("cache_latents", "color_aug"),
    ("cache_latents", "random_crop"),
    ("cache_latents_to_disk", "color_aug"),
    ("cache_latents_to_disk", "random_crop"),
    ("scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"),
    ("num_class_images", "dataset_config"),
]
NEED = [
    ("adaptive_noise_scale", "noise_offset"),
    ("noise_offset_random_strength", "noise_offset"),
    ("ip_noise_gamma_random_strength", "ip_noise_gamma"),
    ("scale_v_pred_loss_like_noise_pred", "v_parameterization"),
    ("dim_from_weights", "network_weights"),
    ("in_json", "train_data_dir"),
    ("base_weights_multiplier", "base_weights"),
    ("skip_until_initial_step", "initial_step"),
    ("num_class_images", "class_prompt"),
    ("num_class_images", "reg_data_dir"),
    ("class_prompt", "num_class_images"),
]
# What --train_full_unet has no use for: there is no LoRA.
LORA_ONLY = """
    network_dim network_module network_args network_dropout network_weights dim_from_weights
    network_train_text_encoder_only scale_weight_norms
""".split()
FILES = "network_weights in_json dataset_config sample_prompts log_tracker_config".split()
FOLDERS = "train_data_dir reg_data_dir conditioning_data_dir resume".split()


def collect_problems(args: Namespace, stop: StopSettings, parser: ArgumentParser) -> list[str]:
    """Every problem of the settings as a line, beyond those of `stop`; empty without any.
    Where a number is out of all bounds only that is said."""
    args = Namespace(**{**vars(args), "stop": stop})
    bounds = out_of_bounds(args, parser)
    if bounds:
        return _refused(args, parser) + list(bounds.values())
    checks = _missing, _ranges, _contradictions, _components, _rates, _network, _shadows, _full_unet, _sdxl, _paths
    return _refused(args, parser) + [line for check in checks for line in check(args)]


def _refused(args, parser):
    lines = [
        f"--{name} is not supported: {reason}"
        for name, (_, reason) in REJECTED.items()
        if getattr(args, name) not in (parser.get_default(name), "no")
    ]
    for name, choices in REJECTED_CHOICES.items():
        if getattr(args, name) in choices and not args.train_full_unet:
            lines.append(f"--{name} {getattr(args, name)} is not supported: {choices[getattr(args, name)]}")
    return lines


def _missing(args):
    lines = []
    if not args.pretrained_model_name_or_path:
        lines.append("--pretrained_model_name_or_path is missing: a diffusers folder, a checkpoint file or a hub name")
    if not args.output_dir and not args.debug_dataset:
        lines.append("--output_dir is missing: the folder for the LoRA and the report")
    if not (args.train_data_dir or args.dataset_config):
        lines.append("no images: give --train_data_dir (with <repeats>_<name> folders inside) or --dataset_config")
    if not (args.resolution or args.dataset_config):
        lines.append("--resolution is missing: the training size in pixels, for instance 512,512")
    return lines


def _ranges(args):
    lines = []
    for name in POSITIVE + NOT_NEGATIVE + FRACTION:
        value = getattr(args, name)
        if value is None:
            continue
        if name in POSITIVE and value <= 0:
            lines.append(f"--{name} {value} is not allowed: it must be above 0")
        elif not (value >= 0 and value < float("inf")):
            lines.append(f"--{name} {value} is not allowed: it must be a finite number of at least 0")
        elif name in FRACTION and value >= 1:
            lines.append(f"--{name} {value} is not allowed: it is a fraction, at least 0 and below 1")
        elif name.endswith("dropout_rate") and value > 1:
            lines.append(f"--{name} {value} is not allowed: it is a fraction, at least 0 and at most 1")
    for name in ("optimizer_args", "lr_scheduler_args"):
        try:
            key_values(getattr(args, name))
        except ValueError as error:
            lines.append(f"--{name} {error}")
    for value in args.text_encoder_lr or []:
        if not 0 <= value < float("inf"):
            lines.append(f"--text_encoder_lr {value} is not allowed: it must be a finite number of at least 0")
    encoders = 2 if args.sdxl else 1
    if args.text_encoder_lr and len(args.text_encoder_lr) > encoders:
        lines.append(
            f"--text_encoder_lr has {len(args.text_encoder_lr)} values: these models have {encoders} text encoder(s)"
        )
    low, high = args.min_timestep or 0, 1000 if args.max_timestep is None else args.max_timestep
    if not 0 <= low < high <= 1000:
        lines.append(f"--min_timestep {low} --max_timestep {high}: they must satisfy 0 <= min < max <= 1000")
    return lines


def _contradictions(args):
    lines = [
        f"--{one} and --{other} cannot be used together"
        for one, other in EXCLUDE
        if _given(args, one) and _given(args, other)
    ]
    lines += [f"--{one} needs --{other}" for one, other in NEED if _given(args, one) and not _given(args, other)]
    for precision in ("fp16", "bf16"):
        if getattr(args, f"full_{precision}") and args.mixed_precision != precision:
            lines.append(f"--full_{precision} needs --mixed_precision {precision}, not '{args.mixed_precision}'")
    if args.v_pred_like_loss is not None and args.v_parameterization:
        lines.append("--v_pred_like_loss is for bases that predict noise; drop it or --v_parameterization")
    if args.masked_loss and not (args.alpha_mask or args.conditioning_data_dir or args.dataset_config):
        lines.append("--masked_loss needs masks: add --alpha_mask or --conditioning_data_dir")
    if args.base_weights_multiplier and len(args.base_weights_multiplier) != len(args.base_weights or []):
        lines.append(
            f"--base_weights_multiplier has {len(args.base_weights_multiplier)} values for "
            f"{len(args.base_weights or [])} --base_weights: give one for each"
        )
    if args.optimizer_type and (args.use_8bit_adam or args.use_lion_optimizer):
        lines.append("--optimizer_type and --use_8bit_adam / --use_lion_optimizer both name an optimizer; keep one")
    if args.clip_skip and args.clip_skip > 12:
        lines.append(f"--clip_skip {args.clip_skip} is not allowed: the text encoder has 12 layers; 1 or 2 is usual")
    return lines


def _components(args):
    component = args.stop.cs_component or ""
    if component == "unet" and args.network_train_text_encoder_only:
        return ["--cs_component unet: the U-Net is not trained with --network_train_text_encoder_only"]
    if component.startswith("te") and args.network_train_unet_only:
        return [f"--cs_component {component}: the text encoder is not trained with --network_train_unet_only"]
    return []


def _network(args):
    if args.network_module not in (None, "networks.lora"):
        return []
    try:
        parse_network_args(args.network_args, args.sdxl)
    except ValueError as error:
        return [str(error)]
    return []


def _shadows(args):
    if not args.stop.shadow_count:
        return []
    lines = []
    if not args.stop.calculate_cs:
        lines.append("--shadows are scored when CS is measured: add --early_stop or --calculate_cs")
    if not rate_is_adams(optimizer_name(args)):
        lines.append(
            f"--shadows are trained by AdamW at the main learning rate, and the rate of {optimizer_name(args)} "
            "means something else: use AdamW or AdamW8bit"
        )
    if args.mixed_precision == "fp16":
        lines.append("--shadows have no loss scaling for --mixed_precision fp16: use bf16")
    if args.network_module not in (None, "networks.lora"):
        lines.append(f"--shadows need --network_module networks.lora, not {args.network_module}")
    return lines


def _rates(args):
    """Rates of 0 for all that is to be trained."""
    unet = not args.network_train_text_encoder_only and _rate(args, args.unet_lr)
    text = not (args.network_train_unet_only or args.train_full_unet)
    if unet or (text and any(_rate(args, rate) for rate in args.text_encoder_lr or [None])):
        return []
    return ["nothing to train: the learning rates of all that is to be trained are 0; raise --learning_rate"]


def _rate(args, own):
    return args.learning_rate if own is None else own


def _full_unet(args):
    if not args.train_full_unet:
        return []
    lines = [f"--train_full_unet trains no LoRA: leave --{name} out" for name in LORA_ONLY if _given(args, name)]
    stop = {
        "early_stop": args.stop.early_stop,
        "calculate_cs": args.stop.calculate_cs,
        "shadows": args.stop.shadow_count,
    }
    for name in (name for name, value in stop.items() if value):
        lines.append(f"--train_full_unet trains no LoRA, so that there is no similarity to stop by: leave --{name} out")
    if args.save_model_as not in (None, "diffusers_safetensors") or args.use_safetensors:
        lines += ["--train_full_unet saves a diffusers folder: leave --save_model_as out or give diffusers_safetensors"]
    return lines


def _sdxl(args):
    if not args.sdxl:
        return []
    lines = ["--v2: the base is SDXL; leave it out"] if args.v2 else []
    if args.clip_skip is not None:
        lines.append("--clip_skip: SDXL always takes the penultimate layer of its text encoders; leave it out")
    caches = args.cache_text_encoder_outputs or args.cache_text_encoder_outputs_to_disk
    if caches and not (args.network_train_unet_only or args.train_full_unet):
        lines += ["--cache_text_encoder_outputs needs --network_train_unet_only: what is encoded once is not trained"]
    return lines


def _paths(args):
    lines = [
        f"--{name} {getattr(args, name)}: there is no such file"
        for name in FILES
        if getattr(args, name) and not _is_file(getattr(args, name))
    ]
    lines += [f"--base_weights {path}: there is no such file" for path in args.base_weights or [] if not _is_file(path)]
    lines += [
        f"--{name} {getattr(args, name)}: there is no such folder"
        for name in FOLDERS
        if getattr(args, name)
        and not Path(getattr(args, name)).is_dir()
        and not (name == "reg_data_dir" and args.num_class_images)  # it is made then
    ]
    if not args.debug_dataset:
        lines += output_problems(args)
    if args.log_with in ("wandb", "tensorboard") and find_spec(args.log_with) is None:
        lines.append(f"--log_with {args.log_with}: {missing_package(args.log_with)}")
    base = args.pretrained_model_name_or_path
    if (
        base
        and (base.endswith((".safetensors", ".ckpt", ".pt")) or base.startswith((".", "/")))
        and not Path(base).exists()
    ):
        lines.append(f"--pretrained_model_name_or_path {base}: there is no such file or folder")
    return lines


def _is_file(path):
    """Whether a path is a file, or a folder that PEFT saved an adapter to."""
    return Path(path).is_file() or (Path(path) / "adapter_model.safetensors").is_file()


def _given(args, name):
    value = getattr(args, name)
    return value is not None and value is not False


def complete(args: Namespace, stop: StopSettings) -> Namespace:
    """Fill in what follows from other flags; -> the namespace, `stop` in place of its flags."""
    for name in (*stop.as_flags(), "valley"):
        delattr(args, name)
    args.stop = replace(stop, shadows=stop.shadow_count)
    if args.caption_extention is not None:
        args.caption_extension = args.caption_extention
    args.cache_latents = args.cache_latents or args.cache_latents_to_disk
    if args.train_full_unet:
        args.save_model_as = "diffusers_safetensors"
    args.save_model_as = "safetensors" if args.use_safetensors else args.save_model_as or "safetensors"
    args.output_name = "last" if args.output_name is None else args.output_name
    args.network_dim = args.network_dim or 4
    args.network_module = args.network_module or "networks.lora"
    args.log_with = args.log_with or ("tensorboard" if args.logging_dir else None)
    rates = args.text_encoder_lr or [None]
    args.text_encoder_lr = rates if len(rates) > 1 else rates[0]
    if args.sdxl:
        args.cache_text_encoder_outputs = args.cache_text_encoder_outputs or args.cache_text_encoder_outputs_to_disk
    args.metadata_trigger_phrase = args.metadata_trigger_phrase or args.trigger_word
    args.optimizer_type = optimizer_name(args)
    return args


def plain_settings(args: Namespace) -> dict[str, Any]:
    """Every setting as a plain value, for logs and results; without keys and tokens."""
    values = {**vars(args), **args.stop.as_flags()}
    values = without_secret_flags({name: value for name, value in values.items() if name != "stop"})
    return {name: v if isinstance(v, (int, float, str, list)) or v is None else str(v) for name, v in values.items()}


def optimizer_name(args: Namespace) -> str:
    """--optimizer_type, or what kohya's earlier flags say."""
    return args.optimizer_type or (
        "AdamW8bit" if args.use_8bit_adam else "Lion" if args.use_lion_optimizer else "AdamW"
    )
