"""Every kind of LoRA file that the product writes, of the true shapes of SD 1.5 and SDXL.

    python tests/loaders/shaped_files.py FOLDER [--every N] [--only WORD] [--families sd15 sdxl]

Neither base is needed: the configurations in lora-ldm/sd_configs give the shapes."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "lora-ldm"), str(Path(__file__).parent)]

import quiet_libraries  # noqa: E402, F401  (before diffusers)
import torch  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from extract_lora import ChangedLayer, extract  # noqa: E402
from frozen import NORMS, effect, frozen_weight, generator, is_compared  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection  # noqa: E402

from base.sd import SDModel  # noqa: E402
from base.sdxl import SDXLModel, original_unet_name  # noqa: E402
from base.single_file import CONFIG_ROOT  # noqa: E402
from network.folding import update_of  # noqa: E402
from network.lora import create_network, find_modules  # noqa: E402
from network.lora_file import group_modules, save_lora  # noqa: E402
from network.lycoris_network import create_lycoris_network  # noqa: E402
from network.metadata import build_metadata  # noqa: E402

FAMILIES = {"sd15": "sd1", "sdxl": "sdxl"}
RANK, ALPHA = 4, 2.0
CONVOLUTIONS = ["conv_dim=2", "conv_alpha=1"]
NETWORK_KINDS = {"LoRA": {}, "LoCon": {"conv_rank": 2, "conv_alpha": 1.0}}
LYCORIS_KINDS = {
    "LyCORIS LoCon": ["algo=locon", *CONVOLUTIONS],
    "LoHa": ["algo=loha", *CONVOLUTIONS],
    "LoKr": ["algo=lokr", *CONVOLUTIONS],
    "LoCon, Tucker": ["algo=locon", "use_tucker=True", *CONVOLUTIONS],
    "DoRA": ["algo=locon", "dora_wd=True", *CONVOLUTIONS],
    "DoRA, wd_on_output=False": ["algo=locon", "dora_wd=True", "wd_on_output=False", *CONVOLUTIONS],
}
EXTRACTED = "extracted after a merge"
KINDS = [*NETWORK_KINDS, *LYCORIS_KINDS, EXTRACTED]
RENAMED, WITHOUT_ALPHA = "LoRA, a key renamed", "LoRA, an alpha missing"
DAMAGES = (RENAMED, WITHOUT_ALPHA)
MOST_EXTRACTED = 1_000_000  # values of a layer: the decomposition of a large one takes seconds


def shaped_model(family: str) -> SDModel:
    """A base of a family's shapes whose weights take no memory."""
    folder = Path(CONFIG_ROOT) / FAMILIES[family]

    def config(part):
        return json.loads((folder / part / "config.json").read_text())

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config("unet"))
        encoders = [CLIPTextModel(CLIPTextConfig(**config("text_encoder")))]
        if family == "sdxl":
            encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**config("text_encoder_2"))))
    model = (SDXLModel if family == "sdxl" else SDModel)(unet, None, encoders, [], {}, base_path=family)
    names = {id(layer): name for _, _, name, layer in find_modules(model, everywhere=True)}
    for root in (unet, *encoders):
        for path, module in root.named_modules():
            _fill(module, names.get(id(module), path))
        root.eval()
    return model


def _fill(module, name):
    for part, value in list(module._parameters.items()):
        if value is not None:
            weight = frozen_weight(name if part == "weight" else f"{name}.{part}", value.shape)
            module._parameters[part] = torch.nn.Parameter(weight, requires_grad=False)
    for part, value in list(module._buffers.items()):
        module._buffers[part] = None if value is None else torch.zeros(value.shape, dtype=value.dtype)


def base_layers(model: SDModel) -> list[dict]:
    """What the loaders must know of each layer: names in each layout, kind and shape."""
    layers = []
    for component, path, name, layer in find_modules(model, everywhere=True):
        layers.append({"name": name, "component": component, "path": path, "kind": type(layer).__name__})
        layers[-1]["shape"] = list(layer.weight.shape)
        if component == "unet":
            layers[-1]["original"] = _original(model, path)
        if isinstance(layer, torch.nn.Conv2d):
            layers[-1] |= {"stride": list(layer.stride), "padding": list(layer.padding)}
    norms = [entry for entry in model.unet.named_modules() if type(entry[1]).__name__ in NORMS]
    for path, layer in norms:  # which a program's own detection of the model may look at
        original = _original(model, path)
        layers.append({"name": f"norm {path}", "component": "unet", "path": path, "original": original})
        layers[-1] |= {"kind": type(layer).__name__, "shape": list(layer.weight.shape)}
    return layers


def _original(model, path):
    return original_unet_name(path, model.unet.config.layers_per_block, model.unet.config.up_block_types)


def _randomised(network):
    """The network with values as after a training; magnitudes stay near those of the base."""
    for name, weight in network.tensors().items():
        noise = torch.randn(weight.shape, generator=generator(name))
        weight.data = weight.data * (1 + 0.1 * noise) if name.endswith("dora_scale") else 0.3 * noise
    return network


def _network_file(model, settings, every):
    network = _randomised(create_network(model, rank=RANK, alpha=ALPHA, **settings))
    tensors = network.state_for_file()
    modules = group_modules(tensors)
    return tensors, {
        name: effect(name, update_of(parts)) for name, parts in modules.items() if is_compared(name, every)
    }


def _lycoris_file(model, arguments, every):
    network = _randomised(create_lycoris_network(model, rank=RANK, alpha=ALPHA, network_args=arguments))
    effects = {}
    for module in network.modules:
        if is_compared(module.lora_name, every):
            effects[module.lora_name] = effect(module.lora_name, _lycoris_change(module))
    return network.state_for_file(), effects


def _lycoris_change(module):
    """What a module adds to its frozen weight in training."""
    if type(module).__name__ in ("LohaModule", "LokrModule"):  # whose merge has the scale twice in lycoris-lora 4.1.3
        return module.get_weight(module.shape) * module.scalar
    return module.get_merged_weight(1, module.shape)[0] - module.org_weight


def _extracted_file(model, every):
    """A LoRA folded into some layers, and the LoRA that extract_lora finds of the change."""
    weights = {name: layer.weight for _, _, name, layer in find_modules(model, everywhere=True)}
    tensors, effects = _network_file(model, NETWORK_KINDS["LoCon"], every)
    modules = group_modules(tensors)
    small = [name for name in effects if weights[name].numel() < MOST_EXTRACTED]
    changed = [
        ChangedLayer(name, weights[name], weights[name] + update_of(modules[name]).reshape(weights[name].shape))
        for name in small
    ]
    return extract(changed, RANK)[0], {name: effects[name] for name in small}


def damaged(tensors: dict[str, torch.Tensor], every: int) -> Iterator[tuple[str, str, dict[str, torch.Tensor]]]:
    """(kind, layer, tensors) of the two deliberate damages of a LoRA."""
    layer = next(name for name in sorted(group_modules(tensors)) if is_compared(name, every) and "unet" in name)
    wrong = layer.replace("attn", "atn").replace("proj", "prj").replace("ff_net", "f_net")
    yield RENAMED, layer, {key.replace(layer, wrong): value for key, value in tensors.items()}
    yield WITHOUT_ALPHA, layer, {key: value for key, value in tensors.items() if key != f"{layer}.alpha"}


def makers(every: int) -> dict[str, Callable]:
    """{kind: function(model) -> (tensors of the file, {layer: expected effect})}."""
    made = {kind: lambda model, kind=kind: _network_file(model, NETWORK_KINDS[kind], every) for kind in NETWORK_KINDS}
    for kind in LYCORIS_KINDS:
        made[kind] = lambda model, kind=kind: _lycoris_file(model, LYCORIS_KINDS[kind], every)
    return {**made, EXTRACTED: lambda model: _extracted_file(model, every)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--only", default="", help="kinds whose names hold this")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for family in args.families:
        (args.folder / f"{family}.base.json").write_text(json.dumps(base_layers(shaped_model(family))))
        for kind, make in makers(args.every).items():
            if args.only in kind:
                write(args.folder, family, kind, *make(shaped_model(family)), args.every)


def write(folder: Path, family: str, kind: str, tensors: dict, effects: dict, every: int) -> None:
    """The file of a kind and what it must do; of a LoRA also the damaged ones."""
    module = "lycoris.kohya" if kind in LYCORIS_KINDS else "networks.lora"
    settings = {"sdxl": family == "sdxl", "network_module": module, "network_dim": RANK, "network_alpha": ALPHA}
    files = [(kind, tensors)]
    if kind == "LoRA":
        files += [(name, changed) for name, _, changed in damaged(tensors, every)]
    for name, content in files:
        save_lora(folder / f"{family}.{name}.safetensors", content, build_metadata(settings, base={}))
        torch.save(effects, folder / f"{family}.{name}.expected.pt")


if __name__ == "__main__":
    main()
