"""Stable Diffusion 1.x and 2.x as one object: load it, encode text and images, predict noise.

A base model is a folder in diffusers layout, a single .safetensors or .ckpt file in the original layout, or a name on
the Hugging Face hub. Nothing is fetched unless a hub name is given or a single file's tokenizer is found nowhere here.
"""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import quiet_libraries  # noqa: F401  (before diffusers)
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.utils import logging as diffusers_logging
from lora_file import file_hashes
from single_file import config_folder, load_components, load_single_file_vae, read_tensors
from text_encoding import encode_captions
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

CLIP_VOCABULARY = "openai/clip-vit-large-patch14"
SPECIAL_TOKENS = 3  # begin, end and padding, which a tokenizer without a vocabulary still has
HUB_TIMEOUT_SEC = 5
PIPELINE_FILES = ["model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"]

diffusers_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()
for _library_logging in (diffusers_logging, transformers_logging):
    _library_logging.disable_progress_bar()


@dataclass
class SDModel:
    """A frozen base model and the facts that training needs of it."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: list
    tokenizers: list
    scheduler_config: dict
    base_path: str
    is_v2: bool = False
    vae_path: str = None
    base_hashes: dict = field(default_factory=dict)  # ss_sd_model_* and ss_vae_* metadata

    @property
    def prediction_type(self):
        """ "epsilon" or "v_prediction"."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    @property
    def alphas_cumprod(self):
        """(1000,) float32: the share of the signal's variance left at each timestep."""
        return DDPMScheduler.from_config(self.scheduler_config).alphas_cumprod.float()

    @property
    def vae_scale(self):
        """Pixels per latent, 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_scaling(self):
        """What latents are multiplied by after encoding, 0.18215 for SD 1.x and 2.x."""
        return self.vae.config.scaling_factor

    def encode_text(self, captions, *, max_token_length=75, clip_skip=None, weighted=False):
        """B captions -> (B, 75 n + 2, D) states; see text_encoding.encode_captions."""
        return encode_captions(
            self.text_encoders[0],
            self.tokenizers[0],
            captions,
            max_token_length=max_token_length,
            clip_skip=clip_skip,
            weighted=weighted,
        )

    def encode_images(self, pixels, generator=None):
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, H/8, W/8), sampled from the VAE's posterior."""
        pixels = pixels.to(device=self.vae.device, dtype=self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.sample(generator) * self.latent_scaling
        if not torch.isfinite(latents).all():
            raise ValueError(
                f"the VAE gives NaN or Inf in {self.vae.dtype}; keep it in float32 with --no_half_vae, or give another --vae"
            )
        return latents

    def decode_latents(self, latents):
        """Scaled latents (B, 4, h, w) -> pixels (B, 3, 8h, 8w), about [-1, 1]."""
        latents = latents.to(device=self.vae.device, dtype=self.vae.dtype)
        return self.vae.decode(latents / self.latent_scaling).sample

    def predict_noise(self, noisy_latents, timesteps, text_states):
        """U-Net output (B, 4, h, w): noise or velocity, as ``prediction_type`` says. timesteps (B,) int64."""
        return self.unet(noisy_latents, timesteps, encoder_hidden_states=text_states).sample

    def lora_unet_name(self, module_name):
        """The name of a U-Net module in kohya's files, dots still in it. SD 1.x and 2.x use diffusers' names."""
        return module_name

    def to_pipeline(self):
        """A StableDiffusionPipeline of the live parts (no copies), without safety checker."""
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoders[0],
            tokenizer=self.tokenizers[0],
            unet=self.unet,
            scheduler=DDPMScheduler.from_config(self.scheduler_config, steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def save_pipeline(self, folder):
        """Write a folder in diffusers layout. Not while LoRA layers are attached: detach or merge them first."""
        self.to_pipeline().save_pretrained(folder)
        for index, tokenizer in enumerate(self.tokenizers):
            write_clip_vocabulary(tokenizer, Path(folder) / ("tokenizer" if index == 0 else f"tokenizer_{index + 1}"))


def load_sd_model(
    path, *, v2=False, v_parameterization=False, vae=None, dtype=torch.float32, tokenizer_cache_dir=None
):
    """Load a base model in evaluation mode, without gradients.

    Args:
        path: diffusers folder, single file in the original layout, or hub name (``owner/name``).
        v2: the base is SD 2.x. v_parameterization: it predicts velocity (the 768-pixel SD 2.x models).
        vae: another VAE: a file, a diffusers folder (with or without ``vae/``).
        tokenizer_cache_dir: where the CLIP vocabulary is looked for when the base is a single file.

    Raises:
        FileNotFoundError, ValueError: one message with the value and the fix.
    """
    location = _local_path(path)
    if location.is_dir():
        unet, vae_model, text_encoder, tokenizer, scheduler_config = _load_folder(location, dtype)
    else:
        tensors = read_tensors(location)
        config = config_folder(location, tensors, v_parameterization)
        unet, vae_model, text_encoder = load_components(location, tensors, config, dtype)
        tokenizer = load_clip_tokenizer(config / "tokenizer", tokenizer_cache_dir)
        scheduler_config = _read_json(config / "scheduler" / "scheduler_config.json")
    if vae:
        vae_model = load_vae(vae, dtype)
    if v_parameterization:
        scheduler_config = {**scheduler_config, "prediction_type": "v_prediction"}
    _check_version(path, unet, v2)

    for part in (unet, vae_model, text_encoder):
        part.requires_grad_(False).eval()
    hashes = _hash_metadata("sd_model", path, location) | (_hash_metadata("vae", vae, Path(vae)) if vae else {})
    return SDModel(
        unet=unet,
        vae=vae_model,
        text_encoders=[text_encoder],
        tokenizers=[tokenizer],
        scheduler_config=scheduler_config,
        base_path=str(path),
        is_v2=v2,
        vae_path=str(vae) if vae else None,
        base_hashes=hashes,
    )


def load_vae(path, dtype=torch.float32):
    """A VAE from a file in the original layout or a diffusers folder (the VAE's own or a whole pipeline's)."""
    location = _local_path(path)
    if location.is_file():
        return load_single_file_vae(location, dtype)
    folder = location / "vae" if (location / "vae").is_dir() else location
    return _from_folder(AutoencoderKL, folder, dtype)


def load_clip_tokenizer(folder=None, tokenizer_cache_dir=None):
    """The CLIP tokenizer from a folder, from --tokenizer_cache_dir, from the transformers cache, or from the hub.

    Raises:
        FileNotFoundError: found nowhere; says which files to put where.
    """
    candidates = [Path(folder)] if folder else []
    if tokenizer_cache_dir:
        cache = Path(tokenizer_cache_dir)
        candidates += [cache, cache / CLIP_VOCABULARY.replace("/", "_"), cache / CLIP_VOCABULARY, cache / "tokenizer"]
    for candidate in candidates:
        if (candidate / "tokenizer.json").is_file() or (candidate / "vocab.json").is_file():
            return CLIPTokenizer.from_pretrained(candidate, local_files_only=True)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(CLIP_VOCABULARY, local_files_only=not _hub_answers())
    except OSError:
        tokenizer = None
    if tokenizer is None or tokenizer.vocab_size <= SPECIAL_TOKENS:  # transformers 5 makes an empty one of no files
        where = tokenizer_cache_dir or "a folder of your choice, named with --tokenizer_cache_dir"
        raise FileNotFoundError(
            f"the CLIP vocabulary was not found: a single-file checkpoint does not contain it. Put vocab.json and "
            f"merges.txt of {CLIP_VOCABULARY} (SD 2.x uses the same ones) into {where}"
        )
    return tokenizer


def write_clip_vocabulary(tokenizer, folder):
    """Write vocab.json and merges.txt beside tokenizer.json: transformers 4 and other programs read only those."""
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    (Path(folder) / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False), encoding="utf-8")
    (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def set_attention(model, kind):
    """Choose the attention of a U-Net or VAE: "sdpa", "xformers", "sliced" (least memory) or "plain".

    "plain" writes the products out; on a CPU and at small sizes its backward pass is the fastest.
    """
    if kind == "sdpa":
        model.set_attn_processor(AttnProcessor2_0())
    elif kind == "plain":
        model.set_attn_processor(AttnProcessor())
    elif kind == "sliced":
        model.set_attention_slice("auto")
    elif kind == "xformers":
        try:
            model.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, NotImplementedError) as error:
            raise ValueError(f"xformers cannot be used here ({error}); use --sdpa, which needs no package") from error
    else:
        raise ValueError(f"attention is {kind!r}; allowed are sdpa, xformers, sliced and plain")


def _local_path(path):
    location = Path(path).expanduser()
    if location.exists():
        return location
    if str(path).count("/") == 1 and not str(path).startswith((".", "/", "~")):
        return _hub_folder(str(path))
    raise FileNotFoundError(f"{path} does not exist; give a diffusers folder, a .safetensors/.ckpt file or a hub name")


def _hub_folder(name):
    import huggingface_hub

    try:
        offline = not _hub_answers()
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=PIPELINE_FILES, local_files_only=offline))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{name} is neither a file or folder here nor could it be read from the Hugging Face hub "
            f"({str(error).splitlines()[0]}); give a local path"
        ) from error


def _hub_answers():
    """Whether the hub can be reached: without it, its client would retry for minutes before it says so."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SEC).close()
    except urllib.error.HTTPError:
        return True  # it refuses this request, but it is there
    except OSError:
        return False
    return True


def _load_folder(folder, dtype):
    needed = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]
    missing = [name for name in needed if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a Stable Diffusion folder in diffusers layout: it lacks {', '.join(missing)}"
        )
    if (folder / "text_encoder_2").is_dir():
        raise ValueError(f"{folder} has two text encoders, as SDXL has; train it with es_lora_sdxl.py")
    return (
        _from_folder(UNet2DConditionModel, folder / "unet", dtype),
        _from_folder(AutoencoderKL, folder / "vae", dtype),
        _from_folder(CLIPTextModel, folder / "text_encoder", dtype),
        load_clip_tokenizer(folder / "tokenizer"),
        _read_json(folder / "scheduler" / "scheduler_config.json"),
    )


def _from_folder(model_class, folder, dtype):
    """from_pretrained without the network; reads the ``fp16`` files where a folder has no others."""
    weights = [file.name for file in folder.glob("*.safetensors")] + [file.name for file in folder.glob("*.bin")]
    if not weights:
        raise FileNotFoundError(f"{folder} holds no weights (*.safetensors or *.bin)")
    variant = "fp16" if all(".fp16." in name for name in weights) else None
    precision = "dtype" if model_class is CLIPTextModel else "torch_dtype"
    try:
        return model_class.from_pretrained(folder, local_files_only=True, variant=variant, **{precision: dtype})
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be loaded ({str(error).splitlines()[0]}); copy or download it again") from error


def _check_version(path, unet, v2):
    width = unet.config.cross_attention_dim
    if v2 and width == 768:
        raise ValueError(f"{path} is an SD 1.x model (text width 768); leave --v2 out")
    if not v2 and width == 1024:
        raise ValueError(
            f"{path} is an SD 2.x model (text width 1024); add --v2, and --v_parameterization for a 768-pixel v model"
        )


def _hash_metadata(kind, name, location):
    """ss_sd_model_* or ss_vae_*: the name, and for a file the two hashes by which WebUIs know it."""
    metadata = {f"ss_{kind}_name": Path(name).name if location.exists() else str(name)}
    if location.is_file():
        legacy, full = file_hashes(location)
        metadata |= {f"ss_{kind}_hash": legacy, f"ss_new_{kind}_hash": full}
    return metadata


def _read_json(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return json.loads(path.read_text(encoding="utf-8"))
