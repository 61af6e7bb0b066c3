"""LoRA files: names, hashes, metadata, whole writes."""

import hashlib
import json

import pytest
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from base.tensor_files import file_hashes  # noqa: E402
from es_lora import weights  # noqa: E402
from network.lora_file import from_diffusers_names, load_lora, rename_text_encoder, save_lora  # noqa: E402
from network.metadata import build_metadata, minimum_metadata  # noqa: E402

NAME = "lora_unet_down_blocks_0_attentions_0_proj_in"


def one_module(rank=2):
    torch.manual_seed(0)
    return {
        f"{NAME}.alpha": torch.tensor(1.0),
        f"{NAME}.lora_down.weight": torch.randn(rank, 8, 1, 1),
        f"{NAME}.lora_up.weight": torch.randn(8, rank, 1, 1),
    }


def test_a_saved_file_comes_back_with_its_metadata_and_dtype(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_lora(path, one_module(), {"ss_epoch": 3}, torch.float16)
    tensors, metadata = load_lora(path)
    assert metadata["ss_epoch"] == "3"
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert all(torch.equal(tensors[name], value.half()) for name, value in one_module().items())


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_pickles_hold_tensors_only(tmp_path, suffix):
    path = tmp_path / f"lora{suffix}"
    save_lora(path, one_module())
    assert torch.load(path, weights_only=True).keys() == one_module().keys()
    assert load_lora(path)[0].keys() == one_module().keys()


def test_hashes_are_those_the_webuis_compute(tmp_path):
    path = tmp_path / "lora.safetensors"
    big = {"lora_unet_x.lora_down.weight": torch.randn(700, 700), "lora_unet_x.lora_up.weight": torch.randn(700, 700)}
    save_lora(path, big, {"ss_epoch": "1", "modelspec.title": "t"})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[8 + header :]).hexdigest()
    save_file(big, tmp_path / "only_ss.safetensors", {"ss_epoch": "1"})
    part = (tmp_path / "only_ss.safetensors").read_bytes()[0x100000 : 0x100000 + 0x10000]
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(part).hexdigest()[:8]


def test_model_hash_survives_an_edit_of_the_metadata(tmp_path):
    for title in ("one", "two"):
        save_lora(tmp_path / f"{title}.safetensors", one_module(), {"modelspec.title": title})
    first, second = (load_lora(tmp_path / f"{title}.safetensors")[1] for title in ("one", "two"))
    assert (
        first["sshs_model_hash"] == second["sshs_model_hash"] and first["modelspec.title"] != second["modelspec.title"]
    )


def test_checkpoint_hashes(tmp_path):
    path = tmp_path / "base.ckpt"
    content = bytes(range(256)) * 8192
    path.write_bytes(content)
    legacy = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert file_hashes(path) == (legacy, hashlib.sha256(content).hexdigest())


def test_a_failed_write_leaves_the_old_file_and_no_remains(tmp_path, monkeypatch):
    path = tmp_path / "lora.safetensors"
    save_lora(path, one_module())
    before = path.read_bytes()

    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_lora(path, {name: value + 1 for name, value in one_module().items()})
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "name, content, error, message",
    [
        ("missing.safetensors", None, FileNotFoundError, "does not exist"),
        ("torn.safetensors", b"\x10\x00\x00", ValueError, "not a readable safetensors file"),
        ("torn.pt", b"\x10\x00\x00", ValueError, "cannot be read as tensors only"),
    ],
)
def test_unreadable_loras_get_one_clear_message(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        load_lora(tmp_path / name)


def test_what_is_no_lora_is_refused(tmp_path):
    save_file({"conv_in.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a LoRA of kohya's or diffusers' naming .its first key: conv_in.weight"):
        load_lora(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="saved as .safetensors, .pt or .ckpt"):
        save_lora(tmp_path / "lora.bin", one_module())


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight",
         "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight"),
        ("unet.mid_block.attentions.0.proj_in.lora_B.default.weight",
         "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.up.weight",
         "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_up.weight"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight",
         "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"),
        ("text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora.down.weight",
         "lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_down.weight"),
        ("text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.up.weight",
         "lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_up.weight"),
        ("text_encoder.encoder.layers.3.mlp.fc1.lora_A.weight",
         "lora_te_text_model_encoder_layers_3_mlp_fc1.lora_down.weight"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc2.lora_A.weight",
         "lora_te2_text_model_encoder_layers_0_mlp_fc2.lora_down.weight"),
        ("unet.mid_block.attentions.0.proj_in.alpha", "lora_unet_mid_block_attentions_0_proj_in.alpha"),
    ],
)  # fmt: skip
def test_diffusers_names_become_kohyas(theirs, ours):
    assert list(from_diffusers_names({theirs: torch.ones(1, 1)})) == [ours]


def test_a_file_that_diffusers_saved_is_read(tmp_path):
    from diffusers import StableDiffusionPipeline

    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.randn(2, 8), f"{layer}.lora_B.weight": torch.randn(8, 2)}
    adapter = {"r": 2, "lora_alpha": 6, "target_modules": ["to_q"]}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=tensors, unet_lora_adapter_metadata=adapter)
    loaded, _ = load_lora(tmp_path / "pytorch_lora_weights.safetensors")
    name = "lora_unet_" + layer.replace(".", "_")
    assert torch.equal(loaded[f"{name}.lora_down.weight"], tensors[f"{layer}.lora_A.weight"])
    assert loaded[f"{name}.alpha"] == 6


def test_unknown_keys_in_a_diffusers_file_are_named():
    with pytest.raises(ValueError, match="the first is transformer.x"):
        from_diffusers_names({"unet.a.lora_A.weight": torch.ones(1), "transformer.x": torch.ones(1)})


def test_text_encoder_prefix_follows_the_network():
    tensors = {"lora_te_a.alpha": 1, "lora_te1_b.alpha": 2, "lora_unet_c.alpha": 3}
    assert list(rename_text_encoder(tensors, ["lora_te1_a", "lora_te1_b"])) == [
        "lora_te1_a.alpha", "lora_te1_b.alpha", "lora_unet_c.alpha",
    ]  # fmt: skip
    assert "lora_te_b.alpha" in rename_text_encoder(tensors, ["lora_te_b"])


SETTINGS = {
    "output_name": "me", "learning_rate": 1e-4, "unet_lr": None, "network_module": "networks.lora", "network_dim": 8,
    "network_alpha": 4.0, "v2": False, "v_parameterization": False, "seed": 7, "clip_skip": 2, "resolution": "512,640",
    "metadata_author": "someone", "metadata_license": None, "min_timestep": 100, "max_timestep": None,
}  # fmt: skip


def test_metadata_carries_flags_data_and_model_spec():
    data = {"num_train_images": 10, "tag_frequency": {"10_me": {"cat": 3}}, "ss_num_reg_images": 0}
    metadata = build_metadata(
        SETTINGS, base={"ss_sd_model_name": "base"}, network_args={"conv_dim": 4}, data=data, training={"steps": 12}
    )
    assert all(isinstance(value, str) for value in metadata.values())
    expected = {
        "ss_network_dim": "8", "ss_network_alpha": "4.0", "ss_unet_lr": "None", "ss_v2": "False", "ss_steps": "12",
        "ss_base_model_version": "sd_v1", "ss_sd_model_name": "base", "ss_num_train_images": "10",
        "ss_num_reg_images": "0", "ss_clip_skip": "2", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.sai_model_spec": "1.0.0", "modelspec.resolution": "512x640", "modelspec.title": "me",
        "modelspec.prediction_type": "epsilon", "modelspec.author": "someone", "modelspec.timestep_range": "100,1000",
        "modelspec.encoder_layer": "2", "modelspec.implementation": "diffusers",
    }  # fmt: skip
    assert {name: metadata[name] for name in expected} == expected
    assert json.loads(metadata["ss_tag_frequency"]) == {"10_me": {"cat": 3}}
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": 4}
    assert "modelspec.license" not in metadata


def test_metadata_of_the_velocity_model():
    metadata = build_metadata({"v2": True, "v_parameterization": True})
    assert metadata["ss_base_model_version"] == "sd_v2_v"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert (metadata["modelspec.prediction_type"], metadata["modelspec.resolution"]) == ("v", "768x768")


def test_no_metadata_leaves_nothing_about_the_data():
    metadata = minimum_metadata(build_metadata(SETTINGS, data={"tag_frequency": {"10_secret": {}}}))
    assert "ss_network_dim" in metadata and "modelspec.title" in metadata
    assert not any("secret" in value for value in metadata.values()) and "ss_seed" not in metadata
