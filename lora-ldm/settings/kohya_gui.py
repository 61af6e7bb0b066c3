"""Configurations of kohya_ss's GUI: its own words, and how it writes that a setting is off.

Source: the keys that its LoRA tab writes into the TOML file of each run, as of 2025."""

import logging
from importlib.util import find_spec
from typing import Any

import torch

logger = logging.getLogger(__name__)
# Flags that must be above 0 on the command line; the GUI writes 0 where they are not wanted.
OFF_AT_ZERO = """
    save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs save_last_n_steps
    save_last_n_epochs_state save_last_n_steps_state sample_every_n_steps sample_every_n_epochs
    validate_every_n_steps validate_every_n_epochs max_validation_steps clip_skip vae_batch_size max_timestep
    min_snr_gamma scale_weight_norms multires_noise_iterations noise_offset adaptive_noise_scale ip_noise_gamma
    v_pred_like_loss max_token_length lr_scheduler_num_cycles num_class_images initial_epoch initial_step network_alpha
    seed network_dropout huber_c huber_scale gradient_accumulation_steps
""".split()
LENGTHS = ("max_train_epochs", "max_train_steps", "epoch")
# {key: what is said where it is set}; None: other keys say all that it says.
WITHOUT_FLAG = {
    "noise_offset_type": None,
    "stop_text_encoder_training": "the text encoder is trained to the end; --network_train_unet_only leaves it out",
    "lowvram": "no trainer has this setting; --gradient_checkpointing saves memory",
}
OTHER_FAMILIES = """
    ae apply_t5_attn_mask attn_mode blocks_to_swap byt5 clip_g clip_g_dropout_rate clip_l clip_l_dropout_rate compile
    compile_backend compile_cache_size_limit compile_dynamic compile_fullgraph compile_mode discrete_flow_shift
    double_blocks_to_swap enable_scaled_pos_embed fp8_scaled fp8_vl gemma2 gemma2_max_token_length guidance_scale
    llm_adapter_path logit_mean logit_std mem_eff_save mode_scale model_prediction_type model_type
    pos_emb_random_crop_rate qwen3 qwen3_max_token_length qwen_image_vae_2d save_clip save_t5xxl show_timesteps
    show_timesteps_resolution sigmoid_scale single_blocks_to_swap split_attn split_mode system_prompt t5_dropout_rate
    t5_max_token_length t5_tokenizer_path t5xxl t5xxl_device t5xxl_dtype t5xxl_max_token_length
    text_encoder text_encoder_batch_size text_encoder_cpu timestep_sampling unsloth_offload_checkpointing
    train_blocks sd3_text_encoder_batch_size sd3_t5_dropout_rate sd3_fused_backward_pass flux_fused_backward_pass
    use_flash_attn use_sage_attn vae_chunk_size vae_disable_cache weighting_scheme
""".split()
REFUSED = {
    **dict.fromkeys(OTHER_FAMILIES, "it belongs to another kind of base; here are SD 1.x, 2.x and SDXL"),
    "train_inpainting": "inpainting bases have further channels, which are not trained here",
}
SDXL_ONLY = dict.fromkeys(
    ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"), "it is a setting of es_lora_sdxl.py"
)
ATTENTION = ("xformers", "sdpa", "mem_eff_attn")  # the GUI writes true, and in its own files the name


def own_words(
    values: dict[str, Any], known: set[str], problems: list[str], *, sdxl: bool = False, has_length: bool = False
) -> dict[str, Any]:
    """The values of a file by the names of the command line, without those that are off.

    known: the flags. has_length: the command line says how long to train.
    problems: gets a line for each key of another kind of base."""
    lengths = {key: values[key] for key in LENGTHS if values.get(key)}
    refused = REFUSED if sdxl else {**REFUSED, **SDXL_ONLY}
    result = {}
    for key, value in with_attention(values).items():
        if key in refused and value:
            problems.append(f"{key} is not supported: {refused[key]}")
        elif WITHOUT_FLAG.get(key) and value:
            logger.warning("%s is not used: %s", key, WITHOUT_FLAG[key])
        elif key in known and not _is_off(key, value, bool(lengths) or has_length):
            result[key] = value
        elif key not in known and key not in (*refused, *WITHOUT_FLAG, "epoch"):
            result[key] = value  # unknown, which the caller says
    if "epoch" in lengths and len(lengths) == 1 and not has_length:
        result["max_train_epochs"] = lengths["epoch"]
    rates = result.get("text_encoder_lr")
    if isinstance(rates, list) and len(set(rates)) == 1:  # written once for each of two encoders
        result["text_encoder_lr"] = rates[0]
    if sdxl and result.get("clip_skip") == 1:  # the GUI's default, which SDXL has no use for
        del result["clip_skip"]
    return result


def with_attention(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the attention that they name; sdpa for xformers where that cannot be used."""
    named = {key: value for key, value in values.items() if key in ATTENTION and value in (*ATTENTION, "none")}
    values = {key: value for key, value in values.items() if key not in named}
    values |= {name: True for name in named.values() if name != "none"}
    if values.get("xformers") is True and not xformers_works():
        logger.warning("xformers cannot be used here; sdpa computes the same attention and is used instead")
        values = {**values, "xformers": False, "sdpa": True}
    return values


def xformers_works() -> bool:
    """Whether the package xformers is there, and a GPU, which its attention needs."""
    return find_spec("xformers") is not None and torch.cuda.is_available()


def _is_off(key, value, has_length):
    if value in ("", []) or value is None:
        return True
    is_zero = value == 0 and not isinstance(value, bool)
    return is_zero and (key in OFF_AT_ZERO or (key in LENGTHS and has_length))
