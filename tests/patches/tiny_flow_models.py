"""Tiny random models of the structures that sd-scripts' newer trainers train, in place of the ones
they would load: FLUX.1, Stable Diffusion 3, Lumina Image 2. Used by tiny_trainer.py."""

import torch
from tiny_trainer import drawn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel


def seeded(make):
    """`make`, whatever it is given, with the same weights in each run."""

    def loader(*rest, **options):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return make()

    return loader


def clip(kind, width):
    return kind(
        CLIPTextConfig(
            vocab_size=600, hidden_size=width, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            projection_dim=width, bos_token_id=598, eos_token_id=599, pad_token_id=599,
        )
    )  # fmt: skip


def t5(width):
    config = T5Config(vocab_size=200, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    return T5EncoderModel(config)


def unigram_tokenizer(kind):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127))]
    raw = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    return kind(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64)


def give_t5_tokenizer():
    from library.strategy_base import TokenizeStrategy
    from transformers import PreTrainedTokenizerFast, T5TokenizerFast

    load = TokenizeStrategy._load_tokenizer

    def load_or_make(self, model_class, *rest, **options):
        if model_class is T5TokenizerFast:
            return unigram_tokenizer(PreTrainedTokenizerFast)
        return load(self, model_class, *rest, **options)

    TokenizeStrategy._load_tokenizer = load_or_make


def autoencoder():
    from library import flux_models

    return flux_models.AutoEncoder(
        flux_models.AutoEncoderParams(
            resolution=64, in_channels=3, ch=32, out_ch=3, ch_mult=[1, 1, 1, 1], num_res_blocks=1, z_channels=16,
            scale_factor=0.36, shift_factor=0.11,
        )
    )  # fmt: skip


def flux():
    from library import flux_models

    return flux_models.Flux(
        flux_models.FluxParams(
            in_channels=64, vec_in_dim=32, context_in_dim=32, hidden_size=64, mlp_ratio=2.0, num_heads=2, depth=1,
            depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000, qkv_bias=True, guidance_embed=True,
        )
    )  # fmt: skip


def prepare_flux(keep):
    from library import flux_utils

    give_t5_tokenizer()
    models = {"unet": seeded(flux)(), "te1": seeded(lambda: clip(CLIPTextModel, 32))()}
    flux_utils.analyze_checkpoint_state = lambda path: (False, False, (1, 2), [])
    flux_utils.load_flow_model = lambda *rest, **options: (False, models["unet"])
    flux_utils.load_clip_l = lambda *rest, **options: models["te1"]
    flux_utils.load_t5xxl, flux_utils.load_ae = seeded(lambda: t5(32)), seeded(autoencoder)
    keep(models)


def prepare_sd3(keep):
    from library import safetensors_utils, sd3_models, sd3_utils

    give_t5_tokenizer()

    def mmdit():
        # Its width is 64 times its depth; texts are padded to T5-XXL's width.
        return sd3_models.MMDiT(
            input_size=None, pos_embed_max_size=16, patch_size=2, in_channels=16, adm_in_channels=32, depth=2,
            context_embedder_in_features=4096, context_embedder_out_features=128, mlp_ratio=2, qk_norm="rms",
            num_patches=256, model_type="medium",
        )  # fmt: skip

    kind = CLIPTextModelWithProjection
    models = {
        "unet": seeded(lambda: drawn(mmdit()))(),
        "te1": seeded(lambda: clip(kind, 16))(),
        "te2": seeded(lambda: clip(kind, 16))(),
    }
    safetensors_utils.load_safetensors = lambda *rest, **options: {}
    sd3_utils.load_mmdit = lambda *rest, **options: models["unet"]
    sd3_utils.load_clip_l = lambda *rest, **options: models["te1"]
    sd3_utils.load_clip_g = lambda *rest, **options: models["te2"]
    sd3_utils.load_t5xxl, sd3_utils.load_vae = seeded(lambda: t5(4096)), seeded(lambda: drawn(sd3_models.SDVAE()))
    keep(models)


def prepare_lumina(keep):
    import transformers
    from library import lumina_models, lumina_util, strategy_lumina

    def gemma():
        return transformers.Gemma2Model(
            transformers.Gemma2Config(
                vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, head_dim=16,
            )
        )  # fmt: skip

    def next_dit():
        return lumina_models.NextDiT(
            patch_size=2, in_channels=16, dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            multiple_of=32, cap_feat_dim=32, axes_dims=[8, 12, 12], axes_lens=[300, 64, 64],
        )  # fmt: skip

    words = unigram_tokenizer(transformers.PreTrainedTokenizerFast)
    strategy_lumina.AutoTokenizer = type("Tokenizers", (), {"from_pretrained": lambda *rest, **options: words})
    models = {"unet": seeded(next_dit)(), "te": seeded(gemma)()}
    lumina_util.load_lumina_model = lambda *rest, **options: models["unet"]
    lumina_util.load_gemma2 = lambda *rest, **options: models["te"]
    lumina_util.load_ae = seeded(autoencoder)
    keep(models)


PREPARE = {
    "flux_train_network.py": prepare_flux,
    "sd3_train_network.py": prepare_sd3,
    "lumina_train_network.py": prepare_lumina,
}
