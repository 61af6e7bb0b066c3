"""Every flag of the diffusion trainers with its type, default and choices, in groups.

Source of names and defaults: the public interface of sd-scripts' train_network.py (v0.7 to
v0.10.1), SD 1.x / 2.x, and of its sdxl_train_network.py."""

import argparse
import re
from pathlib import Path
from typing import NoReturn, Union

from es_lora.settings import StopSettings, add_stop_arguments
from settings.checks import REJECTED

USUAL = StopSettings(calculate_cs=False, cs_reduction="matrix")

SAMPLERS = """
    ddim pndm lms euler euler_a heun dpm_2 dpm_2_a dpmsolver dpmsolver++ dpmsingle
    k_lms k_euler k_euler_a k_dpm_2 k_dpm_2_a
""".split()
DYNAMO_BACKENDS = """
    no eager aot_eager inductor aot_ts_nvfuser nvprims_nvfuser cudagraphs ofi fx2trt onnxrt tensort ipex tvm
""".split()


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors: the entry point reports all in one way."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"(\S{80})\S{80,}", r"\1...", message))  # a number of thousands of digits, say


def int_or_float(text: str) -> Union[int, float]:
    """A whole number as int, else float (kohya: steps, or a share of all steps below 1)."""
    try:
        return int(text)
    except ValueError:
        return float(text)


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser(sdxl: bool = False) -> Parser:
    """The parser of es_lora_ldm.py, or with ``sdxl`` of es_lora_sdxl.py, with a few more."""
    family = "Stable Diffusion XL" if sdxl else "Stable Diffusion 1.x / 2.x"
    parser = Parser(
        prog="es_lora_sdxl.py" if sdxl else "es_lora_ldm.py",
        allow_abbrev=False,
        formatter_class=Formatter,
        description=f"Train a LoRA for {family} and stop at its turning point.",
    )
    parser.set_defaults(sdxl=sdxl)
    groups = [_model, *([_sdxl] if sdxl else []), _data, _dreambooth, _captions, _buckets, _network]
    groups += [_optimizer, _schedule, _step, _loss, _precision, _output, _resume, _logging]
    groups += [_samples, _validation, _metadata, _early_stop, _unsupported]
    for add_group in groups:
        add_group(parser)
    return parser


def _adder(parser, title):
    group = parser.add_argument_group(title)

    def add(name, kind=None, default=None, help=None, **options):
        """kind None: a switch; otherwise the type of its value."""
        if kind is None:
            return group.add_argument(name, action="store_true", help=help or " ", **options)
        return group.add_argument(name, type=kind, default=default, help=help or " ", **options)

    return add


def _model(parser):
    add = _adder(parser, "base model")
    add("--pretrained_model_name_or_path", str, help="diffusers folder, .safetensors/.ckpt file, or hub name")
    add("--v2", help="the base is Stable Diffusion 2.x")
    add("--v_parameterization", help="the base predicts v (SD 2.x 768)")
    add("--vae", str, help="another VAE: folder or file")
    add("--tokenizer_cache_dir", str, help="where the CLIP vocabulary lies or is kept")
    add("--clip_skip", int, help="take the text from the n-th last layer of CLIP")
    add("--max_token_length", int, choices=[None, 75, 150, 225], help="longest caption; 75 when not given")


def _sdxl(parser):
    add = _adder(parser, "text encoders of SDXL")
    add("--cache_text_encoder_outputs", help="encode every caption once; needs --network_train_unet_only")
    add("--cache_text_encoder_outputs_to_disk", help="the same, kept beside the images")


def _data(parser):
    add = _adder(parser, "images")
    add("--train_data_dir", str, help="folder of <repeats>_<name> folders")
    add("--reg_data_dir", str, help="regularisation images, in <repeats>_<class> folders")
    add("--in_json", str, help="JSON metadata of the images in --train_data_dir")
    add("--dataset_config", Path, help="TOML with [general], [[datasets]], [[datasets.subsets]]")
    add("--dataset_repeats", int, 1, help="repeats of each image with --in_json")
    add("--resolution", str, help="W,H or one number, px")
    add("--train_batch_size", int, 1)
    add("--prior_loss_weight", float, 1.0, help="weight of the loss on regularisation images")
    add("--cache_latents", help="encode every image once, keep the latents in memory")
    add("--cache_latents_to_disk", help="the same, kept beside the images as .npz")
    add("--vae_batch_size", int, 1)
    add("--color_aug")
    add("--flip_aug")
    add("--face_crop_aug_range", str, help="for instance 2.0,4.0")
    add("--random_crop")
    add("--resize_interpolation", str, choices=[None, *"lanczos nearest bilinear linear bicubic cubic area".split()])
    add("--alpha_mask", help="use the alpha channel as the mask of the loss")
    add("--conditioning_data_dir", str, help="folder with the mask of each image, bright where the loss counts")
    add("--skip_bad_images", help="leave unreadable images out instead of stopping (ES-LoRA)")
    add("--max_data_loader_n_workers", int, 8, help="at most this many processes prepare images; 0: none")
    add("--persistent_data_loader_workers", help="keep them between epochs")
    add("--debug_dataset", help="show what would be trained on, then end")


def _dreambooth(parser):
    add = _adder(parser, "DreamBooth (ES-LoRA)")
    add("--trigger_word", str, help="comes first in every caption, not in those of regularisation images")
    add("--num_class_images", int, help="pictures of the class in --reg_data_dir; missing ones are generated")
    add("--class_prompt", str, help="what they are generated from, for instance 'a photo of a statue'")
    add(
        "--train_full_unet",
        help="train the whole U-Net, not a LoRA; then extract_lora.py makes a LoRA of the difference",
    )


def _captions(parser):
    add = _adder(parser, "captions")
    add("--caption_extension", str, ".caption")
    add("--caption_extention", str, help="kohya's earlier spelling of --caption_extension")
    add("--shuffle_caption")
    add("--caption_separator", str, ",")
    add("--keep_tokens", int, 0, help="the first n tags stay in place")
    add("--keep_tokens_separator", str, "")
    add("--secondary_separator", str)
    add("--enable_wildcard")
    add("--caption_prefix", str)
    add("--caption_suffix", str)
    add("--caption_dropout_rate", float, 0.0)
    add("--caption_dropout_every_n_epochs", int, 0)
    add("--caption_tag_dropout_rate", float, 0.0)
    add("--token_warmup_min", int, 1)
    add("--token_warmup_step", float, 0)
    add("--weighted_captions", help="(word:1.2) and [word] in captions")


def _buckets(parser):
    add = _adder(parser, "aspect-ratio buckets")
    add("--enable_bucket")
    add("--min_bucket_reso", int, 256)
    add("--max_bucket_reso", int, 1024)
    add("--bucket_reso_steps", int, 64)
    add("--bucket_no_upscale")


def _network(parser):
    add = _adder(parser, "LoRA network")
    add("--network_module", str, help="networks.lora (default) or lycoris.kohya")
    add("--network_dim", int, help="rank; 4 when not given")
    add("--network_alpha", float, 1)
    add("--network_dropout", float)
    add(
        "--network_args",
        str,
        nargs="*",
        help="key=value: conv_dim, block_dims, down_lr_weight, loraplus_lr_ratio, algo, ...",
    )
    add("--network_weights", str, help="start from this LoRA file")
    add("--dim_from_weights", help="take the ranks from --network_weights")
    add("--network_train_unet_only")
    add("--network_train_text_encoder_only")
    add("--base_weights", str, nargs="*", help="LoRA files folded into the base before training")
    add("--base_weights_multiplier", float, nargs="*")
    add("--scale_weight_norms", float, help="largest norm of an update; 1 is a good start")


def _optimizer(parser):
    add = _adder(parser, "optimizer")
    add(
        "--optimizer_type",
        str,
        "",
        help="a name of training.optimizers.OPTIMIZERS (AdamW8bit, Prodigy, ...) or package.Class",
    )
    add("--optimizer_args", str, nargs="*", help="key=value, for instance weight_decay=0.01 betas=0.9,0.999")
    add("--use_8bit_adam")
    add("--use_lion_optimizer")
    add("--learning_rate", float, 2e-06)
    add("--unet_lr", float)
    add("--text_encoder_lr", float, nargs="*")
    add("--max_grad_norm", float, 1.0, help="0: no clipping")


def _schedule(parser):
    add = _adder(parser, "learning-rate schedule")
    add("--lr_scheduler", str, "constant")
    add("--lr_scheduler_type", str, "", help="package.Class of another scheduler")
    add("--lr_scheduler_args", str, nargs="*")
    add("--lr_warmup_steps", int_or_float, 0, help="steps, or a fraction of all steps below 1")
    add("--lr_decay_steps", int_or_float, 0)
    add("--lr_scheduler_num_cycles", int, 1)
    add("--lr_scheduler_power", float, 1)
    add("--lr_scheduler_timescale", int)
    add("--lr_scheduler_min_lr_ratio", float)


def _step(parser):
    add = _adder(parser, "length and memory of training")
    add("--max_train_steps", int, 1600)
    add("--max_train_epochs", int, help="overrides --max_train_steps")
    add("--gradient_accumulation_steps", int, 1)
    add("--gradient_checkpointing")
    add("--sdpa", help="PyTorch's scaled dot-product attention")
    add("--xformers")
    add("--mem_eff_attn", help="sliced attention: least memory, slow")
    add("--seed", int, help="drawn and reported when not given")
    add("--highvram", help="keep the VAE on the device")
    add("--ddp_timeout", int, help="minutes")


def _loss(parser):
    add = _adder(parser, "noise and loss")
    add("--noise_offset", float)
    add("--noise_offset_random_strength")
    add("--adaptive_noise_scale", float)
    add("--multires_noise_iterations", int)
    add("--multires_noise_discount", float, 0.3)
    add("--ip_noise_gamma", float)
    add("--ip_noise_gamma_random_strength")
    add("--zero_terminal_snr")
    add("--min_timestep", int)
    add("--max_timestep", int)
    add("--loss_type", str, "l2", choices=["l1", "l2", "huber", "smooth_l1"])
    add("--huber_schedule", str, "snr", choices=["constant", "exponential", "snr"])
    add("--huber_c", float, 0.1)
    add("--huber_scale", float, 1.0)
    add("--min_snr_gamma", float)
    add("--scale_v_pred_loss_like_noise_pred")
    add("--v_pred_like_loss", float)
    add("--debiased_estimation_loss")
    add("--masked_loss", help="weight the loss by the masks (--alpha_mask, --conditioning_data_dir)")


def _precision(parser):
    add = _adder(parser, "precision")
    add("--mixed_precision", str, "no", choices=["no", "fp16", "bf16"])
    add("--full_fp16", help="LoRA weights and gradients in fp16 too")
    add("--full_bf16", help="LoRA weights and gradients in bf16 too")
    add("--no_half_vae", help="the VAE stays in float32")
    add("--save_precision", str, choices=[None, "float", "fp16", "bf16"])


def _output(parser):
    add = _adder(parser, "output")
    add("--output_dir", str)
    add("--output_name", str, help="file name without ending; 'last' when not given")
    add("--save_model_as", str, choices=[None, "safetensors", "ckpt", "pt", "diffusers", "diffusers_safetensors"])
    add("--use_safetensors", help="kohya's earlier form of --save_model_as safetensors")
    for unit in ("epochs", "steps"):
        add(f"--save_every_n_{unit}", int)
        add(f"--save_last_n_{unit}", int, help="older ones are deleted")
        add(f"--save_last_n_{unit}_state", int)
    add("--save_n_epoch_ratio", int, help="about this many files over the run")
    add("--config_file", str, help="TOML with any of these flags")
    add("--output_config", help="write these settings to --config_file, then end")
    add("--training_comment", str)
    add("--no_metadata")


def _resume(parser):
    add = _adder(parser, "resume")
    add("--save_state", help="with every checkpoint and at the end, all that --resume needs")
    add("--save_state_on_train_end")
    add("--resume", str, help="a state folder")
    add("--initial_epoch", int, help="start at this epoch, counted from 1 (without --resume)")
    add("--initial_step", int, help="start after this many steps (without --resume)")
    add("--skip_until_initial_step", help="start in mid-epoch rather than at the beginning of its epoch")


def _logging(parser):
    add = _adder(parser, "logging")
    add("--logging_dir", str)
    add("--log_with", str, choices=["tensorboard", "wandb", "all"])
    add("--log_prefix", str)
    add("--log_tracker_name", str)
    add("--log_tracker_config", str, help="TOML with settings of the tracker")
    add("--log_config", help="the settings go to the tracker too")
    add("--wandb_run_name", str)
    add("--wandb_api_key", str)


def _samples(parser):
    add = _adder(parser, "previews")
    add("--sample_prompts", str, help=".txt, .toml or .json file of prompts")
    add("--sample_every_n_steps", int)
    add("--sample_every_n_epochs", int)
    add("--sample_at_first")
    add("--sample_sampler", str, "ddim", choices=SAMPLERS)


def _validation(parser):
    add = _adder(parser, "validation loss (logged; only the rule validation-patience stops by it)")
    add("--validation_split", float, 0.0, help="fraction of the images held out")
    add("--validation_seed", int)
    add("--validate_every_n_steps", int)
    add("--validate_every_n_epochs", int)
    add("--max_validation_steps", int, help="at most this many batches")


def _metadata(parser):
    add = _adder(parser, "metadata of the file (modelspec)")
    texts = "title author description license tags usage_hint thumbnail".split()
    for name in [*texts, "merged_from", "trigger_phrase", "preprocessor", "is_negative_embedding"]:
        add(f"--metadata_{name}", str)


def _early_stop(parser):
    add_stop_arguments(parser.add_argument_group("early stopping (ES-LoRA)"), USUAL)


def _unsupported(parser):
    """Flags of sd-scripts that are refused by name; declared so that the refusal can say why."""
    add = _adder(parser, "flags of sd-scripts that are refused, with the reason")
    choices = {
        "zero_stage": [0, 1, 2, 3],
        "dynamo_backend": DYNAMO_BACKENDS,
        "offload_optimizer_device": [None, "cpu", "nvme"],
        "offload_param_device": [None, "cpu", "nvme"],
    }
    defaults = {"zero_stage": 2, "dynamo_backend": "inductor"}
    for name, (takes_value, reason) in REJECTED.items():
        if takes_value:
            add(f"--{name}", type(defaults.get(name, "")), defaults.get(name), help=reason, choices=choices.get(name))
        else:
            add(f"--{name}", help=reason)
