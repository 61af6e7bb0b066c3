"""AUTOMATIC1111's extension Lora on files of a folder.

    A1111_DIR=CHECKOUT python tests/loaders/automatic1111.py FOLDER --out FILE

Its web interface and its models are stand-ins: the layers stand where the original models have
them, and the names that its own function gives them lead to the files' keys."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import torch

sys.path[:0] = [str(Path(os.environ["A1111_DIR"]) / "extensions-builtin" / "Lora"), str(Path(__file__).parent)]

from frozen import Read, effect, is_compared, loader_main  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


def imported():
    """The extension's module ``networks``, with stand-ins for the program around it."""
    modules = ModuleType("modules")
    modules.__path__ = []
    for name in "cache errors hashes patches scripts script_callbacks sd_hijack ui_extra_networks".split():
        setattr(modules, name, MagicMock())
    modules.shared = MagicMock()
    modules.devices = SimpleNamespace(cpu=torch.device("cpu"), device=torch.device("cpu"), dtype=torch.float32)
    modules.sd_models = SimpleNamespace(read_state_dict=load_file)
    modules.models = modules.textual_inversion = models = MagicMock()
    models.sd3.mmdit.QkvLinear = type("QkvLinear", (torch.nn.Linear,), {})
    inner = {"models": models, "models.sd3": models.sd3, "models.sd3.mmdit": models.sd3.mmdit}
    inner |= {"textual_inversion": models, "textual_inversion.textual_inversion": models}
    sys.modules |= {"modules": modules, "gradio": MagicMock()} | {f"modules.{key}": inner[key] for key in inner}
    sys.modules |= {f"modules.{key}": value for key, value in vars(modules).items() if not key.startswith("_")}
    import networks

    return networks, modules.shared


networks, shared = imported()


def layer_module(layer):
    """A layer of the right class and shape, without memory."""
    shape = layer["shape"]
    with torch.device("meta"):
        if layer["kind"] == "Linear":
            return torch.nn.Linear(shape[1], shape[0])
        if layer["kind"] == "Conv2d":
            settings = {"stride": layer["stride"], "padding": layer["padding"]}
            return torch.nn.Conv2d(shape[1], shape[0], tuple(shape[2:]), **settings)
        return torch.nn.LayerNorm(shape)


def put(root, path, module):
    *inner, last = path.split(".")
    for name in inner:
        if name not in root._modules:
            root.add_module(name, torch.nn.Module())
        root = root._modules[name]
    root.add_module(last, module)


def sd_model(base):
    """The layers where latent-diffusion's models have them, for SDXL with an OpenCLIP encoder."""
    wrapper, first, second = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
    for layer in base.layers.values():
        component, path = layer["component"], layer["path"].removeprefix("text_model.")
        if component == "unet":
            put(wrapper, f"diffusion_model.{layer['original']}", layer_module(layer))
        elif component in ("te", "te1"):
            put(first, f"transformer.text_model.{path}", layer_module(layer))
        elif path.startswith("encoder.layers."):
            _put_open_clip(second, path.split(".")[2], path, layer)
    encoders = [SimpleNamespace(wrapped=first), SimpleNamespace(wrapped=second)]
    model = SimpleNamespace(is_sdxl=base.family == "sdxl", model=wrapper, cond_stage_model=encoders[0])
    model.conditioner = SimpleNamespace(embedders=encoders)
    return model


def _put_open_clip(root, number, path, layer):
    block = f"model.transformer.resblocks.{number}"
    if path.endswith("q_proj"):
        with torch.device("meta"):
            put(root, f"{block}.attn", torch.nn.MultiheadAttention(layer["shape"][0], layer["shape"][0] // 64))
    for own, name in (("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
        if path.endswith(own):
            put(root, f"{block}.{name}", layer_module(layer))


def loader(base):
    shared.sd_model = sd_model(base)
    networks.assign_network_names_to_compvis_modules(shared.sd_model)

    def load(path, every):
        file, given = load_file(path), []
        weights_class = networks.network.NetworkWeights

        def noting(**fields):
            given.append(Read())
            return weights_class(**{**fields, "w": given[-1]})

        networks.network.NetworkWeights, unmatched = noting, []
        networks.logging.debug = unmatched.append
        try:
            network = networks.load_network("it", SimpleNamespace(filename=path))
        except AssertionError as error:
            raise ValueError(str(error)) from error
        finally:
            networks.network.NetworkWeights = weights_class
        told = " ".join(unmatched)
        unread = [key for key in file if f"'{key}'" in told]
        return unread + _unused(network, given, file), _effects(network, base, every)

    return {"AUTOMATIC1111": load}


def _unused(network, given, file):
    """The keys of matched layers that its module classes did not look at."""
    names = [module.network_key.partition(".")[0] for module in network.modules.values()]
    unused = [f"{name}.{part}" for name, parts in zip(names, given) for part in parts if part not in parts.read]
    return [key for key in unused if key in file]


def _effects(network, base, every):
    effects = {}
    for module in network.modules.values():
        name = module.network_key.partition(".")[0]
        if is_compared(name, every) and name in base.layers:
            effects[name] = effect(name, module.calc_updown(base.weight(name))[0])
    return effects


if __name__ == "__main__":
    loader_main(loader)
