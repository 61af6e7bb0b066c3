"""Train a LoRA for Stable Diffusion with the settings of early_stop_lora_ldm.sh, on any system:

    python lora-ldm/start.py                 (Windows: py lora-ldm\\start.py)
    python lora-ldm/start.py --unet_lr 1e-4  flags of the trainer win over the settings

The environment is made first where it is not there. The shell script does the same."""

import ntpath
import os
import sys
from pathlib import Path, PurePath
from typing import Dict, List

from starting import Settings, Tree, run

TRAINERS = {"sd": "es_lora_ldm.py", "sdxl": "es_lora_sdxl.py"}
PARTS: Dict[str, List[str]] = {
    "both": [],
    "unet": ["--network_train_unet_only"],
    "text": ["--network_train_text_encoder_only"],
}
NAMES = """
    model_type base_model is_v2 predicts_v train_data trigger_word reg_data class_pictures class_prompt resolution
    prompts name output resume continue_from rank alpha train_parts lycoris epochs batch_size accumulation unet_rate
    text_rate scheduler warmup_steps restarts optimizer min_snr_gamma noise_offset longest_caption clip_skip cache_text
    precision memory_efficient seed early_stop window cs_interval gpus wandb_key
""".split()
ALWAYS = """
    --caption_extension .txt --enable_bucket --min_bucket_reso 64 --bucket_no_upscale --cache_latents
    --save_state_on_train_end --log_with tensorboard --calculate_cs
""".split()


def words(settings: Settings, root: PurePath) -> List[str]:
    """The trainer and its flags. Raises ValueError for a setting that is none of its choices."""
    given = dict(settings)
    for name, choices in (("model_type", TRAINERS), ("train_parts", PARTS)):
        if given[name] not in choices:
            *first, last = choices
            raise ValueError(f"{name}={given[name]}: choose {', '.join(first)} or {last}")
    if given["resume"]:
        given["output"] = (ntpath if "\\" in given["resume"] else os.path).dirname(given["resume"].rstrip("/\\"))
    return [
        *_launch(given["gpus"]),
        str(root / "lora-ldm" / TRAINERS[given["model_type"]]),
        *_flags(given),
        *ALWAYS,
        *_options(given),
        *PARTS[given["train_parts"]],
    ]


def _launch(gpus: str) -> List[str]:
    """What starts several processes, where there are several GPUs."""
    if not gpus.isdigit() or gpus == "0":
        raise ValueError(f"gpus={gpus}: give a whole number of 1 or more")
    return [] if gpus == "1" else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", gpus]


def _flags(given: Settings) -> List[str]:
    """The flags that every run has."""
    flags = {
        "pretrained_model_name_or_path": "base_model",
        "train_data_dir": "train_data",
        "resolution": "resolution",
        "output_dir": "output",
        "output_name": "name",
        "network_dim": "rank",
        "network_alpha": "alpha",
        "max_train_epochs": "epochs",
        "train_batch_size": "batch_size",
        "gradient_accumulation_steps": "accumulation",
        "learning_rate": "unet_rate",
        "unet_lr": "unet_rate",
        "text_encoder_lr": "text_rate",
        "optimizer_type": "optimizer",
        "lr_scheduler": "scheduler",
        "lr_warmup_steps": "warmup_steps",
        "lr_scheduler_num_cycles": "restarts",
        "mixed_precision": "precision",
        "seed": "seed",
        "early_stop": "early_stop",
        "window_size": "window",
        "cs_interval": "cs_interval",
    }
    return [word for flag, name in flags.items() for word in (f"--{flag}", given[name])]


def _options(given: Settings) -> List[str]:
    """The flags of settings that are neither empty nor 0."""
    value = given.get
    options = {
        "is_v2": ["--v2"],
        "predicts_v": ["--v_parameterization"],
        "trigger_word": ["--trigger_word", value("trigger_word")],
        "reg_data": ["--reg_data_dir", value("reg_data")],
        "class_pictures": ["--num_class_images", value("class_pictures"), "--class_prompt", value("class_prompt")],
        "prompts": ["--sample_prompts", value("prompts")],
        "resume": ["--resume", value("resume")],
        "continue_from": ["--network_weights", value("continue_from"), "--dim_from_weights"],
        "lycoris": ["--network_module", "lycoris.kohya", "--network_args", f"algo={value('lycoris')}"],
        "min_snr_gamma": ["--min_snr_gamma", value("min_snr_gamma")],
        "noise_offset": ["--noise_offset", value("noise_offset")],
        "memory_efficient": [value("memory_efficient")],
        "cache_text": ["--cache_text_encoder_outputs"],
        "wandb_key": ["--log_with", "all", "--wandb_api_key", value("wandb_key")],
    }
    result = [str(word) for name, flags in options.items() if given[name] not in ("", "0") for word in flags]
    if given["model_type"] == "sd":
        result += ["--clip_skip", given["clip_skip"]]
    return result + (["--max_token_length", given["longest_caption"]] if given["longest_caption"] != "75" else [])


TREE = Tree("early_stop_lora_ldm.sh", "ldm", "es_lora_ldm.py", NAMES, words)

if __name__ == "__main__":
    sys.exit(run(TREE, Path(__file__).absolute().parent.parent, sys.argv[1:]))
