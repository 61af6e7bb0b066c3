"""Runs a trainer of musubi-tuner on a CPU with a tiny random transformer in place of the one it
would load, over latents and text embeddings in its own cache format.

    python tiny_musubi.py SCRIPT.py [its arguments]        with the checkout as the current folder

Environment: TINY_LOSSES=FILE writes every loss, bit for bit; TINY_BASE=FILE saves the frozen
weights. TORCHVISION=FOLDER: where torchvision is, if it is not installed. The caches are made where
the cache_directory of the --dataset_config is not there."""

import os
import runpy
import sys
from pathlib import Path

import toml
import torch
from tiny_trainer import drawn, keep, record_losses
from torchvision_without_kernels import import_torchvision

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
SIZE, TOKENS, WIDTH = 64, 12, 32


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make().eval().requires_grad_(False)


def z_image():
    from musubi_tuner import zimage_train_network as script
    from musubi_tuner.dataset import cache_io

    model = seeded(
        lambda: script.zimage_model.ZImageTransformer2DModel(
            dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[8, 12, 12],
            axes_lens=[256, 64, 64],
        )
    )  # fmt: skip
    latents = (16, SIZE // 8, SIZE // 8)
    text = cache_io.save_text_encoder_output_cache_z_image
    return script.ZImageNetworkTrainer, model, "zi", latents, cache_io.save_latent_cache_z_image, text


def qwen_image():
    from musubi_tuner import qwen_image_train_network as script
    from musubi_tuner.dataset import cache_io

    model = seeded(
        lambda: script.qwen_image_model.QwenImageTransformer2DModel(
            num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=WIDTH,
            axes_dims_rope=(8, 12, 12),
        )
    )  # fmt: skip
    latents = (16, 1, SIZE // 8, SIZE // 8)
    text = cache_io.save_text_encoder_output_cache_qwen_image
    return (
        script.QwenImageNetworkTrainer,
        model,
        "qi",
        latents,
        lambda item, latent: cache_io.save_latent_cache_qwen_image(item, latent, None),
        text,
    )


def wan():
    torch.cuda.current_device = lambda: "cpu"  # asked for where a text encoder is declared
    from musubi_tuner import wan_train_network as script
    from musubi_tuner.dataset import cache_io

    model = seeded(
        lambda: drawn(
            script.WanModel(
                text_len=32, dim=64, ffn_dim=128, freq_dim=32, text_dim=WIDTH, num_heads=2, num_layers=2,
                attn_mode="torch",
            )
        )
    )  # fmt: skip
    script.detect_wan_sd_dtype = lambda path: torch.float32
    latents = (16, 1, SIZE // 8, SIZE // 8)
    text = cache_io.save_text_encoder_output_cache_wan
    return (
        script.WanNetworkTrainer,
        model,
        "wan",
        latents,
        lambda item, latent: cache_io.save_latent_cache_wan(item, latent, None, None, None),
        text,
    )


def flux_2():
    from musubi_tuner import flux_2_train_network as script
    from musubi_tuner.dataset import architectures, cache_io

    name = architectures.ARCHITECTURE_FLUX_2_KLEIN_4B_FULL
    params = script.flux2_models.Flux2Params(
        context_in_dim=WIDTH, hidden_size=64, num_heads=2, depth=1, depth_single_blocks=2, axes_dim=[8, 8, 8, 8],
        mlp_ratio=2.0, use_guidance_embed=False,
    )  # fmt: skip
    model = seeded(lambda: script.flux2_models.Flux2(params, attn_mode="torch"))
    return (
        script.Flux2NetworkTrainer,
        model,
        "f2k4b",
        (128, SIZE // 16, SIZE // 16),
        lambda item, latent: cache_io.save_latent_cache_flux_2(item, latent, None, name),
        lambda item, text: cache_io.save_text_encoder_output_cache_flux_2(item, text, name),
    )


KINDS = {
    "zimage_train_network.py": z_image,
    "qwen_image_train_network.py": qwen_image,
    "wan_train_network.py": wan,
    "flux_2_train_network.py": flux_2,
}


def make_caches(folder, architecture, latents, save_latents, save_text):
    """Four pictures' latents and texts, drawn at random."""
    from musubi_tuner.dataset.image_video_dataset import ItemInfo

    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        stem = f"{folder}/{number}"
        item = ItemInfo(f"{number}.png", f"a thing {number}", (SIZE, SIZE), (SIZE, SIZE))
        item.latent_cache_path = f"{stem}_{SIZE:04d}x{SIZE:04d}_{architecture}.safetensors"
        item.text_encoder_output_cache_path = f"{stem}_{architecture}_te.safetensors"
        save_latents(item, torch.randn(latents, generator=generator))
        save_text(item, torch.randn((TOKENS, WIDTH), generator=generator))


def main():
    sys.argv = sys.argv[1:]
    script = sys.argv[0]
    sys.path[0] = os.path.join(os.getcwd(), "src")
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    import diffusers  # noqa: F401  (before torchvision is in reach, so that it is not asked for more)
    import transformers  # noqa: F401

    if os.environ.get("TORCHVISION"):
        sys.path.append(os.environ["TORCHVISION"])
    import_torchvision()
    trainer, model, architecture, *of_caches = KINDS[script]()
    trainer.load_transformer = lambda self, *rest, **options: model
    config = toml.load(sys.argv[sys.argv.index("--dataset_config") + 1])
    folder = Path(config["datasets"][0]["cache_directory"])
    if not folder.is_dir():
        folder.mkdir(parents=True)
        make_caches(folder, architecture, *of_caches)
    keep({"unet": model})
    if os.environ.get("TINY_LOSSES"):
        record_losses(os.environ["TINY_LOSSES"])
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
