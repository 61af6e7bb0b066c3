"""What a LoRA file says of its training: kohya's ``ss_*`` and the SAI spec's ``modelspec.*``."""

import datetime
import json
import time
from dataclasses import dataclass
from typing import Any, Optional

# The keys that --no_metadata leaves: what a program needs to use the file.
MINIMUM_KEYS = "ss_v2 ss_base_model_version ss_network_module ss_network_dim ss_network_alpha ss_network_args".split()

# Flags that are written as they are, ss_ before the name.
PLAIN_FLAGS = """
    output_name learning_rate text_encoder_lr unet_lr gradient_checkpointing gradient_accumulation_steps lr_warmup_steps
    lr_scheduler network_module network_dim network_alpha network_dropout mixed_precision full_fp16 full_bf16 v2
    clip_skip max_token_length cache_latents seed lowram noise_offset multires_noise_iterations multires_noise_discount
    adaptive_noise_scale zero_terminal_snr training_comment max_grad_norm caption_dropout_rate
    caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range prior_loss_weight min_snr_gamma
    scale_weight_norms ip_noise_gamma noise_offset_random_strength ip_noise_gamma_random_strength loss_type
    huber_schedule huber_scale huber_c validation_seed validation_split max_validation_steps validate_every_n_epochs
    validate_every_n_steps
""".split()

# Flags that become modelspec keys, metadata_ before the name.
SPEC_FLAGS = """
    author description license tags usage_hint thumbnail merged_from trigger_phrase preprocessor is_negative_embedding
""".split()


def base_model_version(v2: bool, v_parameterization: bool, sdxl: bool = False) -> str:
    """kohya's short name of the base: sd_v1, sd_v2, sd_v2_v, sdxl_base_v1-0."""
    if sdxl:
        return "sdxl_base_v1-0"
    return ("sd_v2" if v2 else "sd_v1") + ("_v" if v_parameterization else "")


def build_metadata(
    settings: dict[str, Any],
    *,
    base: Optional[dict] = None,
    network_args: Optional[dict] = None,
    data: Optional[dict] = None,
    training: Optional[dict] = None,
) -> dict[str, str]:
    """All ``ss_*`` and ``modelspec.*`` keys that the run can tell, every value a text.

    settings: the flags, ``vars(args)``; flags that are absent are left out.
    base: ``SDModel.base_hashes``.
    network_args: the parsed --network_args, a dict.
    data: what ``ImageBatches.metadata()`` gives; values that are not texts are written as JSON.
    training: facts of the run by their final names without ``ss_`` (session_id,
    training_started_at, num_epochs, max_train_steps, optimizer, steps, epoch, ...). They win over
    flags."""
    metadata = {f"ss_{name}": settings[name] for name in PLAIN_FLAGS if name in settings}
    kind = (bool(settings.get(name)) for name in ("v2", "v_parameterization", "sdxl"))
    metadata["ss_base_model_version"] = base_model_version(*kind)
    metadata["ss_debiased_estimation"] = bool(settings.get("debiased_estimation_loss"))
    if network_args:
        metadata["ss_network_args"] = json.dumps(network_args)
    metadata |= base or {}
    for name, value in (data or {}).items():
        key = name if name.startswith("ss_") else f"ss_{name}"
        metadata[key] = value if isinstance(value, (str, int, float, bool, type(None))) else json.dumps(value)
    metadata |= {f"ss_{name}": value for name, value in (training or {}).items()}
    metadata |= model_spec(settings)
    return {name: str(value) for name, value in metadata.items()}


@dataclass(frozen=True)
class FileFacts:
    """What every file of a run says of its training; `of_step` adds whose weights it holds.
    The fields are the arguments of build_metadata. minimum: with --no_metadata."""

    settings: dict[str, Any]
    base: dict[str, str]
    network_args: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    steps_per_epoch: int
    minimum: bool = False

    def of_step(self, step: int) -> dict[str, str]:
        """The metadata of a file with the weights of this optimizer step."""
        own = {"steps": step, "epoch": step // self.steps_per_epoch, "training_finished_at": time.time()}
        metadata = build_metadata(
            self.settings,
            base=self.base,
            network_args=self.network_args,
            data=self.data,
            training={**self.training, **own},
        )
        return minimum_metadata(metadata) if self.minimum else metadata


def model_spec(settings: dict[str, Any]) -> dict[str, str]:
    """The ``modelspec.*`` keys of a LoRA. Source: the SAI model metadata standard 1.0.0."""
    sdxl, v2, v_parameterization = (bool(settings.get(name)) for name in ("sdxl", "v2", "v_parameterization"))
    resolution_px = 1024 if sdxl else 768 if v2 and v_parameterization else 512
    if sdxl:
        architecture = "stable-diffusion-xl-v1-base"
    elif v2:
        architecture = "stable-diffusion-v2-768-v" if v_parameterization else "stable-diffusion-v2-512"
    else:
        architecture = "stable-diffusion-v1"
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/lora",
        "implementation": "https://github.com/Stability-AI/generative-models" if sdxl else "diffusers",
        "title": settings.get("metadata_title") or settings.get("output_name") or "LoRA",
        "date": datetime.datetime.now().replace(microsecond=0).isoformat(),
        "resolution": _resolution_text(settings.get("resolution"), resolution_px),
        "prediction_type": "v" if v_parameterization else "epsilon",
    }
    for name in SPEC_FLAGS:
        if settings.get(f"metadata_{name}"):
            spec[name] = settings[f"metadata_{name}"]
    if settings.get("min_timestep") is not None or settings.get("max_timestep") is not None:
        first = 0 if settings.get("min_timestep") is None else settings["min_timestep"]
        last = 1000 if settings.get("max_timestep") is None else settings["max_timestep"]
        spec["timestep_range"] = f"{first},{last}"
    if settings.get("clip_skip") is not None:
        spec["encoder_layer"] = settings["clip_skip"]
    return {f"modelspec.{name}": str(value) for name, value in spec.items()}


def minimum_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """What remains with --no_metadata: how to use the file, nothing about the person's data."""
    return {name: value for name, value in metadata.items() if name in MINIMUM_KEYS or name.startswith("modelspec.")}


def _resolution_text(resolution, default_px):
    """ "512", "512,768" or (512, 768) -> "512x768"."""
    if resolution is None:
        return f"{default_px}x{default_px}"
    sides = resolution.split(",") if isinstance(resolution, str) else resolution
    sides = [int(side) for side in (sides if isinstance(sides, (list, tuple)) else [sides])]
    return f"{sides[0]}x{sides[-1]}"
