"""A LoRA out of the difference of two models: of the layers that changed most, by SVD.

    python extract_lora.py --model_org BASE --model_tuned TUNED --save_to lora.safetensors \
        --rank 16 --select energy:0.9

Stage two of DreamBooth trains exactly these layers: --network_weights lora.safetensors
--dim_from_weights. A LoRA holds changes of linear and convolution weights; what else changed
(biases, norms) is said and stays behind.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import quiet_libraries  # noqa: F401  (before diffusers)
import torch

from base.loading import load_base_model
from base.memory import checked_device
from base.sd import SDModel
from network.lora import component_roots, find_modules
from network.lora_file import DTYPES, save_lora
from network.metadata import build_metadata
from settings.entry_point import ended

UNCHANGED = 1e-12  # ||dW|| / ||W|| up to which a layer counts as not trained
NOTHING = 1e-6  # share of the change that is not worth a line


@dataclass
class ChangedLayer:
    """One layer of both models: its weights (out, in) or (out, in, kh, kw)."""

    name: str  # kohya's
    base: torch.Tensor
    tuned: torch.Tensor

    def __post_init__(self):
        self.energy = self.change().square().sum().item()  # ||dW||^2
        self.importance = self.energy**0.5 / max(self.base.float().norm().item(), torch.finfo(torch.float32).tiny)

    def change(self) -> torch.Tensor:
        """dW in float32. Formed anew each time: all together would take a model's memory."""
        return self.tuned.float() - self.base.float()


@dataclass
class Selection:
    """What --select says: all layers, the first few, or the first with a share of the energy."""

    count: Optional[int] = None
    energy: Optional[float] = None

    @classmethod
    def parse(cls, text: str) -> "Selection":
        """Of "all", "top:N" or "energy:SHARE". Raises ValueError."""
        kind, _, number = text.partition(":")
        try:
            if text == "all":
                return cls()
            if kind == "top" and int(number) >= 1:
                return cls(count=int(number))
            if kind == "energy" and 0 < float(number) <= 1:
                return cls(energy=float(number))
        except ValueError:
            pass
        raise ValueError(f"--select {text}: give all, top:N with N of at least 1, or energy:SHARE with a share up to 1")

    def choose(self, layers: list[ChangedLayer]) -> list[ChangedLayer]:
        """The layers kept of a list in order of importance."""
        if self.energy is None:
            return layers[: self.count]
        wanted, held, kept = self.energy * sum(layer.energy for layer in layers), 0.0, []
        for layer in layers:
            if held >= wanted * (1 - 1e-9):  # sums of floats: the last layer of "energy:1" may miss it by a rounding
                break
            kept.append(layer)
            held += layer.energy
        return kept


def changed_layers(base: SDModel, tuned: SDModel) -> list[ChangedLayer]:
    """[ChangedLayer] of all layers that a LoRA file can name, by falling ||dW|| / ||W||.
    base, tuned: SDModels of one family. Raises ValueError for other layers or no change."""
    originals, finals = (find_modules(model, with_convolutions=True) for model in (base, tuned))
    shapes = [{name: layer.weight.shape for _, _, name, layer in found} for found in (originals, finals)]
    if shapes[0] != shapes[1]:
        differing = sorted(
            name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
        )
        raise ValueError(
            f"the two models are not of one kind: {len(differing)} layers differ, the first is {differing[0]}"
        )
    pairs = zip(originals, finals)
    layers = [ChangedLayer(name, original.weight, final.weight) for (_, _, name, original), (_, _, _, final) in pairs]
    layers = [layer for layer in layers if layer.importance > UNCHANGED]
    if not layers:
        raise ValueError(
            "the two models have the same weights in all layers that a LoRA can change: nothing to extract"
        )
    return sorted(layers, key=lambda layer: layer.importance, reverse=True)


def factorise(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(down, up, share): a change's best ``up @ down`` of a rank, by SVD (Eckart-Young).

    change: (out, in) or (out, in, kh, kw); down (r, in, ...), up (out, r, ...) as kohya shapes
    them; r is at most the matrix's own rank. share: of ||dW||^2 that it holds."""
    matrix = change.flatten(1)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    share = (values[:rank].square().sum() / values.square().sum()).item()
    down = down.reshape(rank, *change.shape[1:])
    return down.contiguous(), up.reshape(len(up), rank, *[1] * (change.dim() - 2)).contiguous(), share


def extract(layers: list[ChangedLayer], rank: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """({kohya key: tensor}, {layer name: its energy held}) at a rank; alpha is the rank."""
    tensors, shares = {}, {}
    for layer in layers:
        down, up, shares[layer.name] = factorise(layer.change(), rank)
        tensors[f"{layer.name}.lora_down.weight"], tensors[f"{layer.name}.lora_up.weight"] = down, up
        tensors[f"{layer.name}.alpha"] = torch.tensor(float(len(down)))
    return tensors, shares


def share_outside(base: SDModel, tuned: SDModel, layers: list[ChangedLayer]) -> float:
    """Share of ||dW||^2 in weights that kohya's LoRAs leave alone: biases, norms, embeddings."""
    total = 0.0
    finals = component_roots(tuned)
    for component, root in component_roots(base).items():
        final = dict(finals[component].named_parameters())
        for name, value in root.named_parameters():
            total += (final[name].float() - value.float()).square().sum().item()
    return max(0.0, 1 - sum(layer.energy for layer in layers) / total)


def table(layers: list[ChangedLayer], kept: list[ChangedLayer], shares: dict[str, float]) -> list[str]:
    """The layers by importance, as lines; * marks the kept. shares: what their rank holds."""
    total, summed = sum(layer.energy for layer in layers), 0.0
    names = {layer.name for layer in kept}
    lines = [f"{'':>7}  {'||dW||/||W||':>12}  {'energy':>6}  {'summed':>6}  {'in rank':>7}  layer"]
    for number, layer in enumerate(layers, 1):
        summed += layer.energy
        mark, in_rank = ("*", f"{shares[layer.name]:.1%}") if layer.name in names else (" ", "")
        shown = f"{layer.importance:12.3e}  {layer.energy / total:6.1%}  {summed / total:6.1%}  {in_rank:>7}"
        lines.append(f"{number:>5} {mark}  {shown}  {layer.name}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code: 0, or 2 with one line on stderr."""
    args = _parser().parse_args(argv)

    def work() -> int:
        print(*_run(args), sep="\n")
        return 0

    return ended("extract_lora", work)


@torch.no_grad()
def _run(args):
    """Write the file; -> the lines to show."""
    selection = Selection.parse(args.select)
    if args.rank < 1:
        raise ValueError(f"--rank {args.rank} is not allowed: it must be at least 1")
    checked_device(args.device)
    settings = {"v2": args.v2, "v_parameterization": args.v_parameterization}
    loading = {**settings, "vae": args.vae, "tokenizer_cache_dir": args.tokenizer_cache_dir}
    models = [load_base_model(path, **loading) for path in (args.model_org, args.model_tuned)]
    for root in (root for model in models for root in component_roots(model).values()):
        root.to(args.device)
    layers = changed_layers(*models)
    kept = selection.choose(layers)
    tensors, shares = extract(kept, args.rank)
    settings |= {"sdxl": models[0].is_sdxl, "network_module": "networks.lora"}
    settings |= {"network_dim": args.rank, "network_alpha": args.rank}
    metadata = build_metadata(settings, base=models[0].base_hashes)
    save_lora(args.save_to, tensors, metadata, DTYPES[args.save_precision])
    lines = table(layers, kept, shares)
    lines.append(f"{args.save_to}: {len(kept)} of {len(layers)} changed layers, rank up to {args.rank}")
    outside = share_outside(*models, layers)
    if outside > NOTHING:
        lines.append(f"{outside:.2%} of the change is in biases, norms and embeddings, which the LoRA does not hold")
    return [*lines, f"Train it on with --network_weights {args.save_to} --dim_from_weights"]


def _parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model_org", required=True, help="the base: diffusers folder, .safetensors/.ckpt file, hub name")
    add("--model_tuned", required=True, help="the same model after training")
    add("--save_to", required=True, help="the LoRA file")
    add("--rank", "--dim", type=int, default=16, help="at most; a small layer gets its own (default %(default)s)")
    add("--select", default="energy:0.9", help="all, top:N or energy:SHARE of the most changed (%(default)s)")
    add("--save_precision", choices=["float", "fp16", "bf16"], help="of the saved tensors (default float)")
    add("--vae", help="a VAE, where the models are files without one")
    add("--v2", action="store_true", help="the models are SD 2.x")
    add("--v_parameterization", action="store_true", help="they predict velocity")
    add("--tokenizer_cache_dir", help="where the CLIP vocabulary lies, for single files")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())
