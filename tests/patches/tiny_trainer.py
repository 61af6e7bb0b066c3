"""Runs a trainer of sd-scripts or qlora on a CPU with a tiny random base model in place of the one
it would load.

    python tiny_trainer.py SCRIPT.py [its arguments]        with the checkout as the current folder

Environment: TINY_LOSSES=FILE writes every loss, bit for bit; TINY_BASE=FILE saves the frozen
weights of sd-scripts' models. Runs with the packages of the trainer, old ones too (Python 3.8).
Needs no torchvision: the three transforms that sd-scripts uses are stood in for.
"""

import importlib.machinery
import os
import runpy
import sys
import types

import numpy
import torch

NEWER = ("flux_train_network.py", "sd3_train_network.py", "lumina_train_network.py")
HERE = os.path.dirname(os.path.abspath(__file__))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


class Compose:
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, image):
        for step in self.steps:
            image = step(image)
        return image


class ToTensor:
    def __call__(self, image):
        return torch.from_numpy(numpy.ascontiguousarray(numpy.asarray(image).transpose(2, 0, 1))).float() / 255


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = mean[0], std[0]

    def __call__(self, tensor):
        return (tensor - self.mean) / self.std


def stand_in(name, **members):
    """A module that is not installed, with just these members."""
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    for member, value in members.items():
        setattr(sys.modules[name], member, value)


def stand_in_for_missing():
    import diffusers  # noqa: F401  (before the stand-ins, so that it does not take them for the real ones)
    import transformers  # noqa: F401

    stand_in(
        "torchvision.transforms", Compose=Compose, ToTensor=ToTensor, Normalize=Normalize, InterpolationMode=object
    )
    stand_in("torchvision", transforms=sys.modules["torchvision.transforms"], __version__="0")
    try:
        import albumentations  # noqa: F401
    except ImportError:
        # Asked by the oldest revision for augmentations that it then does not use.
        names = ("Compose", "OneOf", "HueSaturationValue", "RandomGamma", "HorizontalFlip")
        stand_in("albumentations", **{name: lambda *rest, **options: None for name in names})


def text_config(width, layers):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=600, hidden_size=width, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        projection_dim=width, bos_token_id=598, eos_token_id=599, pad_token_id=599,
    )  # fmt: skip


def tiny_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=64, block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def tiny_unet():
    try:
        from library import original_unet as unet
    except ImportError:  # the oldest revision trains diffusers' own U-Net
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64, 64, 64), layers_per_block=2, cross_attention_dim=32,
            attention_head_dim=4,
        )  # fmt: skip
    unet.BLOCK_OUT_CHANNELS, unet.TIMESTEP_INPUT_DIM, unet.TIME_EMBED_DIM = (32, 64, 64, 64), 32, 128
    return unet.UNet2DConditionModel(8, 4, 32, False, False)


def tiny_sdxl_unet():
    from library import sdxl_original_unet as unet

    unet.MODEL_CHANNELS, unet.TIME_EMBED_DIM = 64, 256
    return unet.SdxlUNet2DConditionModel()


def drawn(model):
    """The model with its matrices drawn anew, so that none is zero, its norms one, and its buffers
    zero: classes that only ever load weights leave them as the memory was."""
    for buffer in model.buffers():
        buffer.zero_()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                torch.nn.init.constant_(parameter, float("Norm" in type(module).__name__ and name == "weight"))
    return model


def keep(parts):
    """Save the frozen weights for whoever wants to compute CS from the files."""
    if os.environ.get("TINY_BASE"):
        from safetensors.torch import save_file

        named = {f"{part}.{n}": w.clone().contiguous() for part, m in parts.items() for n, w in m.named_parameters()}
        save_file(named, os.environ["TINY_BASE"])


def load_tiny_sd(args, weight_dtype, accelerator, *rest, **options):
    from transformers import CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(1)
        text_encoder, vae, unet = CLIPTextModel(text_config(32, 2)), tiny_vae(), tiny_unet()
    keep({"te": text_encoder, "unet": unet})
    return text_encoder, vae, unet, False


def load_tiny_sdxl(args, accelerator, model_version, weight_dtype):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(1)
        # SDXL's code asks for these widths, and for the eleventh layer of the first text encoder.
        first, second = CLIPTextModel(text_config(768, 12)), CLIPTextModelWithProjection(text_config(1280, 2))
        vae, unet = tiny_vae(), tiny_sdxl_unet()
    keep({"te1": first, "te2": second, "unet": unet})
    return False, first, second, vae, unet, None, None


def load_tiny_lm(*rest, **options):
    from transformers import OPTConfig, OPTForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=300, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=128, dropout=0.0, bos_token_id=0,
                eos_token_id=1, pad_token_id=2,
            )
        )  # fmt: skip
    keep({"lm": model})
    return model


def prepare_qlora():
    """qlora asks for the number of graphics cards where it loads the model, and goes on from there
    without one."""
    import transformers

    def is_available():
        return sys._getframe(1).f_code.co_name == "get_accelerate_model"

    torch.manual_seed(0)  # it draws the LoRA weights before it seeds
    torch.cuda.is_available = is_available
    transformers.AutoModelForCausalLM.from_pretrained = load_tiny_lm


def record_losses(file):
    """Every loss that a training goes back from, as a hexadecimal float: equal text is an equal bit
    pattern."""
    from accelerate import Accelerator

    backward = Accelerator.backward

    def backward_and_record(self, loss, *rest, **options):
        with open(file, "a") as handle:
            handle.write(float(loss.detach()).hex() + "\n")
        return backward(self, loss, *rest, **options)

    Accelerator.backward = backward_and_record


def main():
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = os.getcwd()
    sys.path.append(HERE)
    if os.path.basename(script) == "qlora.py":
        prepare_qlora()
    else:
        stand_in_for_missing()
        from library import train_util

        train_util.load_target_model = load_tiny_sd
        if "sdxl" in script:
            from library import sdxl_train_util

            sdxl_train_util.load_target_model = load_tiny_sdxl
        if script in NEWER:
            from tiny_flow_models import PREPARE

            PREPARE[script](keep)
    if os.environ.get("TINY_LOSSES"):
        record_losses(os.environ["TINY_LOSSES"])
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
