"""The three small networks and the tokenizer of the embedded base, shaped as SD 1.x.

Same classes and module names as the big family (CLIP text encoder, AutoencoderKL with 8x reduction
and 4 channels, cross-attention U-Net with epsilon prediction): LoRA targets are the same."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

VOCABULARY_SIZE = 3200
TEXT_TOKENS = 77
TEXT_WIDTH = 128
START, END = "<|startoftext|>", "<|endoftext|>"
# What Stable Diffusion 1.x multiplies its latents by: programs that hold it work here too.
LATENT_SCALE = 0.18215


def build_vae() -> torch.nn.Module:
    """Image autoencoder, (B, 3, 64, 64) in [-1, 1] <-> (B, 4, 8, 8)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=16,
        block_out_channels=(32, 64, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=LATENT_SCALE,
    )


def build_unet() -> torch.nn.Module:
    """Noise predictor on (B, 4, 8, 8) latents with text states (B, 77, 128)."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(96, 160),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder() -> torch.nn.Module:
    """Causal CLIP text transformer, token ids (B, 77) -> states (B, 77, 128)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            hidden_act="quick_gelu",
            projection_dim=TEXT_WIDTH,
            bos_token_id=VOCABULARY_SIZE - 2,
            eos_token_id=VOCABULARY_SIZE - 1,
            pad_token_id=VOCABULARY_SIZE - 1,
        )
    )


def build_noise_scheduler() -> Any:
    """The noise schedule of Stable Diffusion 1.x, as a DDIM sampler."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def parameter_count(*modules) -> int:
    """Sum of the parameters of all modules."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


# --- tokenizer ------------------------------------------------------------------------------------


def learn_bpe(texts: Iterable[str], vocabulary_size: int = VOCABULARY_SIZE) -> tuple[dict[str, int], list]:
    """Learn a byte-level CLIP vocabulary (the last piece of a word ends in `</w>`).

    Every byte is in it, in the middle and at the end of a word, so that no text is unknown.

    Returns (vocabulary, merges): {token: id} of `vocabulary_size` entries, list of merged pairs."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2 * vocabulary_size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    missing = vocabulary_size - len(tokens) - 2
    if len(merges) < missing:
        raise ValueError(
            f"the text gives only {len(merges)} merges, fewer than the {missing} of a vocabulary of {vocabulary_size}; "
            "give more text or a smaller vocabulary"
        )
    tokens += ["".join(pair) for pair in merges[:missing]]
    return {token: index for index, token in enumerate([*tokens, START, END])}, merges[:missing]


def save_tokenizer(vocabulary: dict[str, int], merges: list, folder: str | Path) -> None:
    """Write vocab.json, merges.txt and the two small configuration files of a CLIP tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf8")
    config = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TEXT_TOKENS,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")


def tokenize(tokenizer: Any, texts: Iterable[str]) -> torch.Tensor:
    """Token ids of full length. Returns an int64 tensor (len(texts), 77)."""
    return tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
    ).input_ids.to(torch.int64)
