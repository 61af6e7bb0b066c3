"""A run, complete before its first step: what trains, measures and saves, of the command line."""

import contextlib
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from accelerate.utils import set_seed

from base.attention import choose_attention, set_attention
from base.families import StableDiffusion
from base.files import weights_key
from base.memory import picture_bytes, refuse_batch
from base.random_state import untouched_random_state
from base.sampling import Prompt
from es_lora.gradient_evidence import GradientEvidence
from es_lora.monitor import EarlyStopMonitor
from es_lora.settings import MeasurementPlan
from images.batches import ImageBatches, build_datasets
from images.loader import StepLoader
from network.creation import make_network, network_notices
from network.folding import fold_base_weights
from network.full_unet import FullUnet
from network.lora import LoraNetwork
from network.metadata import FileFacts
from settings.bounds import MOST_STEPS
from training.checkpoints import CheckpointNames, WeightFiles
from training.logs import start_trackers
from training.objective import HeldOut, Objective
from training.optimizers import Optimization, is_schedule_free, make_optimizer
from training.previews import Previews, make_class_images, prompts_of
from training.processes import Processes
from training.schedulers import make_scheduler
from training.shadows import ShadowNetworks
from training.state import Progress, load_state, read_progress


@dataclass(frozen=True)
class Length:
    """How long a run is, in optimizer steps.
    steps_per_epoch: repeats, accumulation and processes counted in."""

    total_steps: int
    steps_per_epoch: int

    @property
    def total_epochs(self) -> int:
        return -(-self.total_steps // self.steps_per_epoch)


@dataclass(frozen=True)
class Run:
    """One training run, ready to start. args: the settings, with the seed that was drawn.

    first_step: completed steps when it begins. validation: None without held-out pictures.
    plan: None where CS is not measured.
    monitor: the first process's, which measures and decides; None on the others."""

    args: Namespace
    processes: Processes
    base: StableDiffusion
    network: LoraNetwork | FullUnet
    loader: StepLoader
    validation: Optional[HeldOut]
    objective: Objective
    optimization: Optimization
    length: Length
    progress: Progress
    first_step: int
    files: WeightFiles
    previews: Previews
    shadows: Optional[ShadowNetworks]
    plan: Optional[MeasurementPlan]
    monitor: Optional[EarlyStopMonitor]


def set_up(args: Namespace, family: type[StableDiffusion] = StableDiffusion) -> Run:
    """The run of these settings. family: kind of base. Raises ValueError / FileNotFoundError."""
    prompts, processes = prompts_of(args), Processes(args)
    resumed = read_progress(args.resume) if args.resume else None
    args.seed = resumed.seed if resumed else processes.agreed_seed(args.seed)
    set_seed(args.seed)
    if args.num_class_images:
        make_class_images(args, family, processes)
    batches, held_out = build_datasets(args, processes.count)
    processes.check_same("training pictures and captions", batches.described())
    loader = StepLoader(args, batches, processes.count, processes.rank)
    length = length_of(args, len(loader))
    progress = progress_of(args, length, resumed)
    base = family(args, processes.weight_dtype)
    base.check(batches)
    parts = [part for part in (batches, held_out) if part is not None]
    refuse_beyond_memory(args, base, batches, processes)
    processes.say(*network_notices(args), *base.notices(parts, [prompt.prompt for prompt in prompts]))
    fold_base_weights(args, base.model)
    network, network_args = make_network(args, base.model)
    objective = Objective(args, base, processes, trains_text=any(part.startswith("te") for part in network.components))
    place_model(objective, network)
    fill_caches(objective, parts, prompts)
    optimization = make_optimization(args, network, length, processes)
    if is_schedule_free(optimization.raw):
        args.stop = args.stop.without_average(f"--optimizer_type {args.optimizer_type}")
    plan = args.stop.plan(network.components, len(loader), length.total_steps) if args.stop.calculate_cs else None
    shadows = None
    if args.stop.shadow_count:
        if args.network_weights:
            processes.say("shadows start from --network_weights; what that LoRA was trained on is not new to them")
        shadows = ShadowNetworks(objective, network, batches, len(loader) / plan.cs_interval)
    validation = None
    if held_out is not None:
        validation = HeldOut(objective, network, optimization, held_out, args.max_validation_steps)
    columns = columns_of(plan, shadows, validation)
    if resumed:
        load_state(args.resume, processes, network, optimization, shadows)
    elif processes.rank:
        torch.manual_seed(args.seed + processes.rank)  # dropouts differ between processes
    facts = file_facts(objective, network_args, loader, length, optimization)
    run = Run(
        args=args,
        processes=processes,
        base=base,
        network=network,
        loader=loader,
        validation=validation,
        objective=objective,
        optimization=optimization,
        length=length,
        progress=progress,
        first_step=progress.step,
        files=WeightFiles(CheckpointNames(args, length.total_epochs), base.model, facts),
        previews=Previews(args, prompts, objective, network, optimization),
        shadows=shadows,
        plan=plan,
        monitor=make_monitor(objective, plan, network, loader, columns) if plan and processes.is_main else None,
    )
    with untouched_random_state():
        start_trackers(processes.accelerator, args)
    return run


def length_of(args: Namespace, steps_per_epoch: int) -> Length:
    """--max_train_epochs, or else --max_train_steps. Raises ValueError for more than can be."""
    total_steps = args.max_train_epochs * steps_per_epoch if args.max_train_epochs else args.max_train_steps
    if total_steps > MOST_STEPS:
        raise ValueError(
            f"--max_train_epochs {args.max_train_epochs} of {steps_per_epoch} steps are {total_steps} steps, more than "
            f"{MOST_STEPS}; give {MOST_STEPS // steps_per_epoch} at most"
        )
    return Length(total_steps, steps_per_epoch)


def progress_of(args: Namespace, length: Length, resumed: Optional[Progress]) -> Progress:
    """Where the run begins: where it was saved, or as --initial_step and --initial_epoch say.

    A state at the end of its budget is one that only has to finish. Raises ValueError where the
    state is one of other data or beyond the budget, and where the flags leave nothing to train."""
    per_epoch = length.steps_per_epoch
    if resumed and resumed.steps_per_epoch != per_epoch:
        raise ValueError(
            f"--resume {args.resume}: that run had {resumed.steps_per_epoch} steps an epoch, this one has "
            f"{per_epoch}: use the same images, batch size and accumulation"
        )
    start = args.initial_step or (args.initial_epoch - 1 if args.initial_epoch else 0) * per_epoch
    progress = resumed or Progress(
        args.seed, per_epoch, start if args.skip_until_initial_step else start - start % per_epoch
    )
    if progress.step > length.total_steps or (resumed is None and progress.step == length.total_steps):
        raise ValueError(
            f"nothing left to train: {progress.step} of {length.total_steps} steps are done; raise "
            "--max_train_steps or --max_train_epochs"
        )
    return progress


def refuse_beyond_memory(args: Namespace, base: StableDiffusion, batches: ImageBatches, processes: Processes) -> None:
    """Raise ValueError where the batches certainly take more memory than there is."""
    for dataset in batches.datasets:
        for (width, height), indices in dataset.buckets.items():
            trained, encoded = (picture_bytes(base.model, width, height, trained) for trained in (True, False))
            count = min(dataset.settings.batch_size, len(indices))
            refuse_batch("--train_batch_size", count, trained if args.cache_latents else encoded, processes.device)
            if args.cache_latents:
                refuse_batch("--vae_batch_size", min(args.vae_batch_size, len(indices)), encoded, processes.device)


def make_optimization(
    args: Namespace, network: LoraNetwork | FullUnet, length: Length, processes: Processes
) -> Optimization:
    """The optimizer and the schedule of the command line over the network's weights."""
    optimizer = make_optimizer(args, network.parameter_groups(args.learning_rate, args.unet_lr, args.text_encoder_lr))
    return Optimization.of(processes.accelerator, optimizer, make_scheduler(args, optimizer, length.total_steps))


def place_model(objective: Objective, network: LoraNetwork | FullUnet) -> None:
    """Put model and network on the device in their precisions; attention, checkpointing."""
    args, model, processes = objective.args, objective.base.model, objective.processes
    device, dtype = processes.device, processes.weight_dtype
    set_attention(model.unet, choose_attention(args, device))
    model.unet.to(device)
    for encoder in model.text_encoders:
        encoder.to(device)
        if args.gradient_checkpointing and objective.trains_text:
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            encoder.train()  # transformers checkpoints in training mode only
    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    whole_vae = args.no_half_vae or args.train_full_unet  # the latter saves it beside the U-Net
    model.vae.to(device, torch.float32 if whole_vae else dtype)
    network.to(device, dtype if args.full_fp16 or args.full_bf16 else torch.float32)


def fill_caches(objective: Objective, batches: list[ImageBatches], prompts: list[Prompt]) -> None:
    """Encode once what does not change from epoch to epoch, as far as that is asked for."""
    texts = [text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt)]
    objective.base.cache_text(batches, texts, objective.processes.accelerator)
    if objective.args.cache_latents:
        cache_latents(objective, batches)


def cache_latents(objective: Objective, batches: list[ImageBatches]) -> None:
    """Encode every picture once; the VAE leaves the device afterwards (not with --highvram)."""
    args, base, processes = objective.args, objective.base, objective.processes

    def encode(pixels):
        return base.encode_images(pixels, torch.Generator().manual_seed(args.seed)).cpu()

    key, to_disk = weights_key(base.model.vae), args.cache_latents_to_disk
    for part in batches:  # the first process writes the files
        with processes.accelerator.main_process_first() if to_disk else contextlib.nullcontext():
            part.cache_latents(encode, key, to_disk=to_disk, batch_size=args.vae_batch_size, write=processes.is_main)
    if not args.highvram:
        base.model.vae.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def columns_of(
    plan: Optional[MeasurementPlan], shadows: Optional[ShadowNetworks], validation: Optional[HeldOut]
) -> dict[str, Callable[[], Optional[float]]]:
    """{name: function} of what is recorded beyond the usual measurements.
    Raises ValueError where the rule decides on held-out pictures and there are none."""
    columns = {} if shadows is None else {shadows.training.column: shadows.score}
    if plan is not None and plan.stop.needs_heldout:
        if validation is None:
            raise ValueError(
                f"--stop_rule {plan.stop.stop_rule} decides on held-out pictures: add --validation_split, or choose a "
                "rule that needs none"
            )
        columns["heldout_loss"] = validation.loss
    return columns


def make_monitor(
    objective: Objective,
    plan: MeasurementPlan,
    network: LoraNetwork,
    loader: StepLoader,
    columns: dict[str, Callable[[], Optional[float]]],
) -> EarlyStopMonitor:
    """The monitor over the network's live layers, its history in --output_dir; says its plan."""
    args, processes = objective.args, objective.processes
    total_steps = length_of(args, len(loader)).total_steps
    header = {"trainer": objective.base.program, "seed": args.seed, "total_steps": total_steps}
    monitor = EarlyStopMonitor(
        args.output_dir,
        plan,
        network.layers(),
        network.tensors,
        header=header,
        resume_from=args.resume,
        evidence=GradientEvidence(network.tensors().values(), len(loader.batches) / processes.count),
        columns=columns,
    )
    processes.say(f"CS every {plan.cs_interval} steps, window {plan.window}, rule {plan.stop.stop_rule}", *plan.notices)
    if plan.average:
        processes.say(f"an average of the weights is kept, of width {plan.average:g} (--average 0: single steps)")
    if monitor.snapshots.every > 1:
        processes.say(f"snapshots of every {monitor.snapshots.every}th measurement fit into --snapshot_disk_gb")
    return monitor


def file_facts(
    objective: Objective, network_args: dict[str, Any], loader: StepLoader, length: Length, optimization: Optimization
) -> FileFacts:
    """What every file of the run says of its training."""
    args, optimizer = objective.args, type(optimization.raw)
    training = {
        "session_id": args.seed,
        "training_started_at": time.time(),
        "output_name": args.output_name,
        "optimizer": f"{optimizer.__module__}.{optimizer.__name__}({','.join(args.optimizer_args or [])})",
        "num_epochs": length.total_epochs,
        "max_train_steps": length.total_steps,
        "seed": args.seed,
    }
    return FileFacts(
        settings=vars(args),
        base=objective.base.model.base_hashes,
        network_args=network_args,
        data=loader.batches.metadata(),
        training=training,
        steps_per_epoch=length.steps_per_epoch,
        minimum=args.no_metadata,
    )
