"""What the settings of a run must be, each by itself and together: every problem is collected."""

from pathlib import Path

from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from es_lora.history import HISTORY_NAME
from es_lora.shadows import rate_is_adams
from settings.flags import Settings
from text.conversations import LEARN_TURNS
from text.packing import PACKINGS

# Ranges, checked where a value is given; NaN is in none of them.
_AT_LEAST_1 = """
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
    max_train_samples max_eval_samples max_mmlu_samples max_forgetting_samples max_new_tokens num_beams
    source_max_len target_max_len mmlu_source_max_len
""".split()
AT_LEAST = {**dict.fromkeys(_AT_LEAST_1, 1), "seq_length": 2, "weight_decay": 0, "max_grad_norm": 0}
# The largest values that make sense; others: es_lora.inputs.bounds.
LARGEST = {
    **dict.fromkeys(("seed", "data_seed"), 2**32 - 1),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 65_536),
    **dict.fromkeys(("per_gpu_train_batch_size", "per_gpu_eval_batch_size", "lora_r"), 65_536),
    **dict.fromkeys(("num_train_epochs", "seq_length"), 1_000_000),
    **dict.fromkeys(("max_new_tokens", "min_new_tokens"), 131_072),
    **dict.fromkeys(("num_beams", "dataloader_num_workers", "dataloader_prefetch_factor", "dataset_num_proc"), 256),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "warmup_steps"), 10**9),
    **dict.fromkeys(("eval_dataset_size", "test_dataset_size"), 10**9),
}
ABOVE_ZERO = ("lora_alpha", "learning_rate", "num_train_epochs", "save_steps", "temperature", "top_p")


def collect_problems(settings: Settings) -> list[str]:
    training, stop, problems = settings.training, settings.stop, []

    def check(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    check(training.bits in (4, 8, 16, 32), f"--bits {training.bits}: choose 4, 8, 16 or 32")
    check(training.quant_type in ("nf4", "fp4"), f"--quant_type {training.quant_type}: choose nf4 or fp4")
    flags = settings.flags()
    for name, lowest in AT_LEAST.items():
        check(flags[name] is None or flags[name] >= lowest, f"--{name} {flags[name]}: must be at least {lowest}")
    for name in ABOVE_ZERO:
        check(flags[name] > 0, f"--{name} {flags[name]:g}: must be above 0")
    check(
        training.max_steps >= 1 or training.max_steps == -1,
        f"--max_steps {training.max_steps}: nothing would be trained; give at least 1, or -1 for --num_train_epochs",
    )
    check(0 <= training.warmup_ratio < 1, f"--warmup_ratio {training.warmup_ratio}: must be at least 0 and below 1")
    for name, neutral in (("num_beam_groups", 1), ("penalty_alpha", None), ("diversity_penalty", 0.0)):
        check(
            flags[name] == neutral,
            f"--{name} {flags[name]}: transformers has dropped this way of generating; leave it out",
        )
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
    check(
        training.mmlu_dataset in ("mmlu-zs", "mmlu-fs"),
        f"--mmlu_dataset {training.mmlu_dataset}: choose mmlu-zs or mmlu-fs",
    )
    if training.full_finetune:
        check(
            not stop.calculate_cs,
            "--full_finetune trains every weight and CS needs a LoRA: leave out --early_stop "
            "and --calculate_cs, or train a LoRA",
        )
        check(
            training.bits in (16, 32),
            f"--full_finetune cannot train a base of {training.bits} bits: use --bits 16 or 32",
        )
    check(stop.cs_component in (None, "lm", "all"), f"--cs_component {stop.cs_component}: choose lm or all")
    optimizer = str(getattr(training.optim, "value", training.optim))
    if "schedule_free" in optimizer and stop.average:
        problems.append(
            f"--average {stop.average:g}: --optim {optimizer} averages its weights itself; give --average 0"
        )
    problems += _shadow_problems(settings) + _data_problems(settings)
    problems += _logging_problems(training.report_to) + _output_problems(settings)
    return problems


def _data_problems(settings: Settings) -> list[str]:
    """Ways to read and pack the data that do not go together."""
    data, training, stop, problems = settings.data, settings.training, settings.stop, []

    def check(condition: bool, message: str) -> None:
        if not condition:
            problems.append(message)

    check(
        data.packing in (None, *PACKINGS),
        f"--packing {data.packing}: choose one of {', '.join(PACKINGS)}, or leave it out",
    )
    check(
        data.learn_turns in LEARN_TURNS,
        f"--learn_turns {data.learn_turns}: choose {' or '.join(LEARN_TURNS)}",
    )
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
        not (stop.shadows and data.streaming),
        "--shadows hold samples out of a known set: leave them out, or --streaming",
    )
    if data.streaming:
        check(training.max_steps > 0, "--streaming: a stream has no known length, so give --max_steps")
        fraction = (
            0 < data.eval_dataset_size < 1 and not data.eval_dataset and (training.do_eval or training.do_predict)
        )
        check(
            not fraction and not 0 < data.test_dataset_size < 1,
            "--streaming: hold out a number of rows, not a fraction",
        )
        check(
            not stop.calculate_cs or None not in (stop.cs_interval, stop.window_size),
            "--streaming: the length of an epoch is not known, so give --cs_interval and --window_size (M "
            "measurements, about one pass over the data), or --calculate_cs False",
        )
        for name in ("eval_strategy", "save_strategy"):
            check(getattr(training, name) != "epoch", f"--{name} epoch: a stream has no known epochs; give steps")
    return problems


def _shadow_problems(settings: Settings) -> list[str]:
    """Shadows are an AdamW of their own on a frozen base; what that does not fit is refused."""
    stop, training = settings.stop, settings.training
    if not stop.shadows:
        return []
    optimizer = getattr(training.optim, "value", training.optim)
    refused = {
        "--shadows are scored when CS is measured: leave out --calculate_cs False": not stop.calculate_cs,
        "--shadows are trained by AdamW at the main learning rate, and that of --optim "
        f"{optimizer} means something else: "
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
        f"--output_dir {output} holds an earlier run: choose another folder, go on with it by --resume_from_checkpoint "
        "true, or delete it by --overwrite_output_dir"
    ]
