"""Loading base models, and captions to text states."""

import shutil
from pathlib import Path

import pytest
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny_sd import original_layout, tiny_sd, tiny_tokenizer  # noqa: E402

from base import files, sd  # noqa: E402
from base.attention import set_attention  # noqa: E402
from base.files import load_clip_tokenizer  # noqa: E402
from base.sd import load_sd_model, load_vae  # noqa: E402
from base.single_file import CONFIG_ROOT, unet_original_names  # noqa: E402
from base.text_encoding import parse_weighted_caption, tokenize_chunks  # noqa: E402

LONG_CAPTION = "a photo of a red cat, " * 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "folder"
    model.save_pipeline(path)
    return path


def same_weights(first, second):
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def same_models(first, second):
    return (
        same_weights(first.unet, second.unet)
        and same_weights(first.vae, second.vae)
        and same_weights(first.text_encoders[0], second.text_encoders[0])
    )


def test_a_saved_folder_loads_equal_and_frozen(model, folder):
    loaded = load_sd_model(folder)
    assert same_models(model, loaded)
    assert not any(weight.requires_grad for weight in loaded.unet.parameters())
    assert not loaded.unet.training
    assert (loaded.vae_scale, loaded.prediction_type) == (8, "epsilon")
    assert (folder / "tokenizer" / "vocab.json").is_file() and (folder / "tokenizer" / "merges.txt").is_file()
    assert loaded.encode_text(["a cat"]).equal(model.encode_text(["a cat"]))


def test_noise_schedule_is_the_published_one(model):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - betas, dim=0)
    assert torch.allclose(model.alphas_cumprod.double(), expected, rtol=1e-4)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_loads_like_the_folder(model, folder, tmp_path, suffix):
    path = tmp_path / f"base{suffix}"
    tensors = original_layout(model)
    save_file(tensors, path) if suffix == ".safetensors" else torch.save({"state_dict": tensors}, path)
    shutil.copytree(folder, tmp_path / "base.config", ignore=shutil.ignore_patterns("*.safetensors"))
    loaded = load_sd_model(path)
    assert same_models(model, loaded)
    assert len(loaded.base_hashes["ss_new_sd_model_hash"]) == 64


def test_a_separate_vae_replaces_the_models_own(folder, tmp_path):
    other = tiny_sd(tmp_path / "other", seed=1)
    other.vae.save_pretrained(tmp_path / "vae_folder")
    loaded = load_sd_model(folder, vae=tmp_path / "vae_folder")
    assert same_weights(loaded.vae, other.vae)

    tensors = {
        name.removeprefix("first_stage_model."): value
        for name, value in original_layout(other).items()
        if name.startswith("first_stage_model.")
    }
    save_file(tensors, tmp_path / "vae.safetensors")
    shutil.copytree(folder, tmp_path / "vae.config", ignore=shutil.ignore_patterns("*.safetensors"))
    assert same_weights(load_vae(tmp_path / "vae.safetensors"), other.vae)


def test_a_pickle_with_code_is_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callback": Path("x")}, path)
    with pytest.raises(ValueError, match="tensors only"):
        load_sd_model(path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("broken.safetensors", b"not a model", "not a readable safetensors file"),
        ("notes.txt", b"hello", "allowed are .safetensors"),
    ],
)
def test_unreadable_files_get_one_clear_message(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_sd_model(tmp_path / name)


def test_missing_and_incomplete_bases_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_sd_model(tmp_path / "nowhere")
    shutil.copytree(folder, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "vae")
    with pytest.raises(FileNotFoundError, match="it lacks vae"):
        load_sd_model(tmp_path / "half")


def test_the_wrong_kind_of_file_is_named(tmp_path):
    save_file({"lora_unet_x.alpha": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="not a Stable Diffusion 1.x or 2.x checkpoint"):
        load_sd_model(tmp_path / "lora.safetensors")


def test_a_file_of_another_size_is_refused_before_it_is_loaded(model, tmp_path):
    tensors = original_layout(model)
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    tensors[key] = torch.zeros(320, 768)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="does not have the shape of sd1"):
        load_sd_model(tmp_path / "odd.safetensors")


def test_a_missing_vocabulary_says_which_files_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "hub_answers", lambda: False)
    monkeypatch.setattr(files, "CLIP_VOCABULARY", "openai/clip-not-in-any-cache")
    with pytest.raises(FileNotFoundError, match="Put vocab.json and merges.txt of openai/clip"):
        load_clip_tokenizer(tokenizer_cache_dir=tmp_path)


def test_the_vocabulary_is_found_in_the_cache_folder_of_kohyas_naming(tmp_path):
    tiny_tokenizer(tmp_path / "openai_clip-vit-large-patch14")
    assert load_clip_tokenizer(tokenizer_cache_dir=tmp_path)("cat").input_ids


def test_shipped_configurations_have_the_published_sizes():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    def count(model):
        return sum(weight.numel() for weight in model.parameters())

    with torch.device("meta"):
        for name, unet_size, text_size in (("sd1", 859_520_964, 123_060_480), ("sd2_v", 865_910_724, 340_387_840)):
            config = CONFIG_ROOT / name
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config / "unet"))
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(config / "vae"))
            text = CLIPTextModel(CLIPTextConfig.from_pretrained(config / "text_encoder"))
            assert (count(unet), count(vae), count(text)) == (unet_size, 83_653_863, text_size)


def test_original_names_lead_back_to_the_checkpoint(model):
    tensors = original_layout(model)
    names = unet_original_names(tensors)
    for name, value in model.unet.state_dict().items():
        assert tensors[names[name]] is not None and torch.equal(tensors[names[name]], value)


def test_version_flags_are_checked(folder):
    model = load_sd_model(folder)
    model.unet.register_to_config(cross_attention_dim=1024)
    with pytest.raises(ValueError, match="add --v2"):
        sd._check_version("base", model.unet, v2=False)
    model.unet.register_to_config(cross_attention_dim=768)
    with pytest.raises(ValueError, match="leave --v2 out"):
        sd._check_version("base", model.unet, v2=True)


def test_velocity_prediction_comes_from_the_flag_or_the_folder(folder):
    assert load_sd_model(folder, v_parameterization=True).prediction_type == "v_prediction"


def test_every_attention_gives_the_same_noise(model):
    latents, steps, states = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), model.encode_text(["a cat", "a dog"])
    outputs = []
    for kind in ("plain", "sliced", "sdpa"):
        set_attention(model.unet, kind)
        outputs.append(model.predict_noise(latents, steps, states))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5) and torch.allclose(outputs[0], outputs[2], atol=1e-5)
    with pytest.raises(ValueError, match="allowed are sdpa"):
        set_attention(model.unet, "flash")


def test_images_to_latents_and_back(model):
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = model.encode_images(pixels, torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, 8, 8)
    assert latents.equal(model.encode_images(pixels, torch.Generator().manual_seed(0)))
    mean = model.vae.encode(pixels).latent_dist.mean * 0.18215
    assert not latents.equal(mean)  # a sample of the posterior
    assert model.decode_latents(latents).shape == pixels.shape
    with pytest.raises(ValueError, match="--no_half_vae"):
        model.encode_images(torch.full((1, 3, 64, 64), float("nan")))


# ---- captions


def literal_chunks(tokenizer, caption, chunks):
    """The chunks by way of the tokenizer's own padding and truncation, as kohya's trainers make
    them."""
    length = 75 * chunks + 2
    ids = tokenizer(caption, padding="max_length", truncation=True, max_length=length).input_ids
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = []
    for start in range(1, length - 1, 75):
        row = [bos] + ids[start : start + 75] + [ids[-1]]
        if pad != eos:
            if row[-2] not in (eos, pad):
                row[-1] = eos
            if row[1] == pad:
                row[1] = eos
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("caption", ["", "a cat", "a photo of a dog " * 20, LONG_CAPTION * 3])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_chunks_equal_the_tokenizers_padding(tmp_path, pad_token, caption, chunks):
    tokenizer = tiny_tokenizer(tmp_path, pad_token)
    ids, weights = tokenize_chunks(tokenizer, caption, chunks)
    assert ids.tolist() == literal_chunks(tokenizer, caption, chunks).tolist()
    assert weights.tolist() == [1.0] * (75 * chunks + 2)


def test_states_of_three_chunks_join_to_one_caption(model):
    tokenizer, encoder = model.tokenizers[0], model.text_encoders[0]
    states = model.encode_text([LONG_CAPTION, "a cat"], max_token_length=225)
    assert states.shape == (2, 227, 32)
    ids = literal_chunks(tokenizer, LONG_CAPTION, 3)
    chunks = encoder(ids).last_hidden_state
    expected = torch.cat([chunks[0, :1], chunks[0, 1:-1], chunks[1, 1:-1], chunks[2, 1:-1], chunks[2, -1:]])
    assert torch.allclose(states[0], expected, atol=1e-6)
    with pytest.raises(ValueError, match="allowed are 75, 150 and 225"):
        model.encode_text(["a"], max_token_length=100)


def test_clip_skip_takes_an_earlier_layer_and_its_final_norm(model):
    encoder = model.text_encoders[0]
    ids = literal_chunks(model.tokenizers[0], "a cat", 1)
    hidden = encoder(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(model.encode_text(["a cat"], clip_skip=2), encoder.final_layer_norm(hidden[-2]), atol=1e-6)
    assert torch.equal(model.encode_text(["a cat"], clip_skip=1), model.encode_text(["a cat"]))
    with pytest.raises(ValueError, match="1 to 2 is allowed"):
        model.encode_text(["a cat"], clip_skip=3)


@pytest.mark.parametrize(
    "caption, pieces",
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (cat:1.3) tree", [("a ", 1.0), ("cat", 1.3), (" tree", 1.0)]),
        ("(cat)", [("cat", 1.1)]),
        ("((cat))", [("cat", 1.1 * 1.1)]),
        ("[cat]", [("cat", 1 / 1.1)]),
        ("(a [cat] b:2)", [("a ", 2.0), ("cat", 2 / 1.1), (" b", 2.0)]),
        (r"cat \(animal\)", [("cat (animal)", 1.0)]),
        ("a (cat", [("a ", 1.0), ("cat", 1.1)]),
        ("ratio 3:4 :)", [("ratio 3:4 :)", 1.0)]),
        ("", [("", 1.0)]),
    ],
)
def test_weighted_syntax(caption, pieces):
    parsed = parse_weighted_caption(caption)
    assert [text for text, _ in parsed] == [text for text, _ in pieces]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in pieces])


def test_weights_scale_their_words_and_keep_the_mean(model):
    plain = model.encode_text(["a cat"])
    weighted = model.encode_text(["a (cat:1.5)"], weighted=True)
    assert torch.allclose(weighted.mean(), plain.mean(), atol=1e-6)
    factors = (weighted / plain)[0].median(dim=1).values  # BOS, a, cat, EOS ...
    assert torch.allclose(factors[2] / factors[1], torch.tensor(1.5), atol=1e-4)
    assert torch.allclose(factors[0] / factors[1], torch.tensor(1.0), atol=1e-4)
    assert torch.allclose(model.encode_text(["a cat"], weighted=True), plain, atol=1e-6)
