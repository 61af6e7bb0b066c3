"""sd-scripts' tools on files of a folder, in the environment of sd-scripts.

    SD_SCRIPTS_DIR=REPOSITORY PYTHON_OF_SD_SCRIPTS tests/loaders/kohya.py FOLDER --out FILE

The tools' own functions run on sd-scripts' own models without memory; the layers whose change is
compared have their weights."""

import atexit
import contextlib
import io
import logging
import os
import runpy
import subprocess
import sys
import tarfile
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

REVISION = "v0.10.1"


def checkout(place: Path) -> Path:
    """A checkout as it is; of a bare git repository the revision's tools in a temporary folder."""
    if (place / "networks").is_dir():
        return place
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    command = ["git", "-C", place, "archive", REVISION, "networks", "tools", "library"]
    archive = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    tarfile.open(fileobj=io.BytesIO(archive)).extractall(folder.name)
    return Path(folder.name)


CHECKOUT = checkout(Path(os.environ["SD_SCRIPTS_DIR"]))
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "networks"), str(Path(__file__).parent)]

import transformers.utils.import_utils  # noqa: E402

transformers.utils.import_utils._torchvision_available = False
for _name in ("torchvision", "torchvision.transforms"):  # not used by these tools
    sys.modules[_name] = MagicMock(__spec__=ModuleSpec(_name, None), __path__=[])

import lora  # noqa: E402
import merge_lora  # noqa: E402
import resize_lora  # noqa: E402
import sdxl_merge_lora  # noqa: E402
import torch  # noqa: E402
from frozen import Read, effect, is_compared, loader_main  # noqa: E402
from library import model_util, original_unet, sdxl_original_unet  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection  # noqa: E402

logging.disable(logging.INFO)
NEW_RANK, MOST_RESIZED = 4, 500_000
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT_2 = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def models(base) -> tuple[list, torch.nn.Module]:
    """([text encoders], U-Net) of sd-scripts without weights."""
    with torch.device("meta"):
        encoders = [CLIPTextModel(CLIPTextConfig(**TEXT))]
        if base.family == "sdxl":
            encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2, projection_dim=1280)))
            return encoders, sdxl_original_unet.SdxlUNet2DConditionModel()
        return encoders, original_unet.UNet2DConditionModel(**model_util.create_unet_diffusers_config(False))


def named_layers(base, encoders, unet) -> dict[str, torch.nn.Module]:
    """{kohya name: layer} of everything that may be in a file."""
    prefixes = ["lora_te1", "lora_te2"] if base.family == "sdxl" else ["lora_te"]
    roots = [*zip(prefixes, encoders), ("lora_unet", unet)]
    return {
        f"{prefix}.{path}".replace(".", "_"): layer for prefix, root in roots for path, layer in root.named_modules()
    }


def loader(base):
    merge_tool = "sdxl_merge_lora.py" if base.family == "sdxl" else "merge_lora.py"
    tools = {
        "check_lora_weights.py": lambda path, every: (_not_listed(path), {}),
        "resize_lora.py": lambda path, every: _resized(base, path, every),
        f"{merge_tool} of LoRAs": lambda path, every: _merged_files(base, path, every),
        f"{merge_tool} into a model": lambda path, every: _merged(base, path, every),
        "--network_weights": lambda path, every: _network(base, path, every),
        "show_metadata.py": lambda path, every: (_without_metadata(path), {}),
    }
    tools = {name.replace("sdxl_merge_lora.py", "merge_lora.py"): tool for name, tool in tools.items()}
    if base.family == "sd15":  # the interrogator loads as --network_weights does
        tools["lora_interrogator.py"] = tools["--network_weights"]
    return tools


def _printed(script, *words):
    told = io.StringIO()
    argv, sys.argv = sys.argv, [script, *map(str, words)]
    try:
        with contextlib.redirect_stdout(told):
            runpy.run_path(str(CHECKOUT / script), run_name="__main__")
    finally:
        sys.argv = argv
    return told.getvalue()


def _not_listed(path):
    listed = {line.partition(",")[0] for line in _printed("networks/check_lora_weights.py", path, "-s").splitlines()}
    return set(load_file(path)) - listed


def _without_metadata(path):
    shown = _printed("tools/show_metadata.py", "--model", path)
    return [name for name in ("ss_base_model_version", "ss_network_module", "sshs_model_hash") if name not in shown]


def _products(tensors, names):
    """{layer: alpha / rank * up @ down} of kohya's keys."""
    found = {}
    for name in names:
        if f"{name}.lora_down.weight" in tensors:
            down, up = tensors[f"{name}.lora_down.weight"].float(), tensors[f"{name}.lora_up.weight"].float()
            scale = float(tensors.get(f"{name}.alpha", len(down))) / len(down)
            found[name] = effect(name, scale * (up.flatten(1) @ down.flatten(1)))
    return found


def _resized(base, path, every):
    """At a rank that holds all; only small layers, as it decomposes the whole matrices."""
    names = {name for name in base.layers if is_compared(name, every)}
    names = {name for name in names if torch.Size(base.layers[name]["shape"]).numel() < MOST_RESIZED}
    part = Read({key: value for key, value in load_file(path).items() if key.partition(".")[0] in names})
    settings = {"save_dtype": torch.float32, "device": "cpu", "dynamic_method": None, "dynamic_param": None}
    resized, _, _ = resize_lora.resize_lora_model(part, NEW_RANK, NEW_RANK, verbose=False, **settings)
    unread = [key for key in part if key not in part.read and ".lora_down." not in key]  # which it iterates over
    return unread, _products(resized, names)


def _merged_files(base, path, every):
    try:
        merged, _, _ = merge_lora.merge_lora_models([str(path)] * 2, [0.5, 0.5], torch.float32)
    except KeyError as error:
        raise ValueError(f"it stops: KeyError {error}") from error
    unread = set(load_file(path)) - set(merged)
    return unread, _products(merged, [name for name in base.layers if is_compared(name, every)])


def _merged(base, path, every):
    encoders, unet = models(base)
    layers = named_layers(base, encoders, unet)
    compared = [name for name in base.layers if is_compared(name, every) and name in layers]
    tensors = {}
    for key, value in load_file(path).items():
        name = key.partition(".")[0]
        tensors[key] = value if value.dim() == 0 or name in compared else value.to("meta")
    for name in compared:
        layers[name].weight = torch.nn.Parameter(base.weight(name), requires_grad=False)
    tensors = Read(tensors)
    module = sdxl_merge_lora if base.family == "sdxl" else merge_lora
    given, module.load_state_dict = module.load_state_dict, lambda *_: (tensors, {})
    try:
        with torch.no_grad():
            if base.family == "sdxl":
                module.merge_to_sd_model(*encoders, unet, [str(path)], [1.0], [], torch.float32)
            else:
                module.merge_to_sd_model(*encoders, unet, [str(path)], [1.0], torch.float32)
    except UnboundLocalError as error:  # it finds no kind of file that it knows
        raise ValueError(f"it stops at {min(tensors, key=lambda key: key.endswith('alpha'))}") from error
    finally:
        module.load_state_dict = given
    compared = [name for name in compared if f"{name}.lora_down.weight" in tensors.read]
    effects = {name: effect(name, layers[name].weight - base.weight(name)) for name in compared}
    return set(tensors) - tensors.read, effects


def _network(base, path, every):
    """As train_network.py loads --network_weights with --dim_from_weights."""
    encoders, unet = models(base)
    text_encoder = encoders if base.family == "sdxl" else encoders[0]
    network, tensors = lora.create_network_from_weights(1.0, str(path), None, text_encoder, unet)
    network.apply_to(text_encoder, unet, True, True)
    try:
        told = network.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ValueError(str(error).split("\n")[1].strip()) from error
    effects = {}
    for module in network.text_encoder_loras + network.unet_loras:
        if is_compared(module.lora_name, every):
            down, up = module.lora_down.weight, module.lora_up.weight
            effects[module.lora_name] = effect(module.lora_name, module.scale * (up.flatten(1) @ down.flatten(1)))
    return told.unexpected_keys, effects


if __name__ == "__main__":
    loader_main(loader)
