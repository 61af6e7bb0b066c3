"""The command line: kohya's names and defaults, refusals by name, TOML, and every problem at
once."""

import ast
import re
from pathlib import Path

import pytest
import toml

from settings.checks import REJECTED, REJECTED_CHOICES
from settings.flags import build_parser
from settings.parsing import parse_arguments

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
# Defaults that a newer upstream revision changed: the newest one counts.
NEWEST = "sd_scripts_train_network_flags_v0.10.1.txt"


@pytest.fixture
def needed(tmp_path):
    """The words every run needs, with folders that exist."""
    (tmp_path / "base").mkdir()
    (tmp_path / "images" / "2_cat").mkdir(parents=True)
    return [
        "--pretrained_model_name_or_path",
        str(tmp_path / "base"),
        "--train_data_dir",
        str(tmp_path / "images"),
        "--output_dir",
        str(tmp_path / "out"),
        "--resolution",
        "64",
    ]


def golden_flags():
    for file in sorted(GOLDEN.glob("sd_scripts_train_network_flags_*.txt")):
        for line in file.read_text().splitlines():
            yield pytest.param(file.name, line, id=f"{file.stem[-8:]}:{line.split()[0]}")


def golden_facts(line):
    """(flag, {type, default, choices, nargs, action}) of one golden line."""
    flag, _, rest = line.partition(" ")
    facts = dict(re.findall(r"(type|default|nargs|action|choices)=(\[.*?\]|'.*?'|\S+)", rest))
    return flag, {key: value if key == "type" else ast.literal_eval(value) for key, value in facts.items()}


@pytest.mark.parametrize("file, line", list(golden_flags()))
def test_flag_is_upstreams(file, line):
    flag, facts = golden_facts(line)
    action = next((action for action in build_parser()._actions if flag in action.option_strings), None)
    assert action is not None, f"{flag} is neither supported nor refused by name"
    if facts.get("action") == "store_true":
        assert action.nargs == 0 and action.default is False
        return
    assert action.default == facts.get("default")
    assert action.nargs == facts.get("nargs") or file != NEWEST
    if facts.get("choices"):
        allowed = set(action.choices) | set(REJECTED_CHOICES.get(action.dest, ()))
        assert set(facts["choices"]) <= allowed
    words = {"int": "3", "float": "0.25", "int_or_float": "0.25", "str": "word", "Path": "word"}
    if facts["type"] in words and not facts.get("choices"):
        value = words[facts["type"]]
        if not (file != NEWEST and facts["type"] == "int"):
            assert str(action.type(value)) == value


@pytest.mark.parametrize("name", REJECTED)
def test_refused_by_name(needed, name):
    takes_value, reason = REJECTED[name]
    value = {
        "zero_stage": ["3"],
        "dynamo_backend": ["eager"],
        "offload_optimizer_device": ["cpu"],
        "offload_param_device": ["cpu"],
    }.get(name, ["x"] if takes_value else [])
    with pytest.raises(ValueError, match=f"--{name} is not supported") as error:
        parse_arguments([*needed, f"--{name}", *value])
    assert reason in str(error.value)


def test_defaults_follow_kohya(needed):
    args = parse_arguments(needed)
    assert (args.learning_rate, args.max_train_steps, args.network_alpha, args.lr_scheduler) == (
        2e-6,
        1600,
        1,
        "constant",
    )
    assert (args.optimizer_type, args.save_model_as, args.output_name) == ("AdamW", "safetensors", "last")
    stop = args.stop.as_flags()
    assert stop["calculate_cs"] is False and stop["early_stop"] is False and stop["cs_reduction"] == "matrix"
    assert (stop["cs_interval"], stop["window_size"], stop["snapshot_disk_gb"]) == ("auto", "auto", 20.0)


def test_early_stop_flags(needed):
    assert parse_arguments([*needed, "--early_stop"]).stop.calculate_cs is True
    stop = parse_arguments([*needed, "--calculate_cs", "--cs_steps", "7", "--window_size", "auto"]).stop
    assert (stop.calculate_cs, stop.early_stop, stop.cs_interval, stop.window_size) == (True, False, 7, None)
    assert parse_arguments([*needed, "--calculate_cs", "False"]).stop.calculate_cs is False
    with pytest.raises(ValueError, match="--calculate_cs perhaps: give True or False"):
        parse_arguments([*needed, "--calculate_cs", "perhaps"])


def test_unknown_flag_names_the_nearest(needed):
    with pytest.raises(ValueError, match="unknown flag --netwrok_dim; did you mean --network_dim"):
        parse_arguments([*needed, "--netwrok_dim", "8"])


def test_every_problem_is_reported_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        parse_arguments(
            [
                "--train_data_dir",
                str(tmp_path / "none"),
                "--deepspeed",
                "--full_fp16",
                "--network_dim",
                "0",
                "--caption_dropout_rate",
                "1.5",
                "--xformers",
                "--sdpa",
            ]
        )
    message = str(error.value)
    for part in (
        "--pretrained_model_name_or_path is missing",
        "there is no such folder",
        "--deepspeed is not supported",
        "--full_fp16 needs --mixed_precision fp16",
        "--network_dim 0",
        "--caption_dropout_rate 1.5",
        "--xformers and --sdpa cannot",
        "--output_dir is missing",
        "--resolution is missing",
    ):
        assert part in message


def test_nan_is_refused(needed):
    with pytest.raises(ValueError, match="--learning_rate nan"):
        parse_arguments([*needed, "--learning_rate", "nan"])


def test_config_file_is_flattened_and_overridden(needed, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        toml.dumps(
            {
                "network_dim": 8,
                "training": {"learning_rate": "1e-3", "flip_aug": True, "unet_lr": 1},
                "optimizer": {"optimizer_args": ["weight_decay=0.1"], "text_encoder_lr": 5e-5},
            }
        )
    )
    args = parse_arguments([*needed, "--config_file", str(config)[:-5], "--network_dim", "16"])
    assert (args.network_dim, args.learning_rate, args.flip_aug) == (16, 1e-3, True)
    assert (args.optimizer_args, args.text_encoder_lr, args.unet_lr) == (["weight_decay=0.1"], 5e-5, 1.0)


def test_config_file_problems_are_collected(needed, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text('network_dm = 8\nflip_aug = "yes"\nmixed_precision = "fp8"\nseed = "seven"\n')
    with pytest.raises(ValueError) as error:
        parse_arguments([*needed, "--config_file", str(config)])
    for part in (
        "unknown key 'network_dm'; did you mean network_dim?",
        "flip_aug = 'yes'",
        "mixed_precision = 'fp8'",
        "choose from no, fp16, bf16",
        "seed = 'seven'",
    ):
        assert part in str(error.value)
    config.write_text("a = = 3")
    with pytest.raises(ValueError, match="not valid TOML"):
        parse_arguments([*needed, "--config_file", str(config)])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        parse_arguments([*needed, "--config_file", str(tmp_path / "other")])


def test_output_config_round_trips(needed, tmp_path, capsys):
    words = [
        *needed,
        "--network_dim",
        "8",
        "--optimizer_args",
        "a=1",
        "b=2",
        "--flip_aug",
        "--early_stop",
        "--cs_steps",
        "3",
    ]
    with pytest.raises(SystemExit) as stop:
        parse_arguments([*words, "--output_config", "--config_file", str(tmp_path / "saved")])
    assert stop.value.code == 0 and "saved.toml" in capsys.readouterr().out
    again = parse_arguments(["--config_file", str(tmp_path / "saved.toml")])
    again.config_file = None
    assert vars(again) == vars(parse_arguments(words))
    with pytest.raises(ValueError, match="would overwrite"):
        parse_arguments([*words, "--output_config", "--config_file", str(tmp_path / "saved")])


def test_kohya_spelling_and_disk_cache(needed):
    args = parse_arguments([*needed, "--caption_extention", ".txt", "--cache_latents_to_disk", "--use_8bit_adam"])
    assert (args.caption_extension, args.cache_latents, args.optimizer_type) == (".txt", True, "AdamW8bit")
