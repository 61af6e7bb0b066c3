"""ComfyUI's own key maps and weight functions on files of a folder.

    COMFYUI_DIR=CHECKOUT python tests/loaders/comfyui.py FOLDER --out FILE

What it imports and does not need here (video, audio) is replaced by stand-ins."""

import importlib.machinery
import logging
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock

sys.path[:0] = [os.environ["COMFYUI_DIR"], str(Path(__file__).parent)]

import torch  # noqa: E402
from frozen import Records, effect, is_compared, loader_main  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import CLIPTextModel, CLIPTokenizer, T5TokenizerFast  # noqa: E402, F401  (before stand-ins)

PREFIX = "model.diffusion_model."


def imported():
    """The module ``comfy``, on the CPU, with stand-ins for packages that are not installed."""
    words, sys.argv = sys.argv, ["comfyui", "--cpu"]
    logging.disable(logging.WARNING)
    import comfy.options

    comfy.options.enable_args_parsing()
    for _ in range(50):
        try:
            import comfy.lora
            import comfy.lora_convert
            import comfy.model_detection
            import comfy.sd1_clip
            import comfy.sdxl_clip

            break
        except ModuleNotFoundError as error:
            stand_in = MagicMock(__spec__=importlib.machinery.ModuleSpec(error.name, None), __path__=[])
            sys.modules[error.name] = stand_in
    sys.argv = words
    logging.disable(logging.NOTSET)
    return comfy


comfy = imported()


def key_map(base) -> dict[str, str]:
    """{name that a file may use: key of ComfyUI's model}; it detects the model by its shapes."""
    layers = (layer for layer in base.layers.values() if layer["component"] == "unet")
    shapes = {f"{PREFIX}{layer['original']}.weight": torch.empty(layer["shape"], device="meta") for layer in layers}
    config = comfy.model_detection.model_config_from_unet(shapes, PREFIX)
    unet = config.get_model(shapes, PREFIX, device="meta")
    clip_class = comfy.sdxl_clip.SDXLClipModel if base.family == "sdxl" else comfy.sd1_clip.SD1ClipModel
    clip = clip_class(device="meta", dtype=torch.float32)
    return comfy.lora.model_lora_keys_clip(clip, comfy.lora.model_lora_keys_unet(unet, {}))


def loader(base):
    known = key_map(base)

    def lora_loader(path, every):
        file = load_file(path)
        with Records(logging.getLogger()) as texts:
            patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(file), known)
        unread = [text.partition("not loaded: ")[2] for text in texts if "not loaded" in text]
        effects = {}
        for name in {key.partition(".")[0] for key in file}:
            if is_compared(name, every) and known.get(name) in patches:
                weight = base.weight(name)
                patch = [(1.0, patches[known[name]], 1.0, None, None)]
                merged = comfy.lora.calculate_weight(patch, weight.clone(), known[name])
                effects[name] = effect(name, merged - weight)
        return unread, effects

    return {"ComfyUI": lora_loader}


if __name__ == "__main__":
    loader_main(loader)
