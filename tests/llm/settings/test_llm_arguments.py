"""The command line: qlora's flags with their defaults, the names that transformers has dropped, and
the messages."""

import ast
import re
from pathlib import Path

import pytest
import torch

from settings import parsing
from settings.parsing import REJECTED, build_parser, parse_arguments

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "qlora_flags_7f4e95a.txt"
# Whole numbers upstream; here they may also be shares below 1.
ALSO_FRACTIONS = {"eval_dataset_size", "logging_steps", "save_steps"}
SAMPLES = {"int": ("7", 7), "float": ("0.5", 0.5), "str": ("some_word", "some_word")}


def golden_flags() -> list[tuple[str, str, object]]:
    """(name, type, default) of every flag in the golden list."""
    lines = re.findall(r"^--(\w+) (\S+) default=(.*)$", GOLDEN.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [(name, kind, ast.literal_eval(default)) for name, kind, default in lines]


@pytest.fixture(scope="module")
def parser():
    return build_parser()


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """parse_arguments with an output folder of the test, in words: parse("--bits 8")."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)

    def parse_words(words: str = ""):
        return parse_arguments(["--output_dir", str(tmp_path / "run"), *words.split()])

    return parse_words


def message(parse, words: str) -> str:
    with pytest.raises(ValueError) as caught:
        parse(words)
    return str(caught.value)


def test_golden_list_is_read_whole():
    assert (
        len(golden_flags())
        == sum(line.startswith("--") for line in GOLDEN.read_text(encoding="utf-8").splitlines())
        == 60
    )


@pytest.mark.parametrize(("name", "kind", "default"), golden_flags(), ids=lambda value: str(value))
def test_flag_of_qlora_has_its_default_and_type(parser, name, kind, default):
    found = vars(parser.parse_args([]))
    assert name in found
    if name != "use_cache":  # shared with training, where it is off; see the next test
        assert found[name] == default and type(found[name]) in (type(default), float if type(default) is int else None)
    plain = re.sub(r"Optional\[(\w+)\]", r"\1", kind)
    if plain == "bool":
        assert vars(parser.parse_args([f"--{name}"]))[name] is True
        assert vars(parser.parse_args([f"--{name}", "True"]))[name] is True
        assert vars(parser.parse_args([f"--{name}", "False"]))[name] is False
        return
    text, value = SAMPLES[plain]
    parsed = vars(parser.parse_args([f"--{name}", text]))[name]
    assert parsed == value
    assert type(parsed) is (float if name in ALSO_FRACTIONS else type(value))


def test_use_cache_is_generation_s_and_on_by_default(parse):
    assert parse().generation_use_cache is True and parse().training.use_cache is False
    settings = parse("--use_cache False")
    assert settings.generation_use_cache is False
    assert settings.generation.config(settings.generation_use_cache).use_cache is False


# ------------------------------------------------------------------------- the command lines in use

QLORA_SCRIPTS = """
--model_name_or_path some/base --use_auth --logging_steps 10 --save_strategy steps --data_seed 42 --save_steps 500
--save_total_limit 40 --evaluation_strategy steps --eval_dataset_size 1024 --max_eval_samples 1000
--per_device_eval_batch_size 1 --max_new_tokens 32 --dataloader_num_workers 3 --group_by_length
--logging_strategy steps --remove_unused_columns False --do_train --do_eval --do_mmlu_eval --lora_r 64 --lora_alpha 16
--lora_modules all --double_quant --quant_type nf4 --bf16 --bits 4 --warmup_ratio 0.03 --lr_scheduler_type constant
--gradient_checkpointing --dataset oasst1 --source_max_len 16 --target_max_len 512 --per_device_train_batch_size 1
--gradient_accumulation_steps 16 --max_steps 1875 --eval_steps 187 --learning_rate 0.0002 --adam_beta2 0.999
--max_grad_norm 0.3 --lora_dropout 0.1 --weight_decay 0.0 --seed 0 --optim paged_adamw_32bit
"""
QLORA_VALUES = {
    "model_name_or_path": "some/base",
    "use_auth_token": True,
    "logging_steps": 10,
    "save_strategy": "steps",
    "data_seed": 42,
    "save_steps": 500,
    "save_total_limit": 40,
    "eval_strategy": "steps",
    "eval_dataset_size": 1024,
    "max_eval_samples": 1000,
    "per_device_eval_batch_size": 1,
    "max_new_tokens": 32,
    "dataloader_num_workers": 3,
    "group_by_length": True,
    "train_sampling_strategy": "group_by_length",
    "logging_strategy": "steps",
    "remove_unused_columns": False,
    "do_train": True,
    "do_eval": True,
    "do_mmlu_eval": True,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_modules": "all",
    "double_quant": True,
    "quant_type": "nf4",
    "bf16": True,
    "bits": 4,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": True,
    "activation_checkpointing": True,
    "dataset": "oasst1",
    "source_max_len": 16,
    "target_max_len": 512,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "max_steps": 1875,
    "eval_steps": 187,
    "learning_rate": 0.0002,
    "adam_beta2": 0.999,
    "max_grad_norm": 0.3,
    "lora_dropout": 0.1,
    "weight_decay": 0.0,
    "seed": 0,
    "optim": "paged_adamw_32bit",
}
GENERATE_VALUES = {
    "do_predict": True,
    "do_train": False,
    "predict_with_generate": True,
    "do_sample": True,
    "top_p": 0.9,
}


def values_of(settings, names) -> dict:
    flat = settings.flags()
    return {name: getattr(flat[name], "value", flat[name]) for name in names}


def test_command_lines_of_the_qlora_scripts(parse):
    assert values_of(parse(QLORA_SCRIPTS), QLORA_VALUES) == QLORA_VALUES


@pytest.mark.parametrize("name", ["do_train", "do_eval", "do_mmlu_eval", "group_by_length", "double_quant"])
@pytest.mark.parametrize("value", [True, False])
def test_switches_take_a_word_as_well(parse, name, value):
    assert parse(f"--{name} {value}").flags()[name] is value


def test_generation_command_line(parse):
    settings = parse(
        "--do_train False --do_predict True --predict_with_generate --do_sample --top_p 0.9 "
        "--num_beams 1 --max_new_tokens 32"
    )
    assert values_of(settings, GENERATE_VALUES) == GENERATE_VALUES
    config = settings.generation.config(use_cache=True)
    assert (config.do_sample, config.top_p, config.num_beams, config.max_new_tokens) == (True, 0.9, 1, 32)


def test_published_early_stop_command_line(parse):
    settings = parse(
        "--dataset mmlu --train_subject college_physics --evaluation_strategy steps "
        "--eval_dataset_size 10 --lora_modules all "
        "--double_quant --quant_type nf4 --bits 4 --target_max_len 512 --do_mmlu_eval "
        "--max_mmlu_samples 50 --cs_steps 20 "
        "--window_size 10 --early_stop --calculate_cs"
    )
    assert (settings.stop.cs_interval, settings.stop.window_size) == (20, 10)
    expected = {"train_subject": "college_physics", "dataset": "mmlu", "eval_dataset_size": 10, "max_mmlu_samples": 50}
    expected.update(early_stop=True, calculate_cs=True, do_mmlu_eval=True, eval_strategy="steps")
    assert values_of(settings, expected) == expected


SFT_CPU = {
    "use_cpu": True,
    "bits": 16,
    "bf16": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "warmup_steps": 10,
}
SFT_CPU.update(per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-4, weight_decay=0.05)
SFT_CPU.update(
    lr_scheduler_type="cosine", num_train_epochs=10, max_steps=-1, eval_strategy="epoch", save_strategy="epoch"
)


def test_a_preset_gives_its_values_and_every_one_can_be_given_otherwise(parse):
    assert values_of(parse("--preset sft-cpu"), SFT_CPU) == SFT_CPU
    words = (
        "--lora_r 4 --preset=sft-cpu --fp16 --max_steps 7 --evaluation_strategy steps "
        "--save_strategy no --warmup_ratio 0.1"
    )
    changed = {**SFT_CPU, "lora_r": 4, "bf16": False, "max_steps": 7, "num_train_epochs": 3.0, "eval_strategy": "steps"}
    changed.update(save_strategy="no", warmup_steps=0.1)
    assert values_of(parse(words), changed) == changed


def test_an_unknown_preset_is_refused(parse):
    assert "--preset sft-gpu: choose of sft-cpu" in message(parse, "--preset sft-gpu")


# ----------------------------------------------------------------------- older names, older meaning


def test_evaluation_strategy(parse):
    assert parse("--evaluation_strategy epoch").training.eval_strategy == "epoch"
    assert parse().training.eval_strategy == "no"
    assert parse("--eval_strategy epoch").training.eval_strategy == "epoch"
    assert "sometimes" in message(parse, "--evaluation_strategy sometimes")


def test_group_by_length(parse):
    assert parse().training.train_sampling_strategy == "group_by_length"
    assert parse("--group_by_length False").training.train_sampling_strategy == "random"


def test_train_sampling_strategy_is_heard_beside_the_older_default(parse):
    settings = parse("--train_sampling_strategy sequential")
    assert (settings.training.train_sampling_strategy, settings.training.group_by_length) == ("sequential", False)
    settings = parse("--train_sampling_strategy group_by_length")
    assert (settings.training.train_sampling_strategy, settings.training.group_by_length) == ("group_by_length", True)


def test_warmup_ratio_is_a_share_of_the_steps_unless_warmup_steps_says_otherwise(parse):
    assert parse("--warmup_ratio 0.1").training.get_warmup_steps(1000) == 100
    assert parse().training.get_warmup_steps(1000) == 30
    assert parse("--warmup_ratio 0.1 --warmup_steps 7").training.get_warmup_steps(1000) == 7
    assert parse("--warmup_ratio 0").training.get_warmup_steps(1000) == 0


def test_logging_dir_is_where_the_tensorboard_log_goes(parse, tmp_path):
    from transformers import TrainerControl, TrainerState
    from transformers.integrations import TensorBoardCallback

    log = tmp_path / "my_log"
    training = parse(f"--report_to tensorboard --logging_dir {log}").training
    callback = TensorBoardCallback()
    callback.on_train_begin(training, TrainerState(is_world_process_zero=True), TrainerControl())
    callback.on_train_end(training, TrainerState(), TrainerControl())
    assert list(log.rglob("events.out.tfevents.*"))


def test_overwrite_output_dir(parse, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}")
    refused = message(parse, "")
    assert (
        "holds an earlier run" in refused and "--overwrite_output_dir" in refused and str(tmp_path / "run") in refused
    )
    assert parse("--overwrite_output_dir").training.overwrite_output_dir is True
    assert parse("--resume_from_checkpoint true").resume is True
    assert parse("--do_train False").training.do_train is False


def test_output_dir_that_is_a_file(parse, tmp_path):
    (tmp_path / "run").write_text("")
    assert "is a file" in message(parse, "--overwrite_output_dir")


def test_no_cuda(parse, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert parse().training.use_cpu is False
    assert parse("--no_cuda").training.use_cpu is True
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert parse().training.use_cpu is True


def test_per_gpu_batch_sizes(parse):
    training = parse("--per_gpu_train_batch_size 3 --per_gpu_eval_batch_size 5").training
    assert (training.per_device_train_batch_size, training.per_device_eval_batch_size) == (3, 5)


@pytest.mark.parametrize(("flag", "optimizer"), [("--adafactor", "adafactor"), ("--adam8bit", "adamw_bnb_8bit")])
def test_optimizers_by_a_switch(parse, flag, optimizer):
    assert parse(flag).training.optim == optimizer


def test_num_train_epochs_alone_takes_the_place_of_max_steps(parse):
    assert parse().training.max_steps == 10000
    training = parse("--num_train_epochs 3").training
    assert (training.max_steps, training.num_train_epochs) == (-1, 3)
    assert parse("--num_train_epochs=3").training.max_steps == -1
    assert parse("--num_train_epochs 3 --max_steps 50").training.max_steps == 50


# ------------------------------------------------------------------------------ early stop


@pytest.mark.parametrize(
    ("words", "calculate", "stop"),
    [("", True, False), ("--calculate_cs False", False, False), ("--early_stop", True, True)]
    + [("--early_stop --calculate_cs False", True, True), ("--early_stop False", True, False)],
)
def test_early_stop_switches_cs_on(parse, words, calculate, stop):
    chosen = parse(words).stop
    assert (chosen.calculate_cs, chosen.early_stop) == (calculate, stop)


@pytest.mark.parametrize("flag", ["--early_stop", "--calculate_cs"])
def test_full_finetune_with_cs_is_an_error_that_says_so(parse, flag):
    said = message(parse, f"--full_finetune --bits 16 {flag}")
    assert "--full_finetune" in said and "LoRA" in said and "--early_stop" in said


def test_full_finetune_alone_measures_no_cs_and_says_so(parse):
    settings = parse("--full_finetune --bits 16")
    assert settings.stop.calculate_cs is False
    assert any("CS is not measured" in notice for notice in settings.notices)
    assert parse("--full_finetune --bits 16 --calculate_cs False").notices == []
    assert parse().notices == []


def test_full_finetune_of_a_quantised_base(parse):
    assert "--bits 16" in message(parse, "--full_finetune")


def test_intervals_are_numbers_or_auto(parse):
    assert (parse().stop.cs_interval, parse().stop.window_size) == (None, None)
    chosen = parse("--cs_interval 4 --window_size auto").stop
    assert (chosen.cs_interval, chosen.window_size) == (4, None)


@pytest.mark.parametrize("bad", ["0", "-3", "2.5", "often"])
@pytest.mark.parametrize("name", ["cs_interval", "window_size"])
def test_bad_intervals(parse, name, bad):
    said = message(parse, f"--{name}={bad}")
    assert f"--{name} {bad}" in said and "auto" in said


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", sorted(REJECTED))
def test_dropped_flags_are_refused_by_name_with_a_reason(parse, parser, name):
    assert f"--{name} is not supported: {REJECTED[name]}" in message(parse, f"--{name} 1")
    assert name not in vars(parser.parse_args([]))


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("--learning_rte 1", "--learning_rate"), ("--earlystop", "--early_stop"), ("--window=5", "--window_size")]
    + [("--lora-rr=4", "--lora_r"), ("--cs_step 2", "--cs_steps")],
)
def test_unknown_flags_suggest_the_nearest(parse, flag, nearest):
    said = message(parse, flag)
    assert "is unknown" in said and f"did you mean {nearest}?" in said


def test_a_flag_like_no_other_gets_no_suggestion(parse):
    assert message(parse, "--qqqq 1") == "--qqqq is unknown"


def test_equals_sign_form(parse):
    settings = parse("--lora_r=8 --bits=16 --do_eval=True --cs_interval=3 --early_stop=True")
    assert (settings.training.lora_r, settings.training.bits, settings.training.do_eval) == (8, 16, True)
    assert (settings.stop.cs_interval, settings.stop.early_stop) == (3, True)


def test_all_unknown_flags_stand_in_one_message(parse):
    said = message(parse, "--learning_rte 1 --use_ipex --bitz 4")
    assert all(word in said for word in ("--learning_rte", "--use_ipex", "--bitz"))


BAD_VALUES = {
    "--bits 5": "choose 4, 8, 16 or 32",
    "--quant_type nf3": "choose nf4 or fp4",
    "--lora_r 0": "at least 1",
    "--lora_alpha 0": "above 0",
    "--lora_dropout 1": "below 1",
    "--lora_bias some": "none, all, lora_only",
    "--learning_rate 0": "above 0",
    "--mmlu_split train": "eval or test",
    "--mmlu_dataset mmlu": "mmlu-zs or mmlu-fs",
    "--source_max_len 0": "at least 1",
    "--target_max_len 0": "at least 1",
    "--stop_rule never": "second-valley",
    "--cs_reduction mean": "row or matrix",
    "--cs_component unet": "lm or all",
    "--snapshot_disk_gb 0": "above 0",
    "--cs_interval x": "or auto",
    "--remove_unused_columns True": "leave it out",
    "--save_safetensors False": "leave it out",
    "--per_device_train_batch_size 0": "at least 1",
    "--per_device_eval_batch_size 0": "at least 1",
    "--gradient_accumulation_steps 0": "at least 1",
    "--num_train_epochs 0": "above 0",
    "--max_eval_samples 0": "at least 1",
    "--max_new_tokens 0": "at least 1",
    "--weight_decay -1": "at least 0",
    "--max_grad_norm -1": "at least 0",
    "--save_steps 0": "above 0",
    "--top_p 0": "above 0",
    "--warmup_ratio 2": "below 1",
    "--num_beam_groups 2": "transformers has dropped",
    "--penalty_alpha 0.6": "transformers has dropped",
    "--diversity_penalty 0.5": "transformers has dropped",
}


@pytest.mark.parametrize("words", BAD_VALUES)
def test_bad_value(parse, words):
    said = message(parse, words)
    assert said.startswith(words) and BAD_VALUES[words] in said


def test_every_problem_stands_in_one_message(parse):
    said = message(parse, " ".join(BAD_VALUES))
    assert [words for words in BAD_VALUES if words not in said] == []
    assert "\n" not in said


def test_a_message_of_transformers_is_brought_into_one_line(parse):
    said = message(parse, "--load_best_model_at_end")
    assert "--load_best_model_at_end requires" in said and "\n" not in said


def test_half_precisions_exclude_each_other(parse):
    assert "fp16 and bf16" in message(parse, "--fp16 --bf16")


def test_a_word_where_a_number_belongs_exits_with_2_and_one_line(parse, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--lora_r many")
    assert caught.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "--lora_r" in said and "'many'" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "9" * 400])
def test_no_flag_takes_a_number_without_end(parse, capsys, text):
    """Every flag that reads a number, those of transformers too."""
    numeric = [action for action in build_parser()._actions if getattr(action.type, "__name__", "") == "read"]
    assert len(numeric) > 50
    for action in numeric:
        flag = action.option_strings[0]
        with pytest.raises(SystemExit) as ended:
            parse(f"{flag}={text}")
        said = capsys.readouterr().err.strip()
        assert ended.value.code == 2 and flag in said and len(said.splitlines()) == 1


def test_help_names_every_flag(parse, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert [name for name, _, _ in golden_flags() if f"--{name}" not in shown] == []
    assert "--early_stop" in shown and "--cs_steps" in shown and "turning point" in shown


def test_what_was_given_is_known_for_the_report(parse):
    given = parse("--bits 8 --lora_r 4").values(True)
    assert given["bits"] == 8 and given["lora_r"] == 4 and "lora_alpha" not in given


@pytest.mark.parametrize(
    ("text", "meaning"), [("true", True), ("True", True), ("false", None), ("none", None), ("a/b", "a/b")]
)
def test_resume_from_checkpoint(parse, text, meaning):
    assert parse(f"--resume_from_checkpoint {text}").resume == meaning
    assert parsing.parse_arguments(["--output_dir", "some-new-folder"]).resume is None
