"""Tiny random bases of the structures that diffusers' DreamBooth LoRA scripts train, and those
scripts run over them on a CPU.

    python tiny_pipelines.py KIND FOLDER                 make a base
    python tiny_pipelines.py --run SCRIPT.py [flags]     run a script

Environment: TINY_LOSSES=FILE writes every loss, bit for bit. TORCHVISION=FOLDER: where torchvision
is, if it is not installed."""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
from tiny_trainer import record_losses
from torchvision_without_kernels import import_torchvision

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ '\n' }}{{ m['content'] }}<|im_end|>{% endfor %}"


def byte_names():
    """The printable names that byte-level tokenizers give to the 256 bytes."""
    return [chr(code) for code in BYTES] + [chr(256 + n) for n in range(256 - len(BYTES))]


def write_tokenizer(folder, words, settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def clip_tokenizer(folder):
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = letters + [letter + "</w>" for letter in letters]
    words += [f"<unused{n}>" for n in range(598 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    write_tokenizer(folder, words, {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    return CLIPTokenizer.from_pretrained(folder)


def qwen_tokenizer(folder):
    from transformers import Qwen2TokenizerFast

    words = [*byte_names(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    settings = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 512, "pad_token": "<|endoftext|>"}
    settings["additional_special_tokens"] = words[-2:]
    write_tokenizer(folder, words, {**settings, "chat_template": CHAT})
    return Qwen2TokenizerFast.from_pretrained(folder)


def t5_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import T5TokenizerFast

    words = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127))]
    raw = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "raw.json"))
    return T5TokenizerFast(tokenizer_file=str(folder / "raw.json"), extra_ids=0, model_max_length=64)


def clip(kind="CLIPTextModel", width=32):
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=600, hidden_size=width, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        projection_dim=width, bos_token_id=598, eos_token_id=599, pad_token_id=599,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def t5():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    )


def vae(latents, **more):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=32, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=latents,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **more,
    )  # fmt: skip


def flow_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def sd(folder):
    from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae(4), text_encoder=clip(), tokenizer=clip_tokenizer(folder / "words"), unet=unet,
        scheduler=DDPMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(folder):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64,
        attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    words = clip_tokenizer(folder / "words")
    return StableDiffusionXLPipeline(
        vae=vae(4), text_encoder=clip(), text_encoder_2=clip("CLIPTextModelWithProjection"), tokenizer=words,
        tokenizer_2=words, unet=unet, scheduler=EulerDiscreteScheduler(),
    )  # fmt: skip


def sd3(folder):
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=32,
    )  # fmt: skip
    words, projected = clip_tokenizer(folder / "words"), "CLIPTextModelWithProjection"
    # SD3 pads the two CLIP encoders side by side to the width of T5: half of it each here.
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=flow_scheduler(), vae=vae(4, shift_factor=0.06), tokenizer=words,
        text_encoder=clip(projected, 16), text_encoder_2=clip(projected, 16), tokenizer_2=words,
        text_encoder_3=t5(), tokenizer_3=t5_tokenizer(folder / "t5"),
    )  # fmt: skip


def flux(folder):
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer, scheduler=flow_scheduler(), vae=vae(4, shift_factor=0.06), text_encoder=clip(),
        tokenizer=clip_tokenizer(folder / "words"), text_encoder_2=t5(), tokenizer_2=t5_tokenizer(folder / "t5"),
    )  # fmt: skip


def qwen3(layers):
    import transformers

    return transformers.Qwen3Config(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip


def flux2_klein(folder):
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3ForCausalLM

    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16 * 3, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    small = AutoencoderKLFlux2(
        sample_size=32, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return Flux2KleinPipeline(
        transformer=transformer, vae=small, scheduler=flow_scheduler(),
        text_encoder=Qwen3ForCausalLM(qwen3(28)), tokenizer=qwen_tokenizer(folder / "words"),
    )  # fmt: skip


def z_image(folder):
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[64, 64, 64],
    )  # fmt: skip
    return ZImagePipeline(
        transformer=transformer, vae=vae(4, shift_factor=0.06), scheduler=flow_scheduler(),
        text_encoder=Qwen3Model(qwen3(3)), tokenizer=qwen_tokenizer(folder / "words"),
    )  # fmt: skip


def qwen_image(folder):
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    small = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default", "rope_theta": 1e6}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2_5_VLConfig(
        text_config={**text, "num_key_value_heads": 2, "rope_scaling": rope, "vocab_size": 300},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        vision_end_token_id=298, vision_start_token_id=297, vision_token_id=296,
    )  # fmt: skip
    return QwenImagePipeline(
        transformer=transformer, vae=small, scheduler=flow_scheduler(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config), tokenizer=qwen_tokenizer(folder / "words"),
    )  # fmt: skip


KINDS = {made.__name__: made for made in (sd, sdxl, sd3, flux, flux2_klein, z_image, qwen_image)}


def main():
    if sys.argv[1] != "--run":
        kind, folder = sys.argv[1], Path(sys.argv[2])
        torch.manual_seed(1)
        KINDS[kind](folder).save_pretrained(folder)
        return
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    if os.environ.get("TORCHVISION"):
        sys.path.append(os.environ["TORCHVISION"])
    import_torchvision()
    if os.environ.get("TINY_LOSSES"):
        record_losses(os.environ["TINY_LOSSES"])
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
