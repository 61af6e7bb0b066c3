"""Every flag of es_lora_llm.py: groups of settings with their defaults and help."""

import argparse
import os
from dataclasses import dataclass, field, fields
from typing import Any, Optional, Union

import torch
from transformers import GenerationConfig, Seq2SeqTrainingArguments

from es_lora.settings import StopSettings
from text.conversations import LEARN_TURNS
from text.templates import TEMPLATES

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
        default="EleutherAI/pythia-12b",
        metadata={"help": "folder or hub name of the base model, a GGUF file, or smollm2: SmolLM2-135M-Instruct"},
    )
    gguf_file: Optional[str] = field(
        default=None, metadata={"help": "the GGUF file of this name in the folder or hub repository is the base"}
    )
    trust_remote_code: Optional[bool] = field(
        default=False, metadata={"help": "run code that comes with the base model (only if you trust its authors)"}
    )
    use_auth_token: Optional[bool] = field(
        default=False, metadata={"help": "use the hub token of `hf auth login`", "aliases": ["--use_auth"]}
    )


class OneOrMore(argparse.Action):
    """One word stays a word, several become a list."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: Optional[str] = None,
    ) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


@dataclass
class DataArguments:
    dataset: str = field(
        default="alpaca",
        metadata={
            "nargs": "+",
            "action": OneOrMore,
            "help": "alpaca, alpaca-clean, chip2, self-instruct, hh-rlhf, longform, oasst1, "
            "lima, mmlu, another hub name, a "
            "json, jsonl, csv or tsv file, or deeplake:PATH_OR_URL; several are mixed, NAME:WEIGHT by their weights",
        },
    )
    dataset_format: Optional[str] = field(
        default=None, metadata={"help": "format of the rows; default: told by the columns"}
    )
    prompt_template: Optional[str] = field(
        default=None,
        metadata={
            "help": 'rows of any columns: "Question: {question}\\n\\nAnswer: {answer}", of '
            "which the last column is learnt; or "
            f"{', '.join(TEMPLATES)} or chat (the tokenizer's own chat template)"
        },
    )
    learn_turns: str = field(
        default="all",
        metadata={
            "help": f"{' or '.join(LEARN_TURNS)}: which answers of a conversation are learnt; `last` reads it as one "
            "input and one output"
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "read training rows as they are needed; needs --max_steps"}
    )
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
    train_subject: Optional[str] = field(
        default=None, metadata={"help": "with --dataset mmlu: the subject to train on"}
    )
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
    train_on_source: Optional[bool] = field(
        default=False, metadata={"help": "learn the source too, not only the target"}
    )
    mmlu_split: Optional[str] = field(default="eval", metadata={"help": "eval (validation) or test"})
    mmlu_dataset: Optional[str] = field(
        default="mmlu-fs", metadata={"help": "mmlu-zs (zero-shot) or mmlu-fs (five-shot)"}
    )
    do_mmlu_eval: Optional[bool] = field(
        default=False, metadata={"help": "score MMLU before, during and after training"}
    )
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
    report_to: str = field(
        default="none", metadata={"help": "tensorboard, wandb, trackio, ..., several with commas, or none"}
    )
    output_dir: str = field(default="./output", metadata={"help": "where the run leaves everything"})
    optim: str = field(default="paged_adamw_32bit", metadata={"help": "the optimizer, by its Hugging Face name"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "examples a device and micro-step"})
    gradient_accumulation_steps: int = field(default=16, metadata={"help": "micro-steps an optimizer step"})
    max_steps: int = field(
        default=10000, metadata={"help": "optimizer steps; --num_train_epochs alone takes its place"}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay"})
    learning_rate: float = field(default=0.0002, metadata={"help": "learning rate"})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "leave this off: the collator reads text columns"}
    )
    max_grad_norm: float = field(default=0.3, metadata={"help": "clip the gradient to this norm"})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "recompute activations to save memory"})
    do_train: bool = field(default=True, metadata={"help": "train"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "constant, linear, cosine, ..."})
    warmup_ratio: float = field(
        default=0.03, metadata={"help": "share of the steps to warm up in, if the scheduler does"}
    )
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
    per_gpu_train_batch_size: Optional[int] = field(
        default=None, metadata={"help": "older: --per_device_train_batch_size"}
    )
    per_gpu_eval_batch_size: Optional[int] = field(
        default=None, metadata={"help": "older: --per_device_eval_batch_size"}
    )
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
    """Generation of --do_predict with --predict_with_generate. --use_cache stands among the
    training arguments."""

    max_new_tokens: Optional[int] = field(default=256, metadata={"help": "longest answer in tokens"})
    min_new_tokens: Optional[int] = field(default=None, metadata={"help": "shortest answer in tokens"})
    do_sample: Optional[bool] = field(default=False, metadata={"help": "sample instead of taking the likeliest token"})
    num_beams: Optional[int] = field(default=1, metadata={"help": "beams of beam search"})
    num_beam_groups: Optional[int] = field(default=1, metadata={"help": "1: diverse beam search has left transformers"})
    penalty_alpha: Optional[float] = field(
        default=None, metadata={"help": "contrastive search has left transformers: unset"}
    )
    temperature: Optional[float] = field(default=1.0, metadata={"help": "sampling temperature"})
    top_k: Optional[int] = field(default=50, metadata={"help": "sample from the k likeliest tokens"})
    top_p: Optional[float] = field(
        default=1.0, metadata={"help": "sample from the likeliest tokens up to this probability"}
    )
    typical_p: Optional[float] = field(default=1.0, metadata={"help": "typical decoding"})
    diversity_penalty: Optional[float] = field(
        default=0.0, metadata={"help": "diverse beam search has left transformers: 0"}
    )
    repetition_penalty: Optional[float] = field(default=1.0, metadata={"help": "above 1 discourages repetition"})
    length_penalty: Optional[float] = field(default=1.0, metadata={"help": "of beam search"})
    no_repeat_ngram_size: Optional[int] = field(default=0, metadata={"help": "never repeat n-grams of this size"})

    def config(self, use_cache: bool) -> GenerationConfig:
        """The GenerationConfig of what was set; what has its neutral value is left to the
        library."""
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


USUAL_STOP = StopSettings(calculate_cs=True, cs_reduction="row")


@dataclass
class Settings:
    """Everything the command line said. stop: with the number of shadows that the rule needs."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    generation: GenerationArguments
    stop: StopSettings
    generation_use_cache: bool
    resume: Union[str, bool, None]
    notices: list[str]

    def flags(self) -> dict[str, Any]:
        """{flag: value} of all groups."""
        groups = (self.model, self.data, self.training, self.generation)
        return {**{name: value for group in groups for name, value in vars(group).items()}, **self.stop.as_flags()}

    def values(self, differing_only: bool = False) -> dict[str, Any]:
        """{flag: value} of every simple setting, or of those that differ from their default."""
        groups = (self.model, self.data, self.training, self.generation)
        usual = {entry.name: entry.default for group in groups for entry in fields(group)} | USUAL_STOP.as_flags()
        values = {name: value for name, value in self.flags().items() if name in usual}
        if isinstance(self.data.dataset, list):
            values["dataset"] = " ".join(self.data.dataset)
        simple = {name: value for name, value in values.items() if isinstance(value, (str, int, float, bool))}
        return {name: value for name, value in simple.items() if not (differing_only and value == usual[name])}
