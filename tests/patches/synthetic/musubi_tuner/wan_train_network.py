"""The script that a person runs, at the top of the miniature."""

from musubi_tuner.training.parser_common import setup_parser_common
from musubi_tuner.training.trainer_base import NetworkTrainer

if __name__ == "__main__":
    NetworkTrainer().train(setup_parser_common().parse_args())
