"""The network that --network_module and its arguments ask for, put into the model."""

from argparse import Namespace
from typing import Any

from base.sd import SDModel
from network.full_unet import FullUnet
from network.lora import create_network
from settings.network_args import BLOCK_LISTS, parse_network_args


def make_network(args: Namespace, model: SDModel) -> tuple[Any, dict]:
    """(what is trained, in the model; --network_args as {name: text})."""
    if args.train_full_unet:
        return FullUnet(model.unet), {}
    train_unet = not args.network_train_text_encoder_only and _rate(args.unet_lr, args.learning_rate) != 0
    text_rates = args.text_encoder_lr if isinstance(args.text_encoder_lr, list) else [args.text_encoder_lr]
    train_text = not args.network_train_unet_only and any(_rate(rate, args.learning_rate) for rate in text_rates)
    common = dict(
        rank=args.network_dim,
        alpha=args.network_alpha,
        dropout=args.network_dropout or 0.0,
        train_unet=train_unet,
        train_text_encoder=train_text,
        weights=args.network_weights,
    )
    if args.network_module == "networks.lora":
        read = parse_network_args(args.network_args, model.is_sdxl)
        network = create_network(model, **common, **read.options, dim_from_weights=args.dim_from_weights)
        return network, _texts(args.network_args)
    if args.network_module == "lycoris.kohya":
        from network.lycoris_network import create_lycoris_network

        settings = {"network_args": args.network_args, "dim_from_weights": args.dim_from_weights}
        return create_lycoris_network(model, **common, **settings), _texts(args.network_args)
    raise ValueError(f"--network_module {args.network_module} is not supported: networks.lora or lycoris.kohya")


def network_notices(args: Namespace) -> list[str]:
    """What --network_args do other than they seem to, in sentences."""
    if args.network_module == "lycoris.kohya" and not args.train_full_unet:
        return _lycoris_notices(_texts(args.network_args))
    if args.network_module != "networks.lora" or args.train_full_unet:
        return []
    read = parse_network_args(args.network_args, args.sdxl)
    sized = [
        f"--network_args {name}: --dim_from_weights takes ranks and alphas from the file instead"
        for name in BLOCK_LISTS
        if args.dim_from_weights and name in _texts(args.network_args)
    ]
    return read.notices + sized


def _lycoris_notices(words):
    """Of a DoRA whose file other programs apply otherwise than it was trained (loaders.md)."""
    if words.get("dora_wd", "").lower() != "true" or words.get("wd_on_output", "").lower() == "false":
        return []
    return [
        "--network_args dora_wd=True: its magnitudes are of outputs, as LyCORIS has them by default. ComfyUI applies "
        "them nearly, AUTOMATIC1111 wrongly; add wd_on_output=False, which both apply as it was trained"
    ]


def _texts(words):
    return dict(word.split("=", 1) for word in words or [])


def _rate(own, common):
    return common if own is None else own
