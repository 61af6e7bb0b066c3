"""Pictures that a run makes: previews of its prompts, DreamBooth's class pictures if missing."""

import itertools
import logging
from argparse import Namespace
from pathlib import Path
from typing import Optional

import torch

from base.families import StableDiffusion
from base.sampling import Prompt, Sampler, read_prompts
from es_lora.files import read_text
from images.dataset_settings import checked_resolution
from images.folders import image_files, is_leaf, repeat_folders
from network.full_unet import FullUnet
from network.lora import LoraNetwork
from training.objective import Objective
from training.optimizers import Optimization
from training.processes import Processes

logger = logging.getLogger(__name__)
PREVIEW_FOLDER = "sample"
CLASS_FOLDER = "1_class"  # made where --reg_data_dir has no <repeats>_<name> folder yet


def prompts_of(args: Namespace) -> list[Prompt]:
    """Those of --sample_prompts. Raises ValueError for a file that cannot be read.

    An empty file makes no previews: kohya_ss's GUI writes one where none are wanted."""
    if args.sample_prompts and not read_text(args.sample_prompts).strip():
        logger.warning("--sample_prompts %s is empty: no previews are made", args.sample_prompts)
        return []
    return read_prompts(args.sample_prompts) if args.sample_prompts else []


class Previews:
    """Pictures of the prompts with the present weights. Random states stay as they are."""

    def __init__(
        self,
        args: Namespace,
        prompts: list[Prompt],
        objective: Objective,
        network: LoraNetwork | FullUnet,
        optimization: Optimization,
    ):
        self.args, self.prompts, self.objective = args, prompts, objective
        self.network, self.optimization = network, optimization

    def save(self, part: str) -> list[tuple[Prompt, Path]]:
        """One picture a prompt, named by the run and this part; the first process makes them."""
        args, processes = self.args, self.objective.processes
        if not self.prompts or not processes.is_main:
            return []
        self.network.eval()
        with torch.no_grad(), self.optimization.weights_to_use(), processes.accelerator.autocast():
            model, encode_text = self.objective.base.model, self.objective.encode_text
            sampler = Sampler(model, encode_text, sampler=args.sample_sampler, device=processes.device)
            folder = Path(args.output_dir) / PREVIEW_FOLDER
            made = sampler.save_pictures(self.prompts, folder, f"{args.output_name}{part}", args.seed)
        self.network.train()
        return made

    def compared(self, kinds: list[tuple[str, str, Optional[dict[str, torch.Tensor]]]]) -> list[tuple[str, Path]]:
        """The same prompts and seeds, other weights: [(caption, path)], a prompt's side by side.

        kinds: (caption, part of the file name, tensors of the network or None: the live ones).
        Pictures without LoRA come first; the live weights are as before afterwards."""
        if not self.prompts:
            return []
        network = self.network
        live = {name: tensor.detach().clone() for name, tensor in network.tensors().items()}
        rows = []
        for caption, part, tensors in [("no LoRA", "-base", None), *kinds]:
            network.load_tensors(live if tensors is None else tensors)
            network.multiplier = 0.0 if caption == "no LoRA" else 1.0
            rows += [[(f"{caption}: {prompt.prompt} (seed {prompt.seed})", path) for prompt, path in self.save(part)]]
        network.multiplier = 1.0
        network.load_tensors(live)
        return [picture for of_one_prompt in zip(*rows) for picture in of_one_prompt]


def make_class_images(args: Namespace, family: type[StableDiffusion], processes: Processes) -> None:
    """Fill the class folder of --reg_data_dir up to --num_class_images pictures of --class_prompt.

    Every picture has a seed of its own, and those that are there are counted, so that an
    interrupted run goes on. All processes call it; the first one generates."""
    folder = class_folder(args.reg_data_dir)
    missing = args.num_class_images - (len(list(image_files(folder))) if folder.is_dir() else 0)
    if missing > 0 and processes.is_main:
        processes.say(f"generating {missing} class pictures of '{args.class_prompt}' in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        _generate(args, family, processes, folder, missing)
    processes.accelerator.wait_for_everyone()


def class_folder(reg_data_dir: str) -> Path:
    """The first <repeats>_<name> folder of --reg_data_dir, or the one that is to be made."""
    root = Path(reg_data_dir)
    if not root.is_dir():
        return root / CLASS_FOLDER
    return root if is_leaf(root) else next(iter(repeat_folders(root)), root / CLASS_FOLDER)


def _generate(args, family, processes, folder, missing):
    device = processes.device
    model = family(args, processes.weight_dtype).model
    for part in (model.unet, *model.text_encoders):
        part.to(device)
    model.vae.to(device, torch.float32 if args.no_half_vae else processes.weight_dtype)

    def encode(captions):
        return model.encode_text(captions, max_token_length=args.max_token_length, clip_skip=args.clip_skip)

    width, height = checked_resolution("--resolution", args.resolution)
    sampler = Sampler(model, encode, sampler=args.sample_sampler, device=device)
    unused = (number for number in itertools.count() if not any(folder.glob(f"class_{number:05d}_*.png")))
    for number in itertools.islice(unused, missing):
        prompt = Prompt(args.class_prompt, width=width, height=height, seed=args.seed + number)
        ((_, picture),) = sampler.save_pictures([prompt], folder, f"class_{number:05d}")
        picture.with_suffix(args.caption_extension).write_text(args.class_prompt + "\n", encoding="utf-8")
