"""The command line: qlora's argument groups with their names and defaults, the Hugging Face training arguments,
flag names that transformers has since renamed or dropped, and the early-stop flags. One validation pass collects
every problem.

Source of the names: the published interface of qlora.py (golden list qlora_flags_7f4e95a.txt), the Hugging Face
TrainingArguments, and section 6 of the design.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional, Union

import torch
from cs_fluctuation import HISTORY_NAME
from prompt_templates import TEMPLATES
from sequence_packing import PACKINGS
from shadow_training import DEFAULT_SHADOWS, rate_is_adams
from stop_rules import DEFAULT_RULE, RULES, check_rule
from transformers import GenerationConfig, HfArgumentParser, Seq2SeqTrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

# --preset NAME: what stands in for the defaults of these flags.
PRESETS: dict[str, dict[str, str]] = {
    "sft-cpu": {
        "use_cpu": "True",
        "bits": "16",
        "bf16": "True",
        "lora_r": "16",
        "lora_alpha": "32",
        "lora_dropout": "0.05",
        "per_device_train_batch_size": "8",
        "gradient_accumulation_steps": "1",
        "learning_rate": "1e-4",
        "lr_scheduler_type": "cosine",
        "warmup_steps": "10",
        "weight_decay": "0.05",
        "optim": "adamw_torch",
        "num_train_epochs": "10",
        "do_eval": "True",
        "eval_dataset_size": "0.1",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
    }
}


@dataclass
class ModelArguments:
    model_name_or_path: Optional[str] = field(
        default="EleutherAI/pythia-12b", metadata={"help": "folder or hub name of the base model"}
    )
    trust_remote_code: Optional[bool] = field(
        default=False, metadata={"help": "run code that comes with the base model (only if you trust its authors)"}
    )
    use_auth_token: Optional[bool] = field(
        default=False, metadata={"help": "use the hub token of `hf auth login`", "aliases": ["--use_auth"]}
    )


class OneOrMore(argparse.Action):
    """One word stays a word, several become a list."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


@dataclass
class DataArguments:
    dataset: str = field(
        default="alpaca",
        metadata={
            "nargs": "+",
            "action": OneOrMore,
            "help": "alpaca, alpaca-clean, chip2, self-instruct, hh-rlhf, longform, oasst1, lima, mmlu, another hub name, a "
            "json, jsonl, csv or tsv file, or deeplake:PATH_OR_URL; several are mixed, NAME:WEIGHT by their weights",
        },
    )
    dataset_format: Optional[str] = field(default=None, metadata={"help": "format of the rows; default: told by the columns"})
    prompt_template: Optional[str] = field(
        default=None,
        metadata={
            "help": 'rows of any columns: "Question: {question}\\n\\nAnswer: {answer}", of which the last column is learnt; or '
            f"{', '.join(TEMPLATES)} or chat (the tokenizer's own chat template)"
        },
    )
    streaming: bool = field(default=False, metadata={"help": "read training rows as they are needed; needs --max_steps"})
    packing: Optional[str] = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": "samples",
            "help": "fill sequences with whole samples that do not see each other (no word or `samples`), or with one "
            "contiguous stream of them (`wrapped`)",
        },
    )
    seq_length: int = field(default=1024, metadata={"help": "tokens of a packed sequence"})
    packing_repeat: bool = field(
        default=False, metadata={"help": "with --streaming: start an exhausted stream again, until --max_steps"}
    )
    eval_dataset: Optional[str] = field(default=None, metadata={"help": "a file of held-out examples, used whole"})
    eval_dataset_size: float = field(
        default=1024, metadata={"help": "examples held out of the training data for evaluation; below 1 a fraction"}
    )
    test_dataset_size: float = field(default=0, metadata={"help": "examples held out for one score at the very end"})
    max_train_samples: Optional[int] = field(default=None, metadata={"help": "use at most so many training examples"})
    max_eval_samples: Optional[int] = field(default=None, metadata={"help": "use at most so many evaluation examples"})
    source_max_len: int = field(default=1024, metadata={"help": "longest source in tokens; the rest is cut off"})
    target_max_len: int = field(default=256, metadata={"help": "longest target in tokens; the rest is cut off"})
    train_subject: Optional[str] = field(default=None, metadata={"help": "with --dataset mmlu: the subject to train on"})
    mmlu_dir: str = field(default="data/mmlu", metadata={"help": "where MMLU's data.tar or its unpacked folder lies"})
    forgetting_data: Optional[str] = field(
        default=None, metadata={"help": "general text (jsonl with text, or txt) that tells what the LoRA has forgotten"}
    )
    max_forgetting_samples: int = field(default=20, metadata={"help": "score at most so many passages of it"})

    def __post_init__(self) -> None:
        words = {"true": "samples", "false": None, "none": None}
        self.packing = words.get(str(self.packing).lower(), self.packing)


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    cache_dir: Optional[str] = field(default=None, metadata={"help": "where hub downloads are kept"})
    train_on_source: Optional[bool] = field(default=False, metadata={"help": "learn the source too, not only the target"})
    mmlu_split: Optional[str] = field(default="eval", metadata={"help": "eval (validation) or test"})
    mmlu_dataset: Optional[str] = field(default="mmlu-fs", metadata={"help": "mmlu-zs (zero-shot) or mmlu-fs (five-shot)"})
    do_mmlu_eval: Optional[bool] = field(default=False, metadata={"help": "score MMLU before, during and after training"})
    max_mmlu_samples: Optional[int] = field(default=None, metadata={"help": "score at most so many MMLU questions"})
    mmlu_source_max_len: int = field(default=2048, metadata={"help": "longest MMLU prompt in tokens"})
    full_finetune: bool = field(default=False, metadata={"help": "train every weight instead of a LoRA"})
    adam8bit: bool = field(default=False, metadata={"help": "use 8-bit Adam"})
    double_quant: bool = field(default=True, metadata={"help": "quantise the quantisation constants too"})
    quant_type: str = field(default="nf4", metadata={"help": "nf4 or fp4"})
    bits: int = field(default=4, metadata={"help": "bits of the frozen base: 4, 8, 16 or 32"})
    lora_r: int = field(default=64, metadata={"help": "LoRA rank"})
    lora_alpha: float = field(default=16, metadata={"help": "LoRA alpha"})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout"})
    lora_modules: str = field(
        default="all", metadata={"help": "all (every linear layer but the output head), attention, or NAME,NAME,..."}
    )
    lora_bias: str = field(default="none", metadata={"help": "biases to train: none, all or lora_only"})
    max_memory_MB: int = field(default=80000, metadata={"help": "memory to use on each GPU, in MB"})
    report_to: str = field(default="none", metadata={"help": "tensorboard, wandb, trackio, ..., several with commas, or none"})
    output_dir: str = field(default="./output", metadata={"help": "where the run leaves everything"})
    optim: str = field(default="paged_adamw_32bit", metadata={"help": "the optimizer, by its Hugging Face name"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "examples a device and micro-step"})
    gradient_accumulation_steps: int = field(default=16, metadata={"help": "micro-steps an optimizer step"})
    max_steps: int = field(default=10000, metadata={"help": "optimizer steps; --num_train_epochs alone takes its place"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay"})
    learning_rate: float = field(default=0.0002, metadata={"help": "learning rate"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "leave this off: the collator reads text columns"})
    max_grad_norm: float = field(default=0.3, metadata={"help": "clip the gradient to this norm"})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "recompute activations to save memory"})
    do_train: bool = field(default=True, metadata={"help": "train"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "constant, linear, cosine, ..."})
    warmup_ratio: float = field(default=0.03, metadata={"help": "share of the steps to warm up in, if the scheduler does"})
    logging_steps: float = field(default=10, metadata={"help": "log every so many steps"})
    group_by_length: bool = field(default=True, metadata={"help": "batch examples of similar length"})
    save_strategy: str = field(default="steps", metadata={"help": "no, steps or epoch"})
    save_steps: float = field(default=250, metadata={"help": "save a checkpoint every so many steps"})
    save_total_limit: int = field(default=40, metadata={"help": "keep at most so many checkpoints"})
    # Names of older transformers releases, with the meaning they had there.
    evaluation_strategy: Optional[str] = field(default=None, metadata={"help": "the older name of --eval_strategy"})
    logging_dir: Optional[str] = field(default=None, metadata={"help": "folder of the TensorBoard log"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "delete an earlier run in --output_dir first"})
    no_cuda: bool = field(default=False, metadata={"help": "the older name of --use_cpu"})
    per_gpu_train_batch_size: Optional[int] = field(default=None, metadata={"help": "older: --per_device_train_batch_size"})
    per_gpu_eval_batch_size: Optional[int] = field(default=None, metadata={"help": "older: --per_device_eval_batch_size"})
    adafactor: bool = field(default=False, metadata={"help": "the older way to say --optim adafactor"})
    save_safetensors: bool = field(default=True, metadata={"help": "adapters are always saved as safetensors"})

    def __post_init__(self) -> None:
        self.eval_strategy = self.evaluation_strategy or self.eval_strategy
        if isinstance(self.report_to, str):
            self.report_to = [name.strip() for name in self.report_to.split(",")]
        if self.warmup_ratio and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # below 1 it is a share of the steps
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        self.group_by_length = self.train_sampling_strategy == "group_by_length"
        if self.logging_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        if self.disable_tqdm is None:
            self.disable_tqdm = False  # transformers would hide the bar because its warnings are off
        self.use_cpu = self.use_cpu or self.no_cuda or not torch.accelerator.is_available()
        self.per_device_train_batch_size = self.per_gpu_train_batch_size or self.per_device_train_batch_size
        self.per_device_eval_batch_size = self.per_gpu_eval_batch_size or self.per_device_eval_batch_size
        if self.adafactor:
            self.optim = "adafactor"
        if self.adam8bit:
            self.optim = "adamw_bnb_8bit"
        # The same under the name that transformers 5 gave it.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs or {"use_reentrant": False}
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        super().__post_init__()


@dataclass
class GenerationArguments:
    """Generation of --do_predict with --predict_with_generate. --use_cache stands among the training arguments."""

    max_new_tokens: Optional[int] = field(default=256, metadata={"help": "longest answer in tokens"})
    min_new_tokens: Optional[int] = field(default=None, metadata={"help": "shortest answer in tokens"})
    do_sample: Optional[bool] = field(default=False, metadata={"help": "sample instead of taking the likeliest token"})
    num_beams: Optional[int] = field(default=1, metadata={"help": "beams of beam search"})
    num_beam_groups: Optional[int] = field(default=1, metadata={"help": "1: diverse beam search has left transformers"})
    penalty_alpha: Optional[float] = field(default=None, metadata={"help": "contrastive search has left transformers: unset"})
    temperature: Optional[float] = field(default=1.0, metadata={"help": "sampling temperature"})
    top_k: Optional[int] = field(default=50, metadata={"help": "sample from the k likeliest tokens"})
    top_p: Optional[float] = field(default=1.0, metadata={"help": "sample from the likeliest tokens up to this probability"})
    typical_p: Optional[float] = field(default=1.0, metadata={"help": "typical decoding"})
    diversity_penalty: Optional[float] = field(default=0.0, metadata={"help": "diverse beam search has left transformers: 0"})
    repetition_penalty: Optional[float] = field(default=1.0, metadata={"help": "above 1 discourages repetition"})
    length_penalty: Optional[float] = field(default=1.0, metadata={"help": "of beam search"})
    no_repeat_ngram_size: Optional[int] = field(default=0, metadata={"help": "never repeat n-grams of this size"})

    def config(self, use_cache: bool) -> GenerationConfig:
        """The GenerationConfig of what was set; what has its neutral value is left to the library."""
        neutral = {"num_beam_groups": 1, "penalty_alpha": None, "diversity_penalty": 0.0, "min_new_tokens": None}
        sampling = () if self.do_sample else ("temperature", "top_k", "top_p", "typical_p")
        beams = () if (self.num_beams or 1) > 1 else ("length_penalty",)
        values = {name: value for name, value in vars(self).items() if name not in (*sampling, *beams)}
        values = {name: value for name, value in values.items() if name not in neutral or value != neutral[name]}
        return GenerationConfig(**values, use_cache=use_cache)


@dataclass
class PresetArguments:
    preset: Optional[str] = field(
        default=None, metadata={"help": f"values for all flags that are not given: {', '.join(PRESETS)}"}
    )


@dataclass
class EarlyStopArguments:
    calculate_cs: bool = field(default=True, metadata={"help": "measure CS and CS-Fluctuation, and report the turning point"})
    cs_interval: str = field(
        default="auto", metadata={"help": "measure every so many optimizer steps, or auto", "aliases": ["--cs_steps"]}
    )
    window_size: str = field(default="auto", metadata={"help": "window M in measurements, or auto: about one epoch"})
    early_stop: bool = field(default=False, metadata={"help": "stop at the turning point and keep its weights"})
    stop_rule: str = field(default=DEFAULT_RULE, metadata={"help": f"the rule that decides: {', '.join(RULES)}"})
    valley: int = field(default=2, metadata={"help": "N of the rule nth-valley"})
    rule_value: Optional[float] = field(
        default=None, metadata={"help": "the number of the other rules: epochs, a patience, a threshold; default: the rule's own"}
    )
    cs_reduction: str = field(default="row", metadata={"help": "row (mean over rows) or matrix (flattened)"})
    cs_component: str = field(default="lm", metadata={"help": "whose CS decides: lm or all"})
    shadows: Optional[int] = field(
        default=None,
        metadata={"help": "adapters beside, each scored on a fold it is not trained on; 2 with --stop_rule shadow, else 0"},
    )
    shadow_rank: int = field(default=8, metadata={"help": "LoRA rank of a shadow"})
    shadow_interval: str = field(
        default="1", metadata={"help": "score the shadows at every so many measurements; auto: few, cheap ones"}
    )
    snapshot_disk_gb: float = field(default=20.0, metadata={"help": "disk that the snapshots may use"})


# Flags of older transformers releases that have no counterpart here: rejected by name, never accepted and ignored.
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

# Ranges, checked where a value is given; NaN is in none of them.
AT_LEAST = dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1)
AT_LEAST.update(dict.fromkeys(("max_train_samples", "max_eval_samples", "max_mmlu_samples", "max_new_tokens", "num_beams"), 1))
AT_LEAST.update(max_forgetting_samples=1, seq_length=2)
AT_LEAST.update(source_max_len=1, target_max_len=1, mmlu_source_max_len=1, valley=1, weight_decay=0, max_grad_norm=0)
AT_LEAST.update(shadows=0, shadow_rank=1)
ABOVE_ZERO = ("lora_alpha", "learning_rate", "num_train_epochs", "save_steps", "snapshot_disk_gb", "temperature", "top_p")


@dataclass
class Settings:
    """Everything the command line said. cs_interval, window_size and shadow_interval are None where they are automatic."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    generation: GenerationArguments
    early_stop: EarlyStopArguments
    generation_use_cache: bool
    cs_interval: Optional[int]
    window_size: Optional[int]
    shadow_interval: Optional[int]
    resume: Union[str, bool, None]
    notices: list[str]

    def flat(self) -> argparse.Namespace:
        """All groups in one namespace, as the data side reads them."""
        groups = (self.model, self.data, self.training, self.generation, self.early_stop)
        return argparse.Namespace(**{name: value for group in groups for name, value in vars(group).items()})

    def values(self, differing_only: bool = False) -> dict[str, Any]:
        """{flag: value} of every simple setting, or of those that differ from their default."""
        result = {}
        for group in (self.model, self.data, self.training, self.generation, self.early_stop):
            for entry in fields(group):
                value = getattr(group, entry.name, None)
                value = " ".join(value) if entry.name == "dataset" and isinstance(value, list) else value
                if isinstance(value, (str, int, float, bool)) and not (differing_only and value == entry.default):
                    result[entry.name] = value
        return result


class Parser(HfArgumentParser):
    def error(self, message: str):
        self.exit(2, f"es_lora_llm: {message}; see --help\n")


def build_parser() -> HfArgumentParser:
    groups = (ModelArguments, DataArguments, TrainingArguments, GenerationArguments, EarlyStopArguments, PresetArguments)
    description = "LoRA fine-tuning of a language model that stops at its turning point."
    return Parser(groups, allow_abbrev=False, description=description)


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
            nearest = difflib.get_close_matches(name, sorted(known), n=1)
            problems.append(f"--{name} is unknown" + (f"; did you mean --{nearest[0]}?" if nearest else ""))
    if problems:
        raise ValueError("; ".join(problems))


def _count_or_auto(name: str, text: str, problems: list[str]) -> Optional[int]:
    if text == "auto":
        return None
    if text.isdigit() and int(text) > 0:
        return int(text)
    problems.append(f"--{name} {text}: give a number of 1 or more, or auto")
    return None


def parse_arguments(argv: Optional[Sequence[str]] = None) -> Settings:
    """Parse and validate. Raises ValueError with every problem found; argparse's own errors exit with code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, given = build_parser(), _given_flags(argv)
    if "help" not in given:
        _check_names(parser, given)
    notices = []
    argv = _with_preset(argv, given)
    given = _given_flags(argv)
    if "num_train_epochs" in given and "max_steps" not in given:
        argv += ["--max_steps", "-1"]
    unsorted = given & {"train_sampling_strategy", "packing", "streaming"}  # with these there are no lengths to group by
    if unsorted and "group_by_length" not in given:
        argv += ["--group_by_length", "False"]
    try:
        model, data, training, generation, early_stop, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:  # transformers' own checks, some of several lines
        raise ValueError(" ".join(str(error).split())) from error
    generation_use_cache = training.use_cache if "use_cache" in given else True
    training.use_cache = False  # while training; the golden default of True is generation's
    problems: list[str] = []
    if training.full_finetune and not early_stop.early_stop and "calculate_cs" not in given:
        early_stop.calculate_cs = False
        notices.append("CS is not measured: --full_finetune trains no LoRA.")
    early_stop.calculate_cs = early_stop.calculate_cs or early_stop.early_stop
    if early_stop.shadows is None:
        needed = early_stop.calculate_cs and _rule_needs_shadows(early_stop.stop_rule)
        early_stop.shadows = DEFAULT_SHADOWS if needed else 0
    settings = Settings(
        model=model,
        data=data,
        training=training,
        generation=generation,
        early_stop=early_stop,
        generation_use_cache=generation_use_cache,
        cs_interval=_count_or_auto("cs_interval", early_stop.cs_interval, problems),
        window_size=_count_or_auto("window_size", early_stop.window_size, problems),
        shadow_interval=_count_or_auto("shadow_interval", early_stop.shadow_interval, problems),
        resume=_resume(training.resume_from_checkpoint),
        notices=notices,
    )
    problems += _problems(settings)
    if problems:
        raise ValueError("; ".join(problems))
    return settings


def _with_preset(argv: list[str], given: set[str]) -> list[str]:
    """The words of --preset before the given ones, which win. Raises ValueError on an unknown preset."""
    if "preset" not in given:
        return argv
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    name = parser.parse_known_args(argv)[0].preset
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: choose of {', '.join(PRESETS)}")
    also_known_as = {"use_cpu": {"no_cuda"}, "eval_strategy": {"evaluation_strategy"}, "num_train_epochs": {"max_steps"}}
    also_known_as.update(eval_dataset_size={"eval_dataset"}, warmup_steps={"warmup_ratio"}, optim={"adam8bit", "adafactor"})
    also_known_as.update(bf16={"fp16"}, per_device_train_batch_size={"per_gpu_train_batch_size"})
    words = []
    for flag, value in PRESETS[name].items():
        if not given & {flag, *also_known_as.get(flag, ())}:
            words += [f"--{flag}", value]
    return words + argv


def _resume(text: Optional[str]) -> Union[str, bool, None]:
    """--resume_from_checkpoint: a path, True for the newest checkpoint in the output folder, or None."""
    if text is None or str(text).lower() in ("false", "none", ""):
        return None
    return True if str(text).lower() == "true" else str(text)


def _problems(settings: Settings) -> list[str]:
    training, stop, problems = settings.training, settings.early_stop, []

    def check(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    check(training.bits in (4, 8, 16, 32), f"--bits {training.bits}: choose 4, 8, 16 or 32")
    check(training.quant_type in ("nf4", "fp4"), f"--quant_type {training.quant_type}: choose nf4 or fp4")
    flat = vars(settings.flat())
    for name, lowest in AT_LEAST.items():
        check(flat[name] is None or flat[name] >= lowest, f"--{name} {flat[name]}: must be at least {lowest}")
    for name in ABOVE_ZERO:
        check(flat[name] > 0, f"--{name} {flat[name]:g}: must be above 0")
    check(0 <= training.warmup_ratio < 1, f"--warmup_ratio {training.warmup_ratio}: must be at least 0 and below 1")
    for name, neutral in (("num_beam_groups", 1), ("penalty_alpha", None), ("diversity_penalty", 0.0)):
        check(flat[name] == neutral, f"--{name} {flat[name]}: transformers has dropped this way of generating; leave it out")
    check(0 <= training.lora_dropout < 1, f"--lora_dropout {training.lora_dropout}: must be at least 0 and below 1")
    check(training.lora_r >= 1, f"--lora_r {training.lora_r}: the rank must be at least 1")
    biases = ("none", "all", "lora_only")
    check(training.lora_bias in biases, f"--lora_bias {training.lora_bias}: choose one of {', '.join(biases)}")
    check(
        not training.load_best_model_at_end,
        "--load_best_model_at_end: this trainer keeps the turning point or the last step; take the best of the saved "
        "checkpoints by hand, or use EarlyStopCallback in a Trainer of your own",
    )
    check(training.save_safetensors, "--save_safetensors False: adapters are always saved as safetensors; leave it out")
    check(not training.remove_unused_columns, "--remove_unused_columns True would remove the text; leave it out")
    check(training.mmlu_split in ("eval", "test"), f"--mmlu_split {training.mmlu_split}: choose eval or test")
    check(training.mmlu_dataset in ("mmlu-zs", "mmlu-fs"), f"--mmlu_dataset {training.mmlu_dataset}: choose mmlu-zs or mmlu-fs")
    if training.full_finetune:
        check(
            not stop.calculate_cs,
            "--full_finetune trains every weight and CS needs a LoRA: leave out --early_stop and --calculate_cs, or train a LoRA",
        )
        check(training.bits in (16, 32), f"--full_finetune cannot train a base of {training.bits} bits: use --bits 16 or 32")
    problems += _rule_problems(stop)
    check(stop.cs_reduction in ("row", "matrix"), f"--cs_reduction {stop.cs_reduction}: choose row or matrix")
    check(stop.cs_component in ("lm", "all"), f"--cs_component {stop.cs_component}: choose lm or all")
    problems += _shadow_problems(settings) + _data_problems(settings)
    problems += _logging_problems(training.report_to) + _output_problems(settings)
    return problems


def _data_problems(settings: Settings) -> list[str]:
    """Ways to read and pack the data that do not go together."""
    data, training, stop, problems = settings.data, settings.training, settings.early_stop, []

    def check(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    check(data.packing in (None, *PACKINGS), f"--packing {data.packing}: choose one of {', '.join(PACKINGS)}, or leave it out")
    check(
        not (data.packing or data.streaming) or not training.group_by_length,
        "--group_by_length needs single samples whose lengths are known: leave it out, or --packing and --streaming",
    )
    check(
        data.prompt_template is None or data.dataset_format is None,
        "--prompt_template and --dataset_format both say how to read a row: give one of them",
    )
    check(
        data.dataset != "mmlu" or not (data.prompt_template or data.streaming),
        "--dataset mmlu has its own format and splits: leave out --prompt_template and --streaming",
    )
    check(data.streaming or not data.packing_repeat, "--packing_repeat starts a stream again: it needs --streaming")
    check(
        not stop.shadows or not (data.packing or data.streaming),
        "--shadows hold single samples out of a known set: leave them out, or --packing and --streaming",
    )
    if data.streaming:
        check(training.max_steps > 0, "--streaming: a stream has no known length, so give --max_steps")
        fraction = 0 < data.eval_dataset_size < 1 and not data.eval_dataset and (training.do_eval or training.do_predict)
        check(not fraction and not 0 < data.test_dataset_size < 1, "--streaming: hold out a number of rows, not a fraction")
        check(
            not stop.calculate_cs or None not in (settings.cs_interval, settings.window_size),
            "--streaming: the length of an epoch is not known, so give --cs_interval and --window_size (M measurements, about "
            "one pass over the data), or --calculate_cs False",
        )
        for name in ("eval_strategy", "save_strategy"):
            check(getattr(training, name) != "epoch", f"--{name} epoch: a stream has no known epochs; give steps")
    return problems


def _rule_problems(stop: EarlyStopArguments) -> list[str]:
    """What the rule itself says to its name and numbers."""
    try:
        check_rule(stop.stop_rule, max(1, stop.valley), stop.rule_value)
    except ValueError as error:
        return [f"--stop_rule {stop.stop_rule}: {error}"]
    return []


def _rule_needs_shadows(name: str) -> bool:
    return name in RULES and "shadow_loss" in RULES[name].needs


def _shadow_problems(settings: Settings) -> list[str]:
    """Shadows are an AdamW of their own on a frozen base; what that does not fit is refused."""
    stop, training = settings.early_stop, settings.training
    if not stop.shadows:
        if stop.calculate_cs and _rule_needs_shadows(stop.stop_rule):
            return [f"--stop_rule {stop.stop_rule} decides on shadows: leave out --shadows 0, or give --shadows 1 or more"]
        return []
    optimizer = getattr(training.optim, "value", training.optim)
    refused = {
        "--shadows are scored when CS is measured: leave out --calculate_cs False": not stop.calculate_cs,
        f"--shadows are trained by AdamW at the main learning rate, and that of --optim {optimizer} means something else: "
        "use an AdamW, such as paged_adamw_32bit": not rate_is_adams(optimizer),
        "--shadows have no loss scaling for --fp16: use --bf16": training.fp16,
        "--shadows need a base whose biases stay as they are: use --lora_bias none": training.lora_bias != "none",
    }
    return [message for message, applies in refused.items() if applies]


def _logging_problems(names: list[str]) -> list[str]:
    """The Trainer would fail on these only after the base is loaded."""
    known, installed = sorted(INTEGRATION_TO_CALLBACK), get_available_reporting_integrations()
    unknown = [name for name in names if name not in known]
    missing = [name for name in names if name in known and name not in installed]
    problems = [f"--report_to {name}: choose of {', '.join(known)}, or none" for name in unknown]
    return problems + [f"--report_to {name}: its package is not installed (pip install {name})" for name in missing]


def _output_problems(settings: Settings) -> list[str]:
    """An earlier run is neither mixed with nor written over unless that is asked for."""
    output = Path(settings.training.output_dir)
    if output.exists() and not output.is_dir():
        return [f"--output_dir {output} is a file: choose a folder"]
    holds_run = any((output / name).exists() for name in (HISTORY_NAME, "result.json", "adapter"))
    holds_run = holds_run or any(output.glob("checkpoint-*"))
    goes_on = settings.resume is True
    if isinstance(settings.resume, str):
        resumed = Path(settings.resume).resolve()
        goes_on = output.resolve() in (resumed, *resumed.parents)
    if not holds_run or goes_on or settings.training.overwrite_output_dir or not settings.training.do_train:
        return []
    return [
        f"--output_dir {output} holds an earlier run: choose another folder, go on with it by --resume_from_checkpoint true, "
        "or delete it by --overwrite_output_dir"
    ]
