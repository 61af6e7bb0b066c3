"""diffusers' loaders, and PEFT's layers below them, on files of a folder.

python tests/loaders/diffusers_loader.py FOLDER --out FILE"""

import logging
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

from shaped_files import shaped_model  # noqa: E402, I001  (puts the tree on the path)
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin  # noqa: E402
from frozen import Records, effect, is_compared, loader_main  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


def loader(base):
    mixin = StableDiffusionXLLoraLoaderMixin if base.family == "sdxl" else StableDiffusionLoraLoaderMixin
    names = {(layer["component"], layer["path"]): layer["name"] for layer in base.layers.values()}

    def load(path, every):
        model = shaped_model(base.family)
        components = ["te1", "te2"] if base.family == "sdxl" else ["te"]
        roots = {"unet": model.unet, **dict(zip(components, model.text_encoders))}
        with Records(logging.getLogger("diffusers")) as texts:
            tensors, alphas, metadata = mixin.lora_state_dict(
                path, unet_config=model.unet.config, return_lora_metadata=True
            )
            settings = {"adapter_name": "it", "metadata": metadata}
            mixin.load_lora_into_unet(tensors, alphas, model.unet, **settings)
            for number, encoder in enumerate(model.text_encoders):
                prefix = f"text_encoder{'_2' if number else ''}"
                mixin.load_lora_into_text_encoder(tensors, alphas, encoder, prefix=prefix, **settings)
        file = load_file(path)
        has_magnitudes = any("magnitude" in key for key in tensors)
        unread = [key for key in file if key.endswith("dora_scale") and not has_magnitudes]
        unread += [text for text in texts if "unexpected" in text.lower()]
        layers = {names[part, place]: layer for part, root in roots.items() for place, layer in _lora_layers(root)}
        unread += [key for key in file if key.partition(".")[0] not in layers]
        compared = (name for name in layers if is_compared(name, every))
        return set(unread), {name: effect(name, layers[name].get_delta_weight("it")) for name in compared}

    return {"diffusers, PEFT": load}


def _lora_layers(root):
    return [(path, layer) for path, layer in root.named_modules() if isinstance(layer, LoraLayer)]


if __name__ == "__main__":
    loader_main(loader)
