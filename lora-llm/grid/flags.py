"""The flags of judge_checkpoints.py that only answers have."""

from argparse import ArgumentParser

from es_lora.inputs.bounds import number, whole


def add_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("answers of the grid", "without --seeds the likeliest token is taken")
    add = group.add_argument
    add("--max_new_tokens", type=whole(1, 100_000), default=128, help="longest answer in tokens (default: %(default)s)")
    add("--temperature", type=number(100), default=1.0, help="of the sampling with --seeds (default: %(default)s)")
    add("--bits", type=int, choices=(4, 8, 16, 32), help="the base's bits (default: as in training)")
    add("--prompt_as", choices=("chat", "plain"), help="how a prompt goes in (default: as in training)")
