"""The flags of judge_checkpoints.py that only pictures have."""

from argparse import ArgumentParser

from es_lora.inputs.bounds import whole


def add_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("pictures of the grid", "size, steps, guidance: on the lines of the prompt file")
    add = group.add_argument
    add("--encoder", help="image encoder (CLIP, DINOv2): a folder or hub name (default: the latents of the base's VAE)")
    add("--v2", action="store_true", help="the base is SD 2.x")
    add("--v_parameterization", action="store_true", help="the base predicts velocity")
    add("--clip_skip", type=whole(1, 12), help="layers of the text encoder that are left out, as in training")
