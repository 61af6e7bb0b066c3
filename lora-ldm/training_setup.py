"""What a run needs before its first step, each made from the command line's settings: accelerator, network, loaders."""

import contextlib
import datetime
import hashlib
import os
import signal
import time
from pathlib import Path

import toml
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.utils.data import DataLoader, Sampler
from training_optimizers import key_values

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(args):
    """The accelerate.Accelerator of the run. Raises ValueError for a precision that the device does not have."""
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--mixed_precision fp16 needs a GPU; use no or bf16 on a CPU")
    handlers = [InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=args.ddp_timeout))] if args.ddp_timeout else []
    trackers = {"all": ["tensorboard", "wandb"], None: None}.get(args.log_with, [args.log_with])
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    accelerator = Accelerator(
        cpu=on_cpu,  # said outright, several processes on a CPU find each other
        mixed_precision=args.mixed_precision,
        log_with=trackers,
        project_dir=_logging_folder(args) if trackers else None,
        kwargs_handlers=handlers,
    )
    if args.full_fp16:
        _allow_fp16_gradients(accelerator)
    return accelerator


def _logging_folder(args):
    """kohya's layout: a folder a run, named by its time, inside --logging_dir."""
    stamp = time.strftime("%Y%m%d%H%M%S", time.localtime())
    return os.path.join(args.logging_dir or os.path.join(args.output_dir, "logs"), f"{args.log_prefix or ''}{stamp}")


def _allow_fp16_gradients(accelerator):
    """torch's scaler refuses gradients in fp16 unless told that this is meant (--full_fp16)."""
    unscale = accelerator.scaler._unscale_grads_
    accelerator.scaler._unscale_grads_ = lambda *words: unscale(*words[:3], True)


def start_trackers(accelerator, args):
    """Open TensorBoard and wandb where they were asked for."""
    if not accelerator.log_with:
        return
    init = toml.load(args.log_tracker_config) if args.log_tracker_config else {}
    if args.log_with in ("wandb", "all"):
        import wandb

        if args.wandb_api_key:
            wandb.login(key=args.wandb_api_key)
        if args.wandb_run_name:
            init.setdefault("wandb", {})["name"] = args.wandb_run_name
    secret = ("wandb_api_key", "huggingface_token")
    plain = {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in vars(args).items()}
    config = {key: value for key, value in plain.items() if key not in secret} if args.log_config else None
    accelerator.init_trackers(args.log_tracker_name or "network_train", config=config, init_kwargs=init)


def choose_attention(args, device):
    """kohya's switches; without one, the fastest of the device: PyTorch's fused attention, or the plain one on a CPU."""
    if args.xformers:
        return "xformers"
    if args.mem_eff_attn:
        return "sliced"
    return "sdpa" if args.sdpa or device.type != "cpu" else "plain"


def network_from_arguments(args, model, make_lora, make_lycoris):
    """The network of --network_module, put into the model. make_*: functions that create either kind."""
    train_unet = not args.network_train_text_encoder_only and _rate(args.unet_lr, args.learning_rate) != 0
    text_rates = args.text_encoder_lr if isinstance(args.text_encoder_lr, list) else [args.text_encoder_lr]
    train_text = not args.network_train_unet_only and any(_rate(rate, args.learning_rate) for rate in text_rates)
    if not (train_unet or train_text):
        raise ValueError("nothing to train: the learning rates of the U-Net and of the text encoder are both 0")
    common = dict(
        rank=args.network_dim,
        alpha=args.network_alpha,
        dropout=args.network_dropout or 0.0,
        train_unet=train_unet,
        train_text_encoder=train_text,
        weights=args.network_weights,
    )
    if args.network_module == "networks.lora":
        from lora_network import parse_network_args

        extra = parse_network_args(args.network_args)
        return make_lora(model, **common, **extra, dim_from_weights=args.dim_from_weights), key_values(args.network_args)
    if args.network_module == "lycoris.kohya":
        settings = {"network_args": args.network_args, "dim_from_weights": args.dim_from_weights}
        return make_lycoris(model, **common, **settings), key_values(args.network_args)
    raise ValueError(f"--network_module {args.network_module} is not supported: networks.lora or lycoris.kohya")


def _rate(own, common):
    return common if own is None else own


def weights_key(*networks):
    """Names a VAE or text encoders by their weights, so that what was cached with others is noticed."""
    digest = hashlib.sha256()
    weights = [item for network in networks for item in network.state_dict().items()]
    for name, value in sorted(weights, key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else b"")
    return digest.hexdigest()[:16]


class Order(Sampler):
    """Indices that are set anew before each epoch; the loader, and workers that persist, stay the same."""

    def __init__(self):
        self.indices = []

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


def make_loader(args, batches, latents_in_memory):
    """(DataLoader, its Order). Workers only where there is something to decode or to read."""
    workers = 0 if latents_in_memory else min(args.max_data_loader_n_workers, os.cpu_count() or 1)
    order = Order()
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        persistent_workers=bool(workers and args.persistent_data_loader_workers),
        generator=torch.Generator(),  # or it would draw from the random state of training
    )
    return loader, order


def step_indices(batch_count, processes, rank, accumulation):
    """The batch indices of each optimizer step of an epoch, for one process: a list of lists.

    Batches are dealt out in turn; where they do not come out even, the first ones are used again, so that all processes
    have the same number of steps. The last step of an epoch may have fewer micro-batches.
    """
    own_count = -(-batch_count // processes)
    own = [(i * processes + rank) % batch_count for i in range(own_count)]
    return [own[start : start + accumulation] for start in range(0, own_count, accumulation)]


def picture_name(key):
    """folder/file of an image: the same on every machine."""
    path = Path(key)
    return f"{path.parent.name}/{path.name}"


@contextlib.contextmanager
def signals_noted(trainer):
    """Ctrl-C and SIGTERM set trainer.interrupted, which ends the run after the present step; a second one, at once."""

    def note(_number, _frame):
        trainer.interrupted = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
