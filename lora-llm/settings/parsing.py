"""The command line: qlora's argument groups with their names and defaults, the Hugging Face
training arguments, flag names that transformers has since renamed or dropped, and the early-stop
flags. One validation pass collects every problem.

Source of the names: the published interface of qlora.py (golden list qlora_flags_7f4e95a.txt), the
Hugging Face TrainingArguments, and section 6 of the design."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Optional, Union

from transformers import HfArgumentParser

from es_lora.command_line import nearest, without_secrets
from es_lora.inputs.bounds import bound_numbers
from es_lora.settings import StopSettings, add_stop_arguments, stop_values
from settings.checks import LARGEST, collect_problems
from settings.flags import (
    PRESETS,
    USUAL_STOP,
    DataArguments,
    GenerationArguments,
    ModelArguments,
    PresetArguments,
    Settings,
    TrainingArguments,
)

# Flags of older transformers releases without a counterpart here: rejected by name, never ignored.
REJECTED = {
    "fp16_opt_level": "apex is not supported; use --fp16",
    "fp16_backend": "there is one backend; use --fp16 or --bf16",
    "half_precision_backend": "there is one backend; use --fp16 or --bf16",
    "past_index": "transformers has dropped it",
    "sharded_ddp": "transformers has dropped it",
    "fsdp_min_num_params": "use --fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "use --fsdp_config",
    "xpu_backend": "use --ddp_backend",
    "include_inputs_for_metrics": "use --include_for_metrics",
    "include_tokens_per_second": "use --include_num_input_tokens_seen",
    "dispatch_batches": "use --accelerator_config",
    "split_batches": "use --accelerator_config",
    "tpu_num_cores": "TPUs are not supported",
    "tpu_metrics_debug": "TPUs are not supported",
    "use_ipex": "transformers has dropped it",
    "use_mps_device": "devices are found automatically",
    "jit_mode_eval": "transformers has dropped it",
    "mp_parameters": "SageMaker is not supported",
    "ray_scope": "hyperparameter search is not supported",
    "torchdynamo": "use --torch_compile",
    "push_to_hub_model_id": "use --hub_model_id",
    "push_to_hub_organization": "use --hub_model_id ORGANISATION/NAME",
    "push_to_hub_token": "use --hub_token",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults there are."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"es_lora_llm: {without_secrets(message, sys.argv)}; see --help\n")


def build_parser() -> HfArgumentParser:
    groups = (ModelArguments, DataArguments, TrainingArguments, GenerationArguments, PresetArguments)
    description = "LoRA fine-tuning of a language model that stops at its turning point."
    parser = Parser(groups, allow_abbrev=False, description=description, formatter_class=HelpFormatter)
    group = parser.add_argument_group("early stopping")
    add_stop_arguments(group, USUAL_STOP)
    no_cs = {
        "dest": "calculate_cs",
        "action": "store_false",
        "default": None,
        "help": "the same as --calculate_cs False",
    }
    group.add_argument("--no_calculate_cs", **no_cs)
    bound_numbers(parser, LARGEST)
    return parser


def _given_flags(argv: Sequence[str]) -> set[str]:
    return {word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")}


def _check_names(parser: HfArgumentParser, given: set[str]) -> None:
    """Raises ValueError that names every unknown or unsupported flag and its nearest known one."""
    known = {option.lstrip("-").replace("-", "_") for option in parser._option_string_actions}
    problems = []
    for name in sorted(given - known):
        if name in REJECTED:
            problems.append(f"--{name} is not supported: {REJECTED[name]}")
        else:
            problems.append(f"--{name} is unknown{nearest(f'--{name}', (f'--{word}' for word in known))}")
    if problems:
        raise ValueError("; ".join(problems))


def parse_arguments(argv: Optional[Sequence[str]] = None) -> Settings:
    """Parse and validate. Raises ValueError with every problem; argparse's errors exit with 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, given = build_parser(), _given_flags(argv)
    if "help" not in given:
        _check_names(parser, given)
    argv = _completed(argv, given)
    given = _given_flags(argv)
    try:
        parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except Exception as error:  # transformers' own checks, some of several lines; a package that is missing
        raise ValueError(" ".join(str(error).split())) from error
    model, data, training, generation, _, others = parsed
    generation_use_cache = training.use_cache if "use_cache" in given else True
    training.use_cache = False  # while training; the golden default of True is generation's
    stop, notices, problems = _stop_settings(stop_values(others), training.full_finetune)
    resume = _resume(training.resume_from_checkpoint)
    settings = Settings(model, data, training, generation, stop, generation_use_cache, resume, notices)
    problems += collect_problems(settings)
    if problems:
        raise ValueError("; ".join(problems))
    return settings


def _underscored(word: str) -> str:
    """--lora-r=4 as --lora_r=4: flags may be spelt with dashes."""
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _completed(argv: list[str], given: set[str]) -> list[str]:
    """The words with those of --preset, underscores in flags, and what follows from others."""
    argv = [_underscored(word) for word in _with_preset(argv, given)]
    given = _given_flags(argv)
    if "num_train_epochs" in given and "max_steps" not in given:
        argv += ["--max_steps", "-1"]
    unsorted = given & {"train_sampling_strategy", "packing", "streaming"}  # without lengths to group by
    if unsorted and "group_by_length" not in given:
        argv += ["--group_by_length", "False"]
    return argv


def _stop_settings(values: dict[str, Any], full_finetune: bool) -> tuple[StopSettings, list[str], list[str]]:
    """(settings of early stopping, notices for the person, problems)."""
    stop, problems = USUAL_STOP.given(values)
    notices = []
    if full_finetune and not stop.early_stop and "calculate_cs" not in values:
        stop = replace(stop, calculate_cs=False)
        notices.append("CS is not measured: --full_finetune trains no LoRA.")
    return replace(stop, shadows=stop.shadow_count), notices, problems


def _with_preset(argv: list[str], given: set[str]) -> list[str]:
    """The words of --preset before the given ones, which win. ValueError on an unknown preset."""
    if "preset" not in given:
        return argv
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    name = parser.parse_known_args(argv)[0].preset
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: choose of {', '.join(PRESETS)}")
    also_known_as = {
        "use_cpu": {"no_cuda"},
        "eval_strategy": {"evaluation_strategy"},
        "num_train_epochs": {"max_steps"},
    }
    also_known_as.update(
        eval_dataset_size={"eval_dataset"}, warmup_steps={"warmup_ratio"}, optim={"adam8bit", "adafactor"}
    )
    also_known_as.update(bf16={"fp16"}, per_device_train_batch_size={"per_gpu_train_batch_size"})
    words = []
    for flag, value in PRESETS[name].items():
        if not given & {flag, *also_known_as.get(flag, ())}:
            words += [f"--{flag}", value]
    return words + argv


def _resume(text: Optional[str]) -> Union[str, bool, None]:
    """--resume_from_checkpoint: a path, True for the newest in the output folder, or None."""
    if text is None or str(text).lower() in ("false", "none", ""):
        return None
    return True if str(text).lower() == "true" else str(text)
