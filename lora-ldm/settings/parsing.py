"""The command line of the diffusion trainers: kohya's flags and meanings, plus early stopping.

A flag that exists there and is not supported here is declared too, and refused by name with the
reason (see checks.REJECTED): nothing is accepted and then ignored."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import toml

from es_lora.command_line import nearest
from es_lora.settings import stop_values
from settings.checks import REJECTED, collect_problems, complete
from settings.flags import USUAL, Parser, build_parser
from settings.kohya_gui import own_words
from settings.toml_files import read_toml

NOT_IN_CONFIG_FILE = ("config_file", "output_config", "wandb_api_key", "huggingface_token")


def parse_arguments(argv: Optional[Sequence[str]] = None, sdxl: bool = False) -> argparse.Namespace:
    """The checked settings of a run, an argparse.Namespace; `stop`: those of early stopping.

    argv: words, or None for sys.argv. A --config_file gives values that they override.
    sdxl: with the flags of es_lora_sdxl.py.
    Raises ValueError with one line per problem (unknown flag or key, unsupported flag,
    contradiction, missing file). With --output_config the settings that differ from the defaults
    are written to --config_file; SystemExit(0) follows."""
    parser = build_parser(sdxl)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [_unknown(word, parser) for word in unknown if word.startswith("-")]
        raise ValueError("\n".join(flags) or f"unexpected words {' '.join(unknown)}: quote values that contain spaces")
    if args.config_file and args.output_config:
        write_config(parser, args)
        raise SystemExit(0)
    if args.output_config:
        raise ValueError("--output_config needs --config_file FILE.toml: the file that is to be written")
    if args.config_file:
        has_length = args.max_train_epochs or args.max_train_steps != parser.get_default("max_train_steps")
        parser.set_defaults(**read_config(parser, args.config_file, bool(has_length)))
        args = parser.parse_args(argv)
    stop, problems = USUAL.given(stop_values(args))
    problems = collect_problems(args, stop, build_parser(sdxl)) + problems  # a file changes the parser's defaults
    if problems:
        raise ValueError("\n".join(problems))
    return complete(args, stop)


def read_config(parser: Parser, path: Union[str, Path], has_length: bool = False) -> dict[str, Any]:
    """{flag: value} of a TOML file; sections only group flags. Every problem is collected first.
    has_length: the command line says how long to train."""
    path = Path(path) if Path(path).is_file() else Path(path if str(path).endswith(".toml") else f"{path}.toml")
    flat, problems = {}, []
    actions = {action.dest: action for action in parser._actions if action.dest not in ("config_file", "output_config")}
    for key, value in read_toml(path, "--config_file").items():
        flat.update(value if isinstance(value, dict) else {key: value})
        if isinstance(value, dict) and key in actions:
            problems.append(f"{key} is a section: give the setting a value, or the section another name")
    flat = own_words(flat, set(actions), problems, sdxl=parser.get_default("sdxl"), has_length=has_length)
    for key, value in flat.items():
        if key not in actions:
            problems.append(f"unknown key '{key}'{nearest(key, actions)}")
            continue
        try:
            flat[key] = _value_from_config(actions[key], value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            problems.append(f"{key} = {value!r} is not accepted: {error}")
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    return flat


def write_config(parser: Parser, args: argparse.Namespace) -> None:
    """Write the settings that differ from defaults to args.config_file, which must be new."""
    path = Path(args.config_file if args.config_file.endswith(".toml") else f"{args.config_file}.toml")
    if path.exists():
        raise ValueError(f"--output_config would overwrite {path}; name a file that does not exist")
    chosen = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in NOT_IN_CONFIG_FILE and value != parser.get_default(key)
    }
    path.write_text(toml.dumps(chosen), encoding="utf-8")
    print(f"settings written to {path}; use them with --config_file {path}")


def _value_from_config(action, value):
    """`value` as the command line would have given it; ValueError where it would refuse it."""
    many = action.nargs in ("*", "+")
    values = value if isinstance(value, list) else [value]
    if isinstance(action, argparse._StoreTrueAction):
        if action.dest not in REJECTED and value not in (True, False):  # 1 and 0 are equal to them
            raise ValueError("true or false is expected")
        return bool(value)
    if not many and isinstance(value, list):
        raise ValueError("one value is expected, not a list")
    for item in values:
        if isinstance(item, bool) and action.nargs != "?":
            raise ValueError("a value is expected, not true or false")
    values = [int(v) if isinstance(v, float) and action.type is int and v.is_integer() else v for v in values]
    values = [action.type(str(item)) if action.type else str(item) for item in values]
    for item in values:
        if action.choices and item not in action.choices:
            raise ValueError(f"choose from {', '.join(str(choice) for choice in action.choices if choice)}")
    return values if many else values[0]


def _unknown(word, parser):
    flags = [flag for action in parser._actions for flag in action.option_strings]
    return f"unknown flag {word}{nearest(word.split('=')[0], flags)}"
