"""The miniature's flags, in a file of their own as musubi-tuner's are."""

import argparse


def setup_parser_common():
    parser = argparse.ArgumentParser()
    for name, kind, default in (
        ("seed", int, 0), ("network_dim", int, 2), ("network_alpha", float, 1.0), ("learning_rate", float, 0.02),
        ("batches", int, 8), ("max_train_steps", int, 40), ("save_every_n_steps", int, None),
        ("output_dir", str, "out"), ("output_name", str, "lora"), ("gradient_accumulation_steps", int, 1),
        ("resume", str, None), ("network_module", str, "networks.lora_wan"), ("optimizer_type", str, "AdamW"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--save_state", action="store_true")
    return parser
