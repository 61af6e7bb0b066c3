"""The configuration that kohya_ss's GUI writes for each run is taken whole."""

import logging

import pytest
import toml

from settings.checks import REJECTED
from settings.flags import build_parser
from settings.kohya_gui import OFF_AT_ZERO, OTHER_FAMILIES, SDXL_ONLY, WITHOUT_FLAG
from settings.parsing import parse_arguments

# Every key that the GUI writes for SD 1.x.
WRITTEN = {
    "adaptive_noise_scale": 0.01,
    "bucket_no_upscale": True,
    "bucket_reso_steps": 64,
    "cache_latents": True,
    "cache_latents_to_disk": True,
    "caption_dropout_every_n_epochs": 2,
    "caption_dropout_rate": 0.1,
    "caption_extension": ".txt",
    "clip_skip": 1,
    "debiased_estimation_loss": True,
    "dynamo_backend": "no",
    "enable_bucket": True,
    "epoch": 10,
    "flip_aug": True,
    "full_bf16": True,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "highvram": True,
    "huber_c": 0.1,
    "huber_scale": 1,
    "huber_schedule": "snr",
    "ip_noise_gamma": 0.1,
    "ip_noise_gamma_random_strength": True,
    "keep_tokens": 1,
    "learning_rate": 0.0001,
    "log_config": True,
    "log_tracker_name": "tracker",
    "log_with": "tensorboard",
    "logging_dir": "logs",
    "loss_type": "l2",
    "lr_scheduler": "cosine",
    "lr_scheduler_args": [],
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1,
    "lr_scheduler_type": "",
    "lr_warmup_steps": 160,
    "max_bucket_reso": 2048,
    "max_data_loader_n_workers": 0,
    "max_grad_norm": 1,
    "max_timestep": 1000,
    "max_token_length": 75,
    "max_train_epochs": 10,
    "max_train_steps": 1600,
    "metadata_author": "me",
    "metadata_description": "it",
    "metadata_license": "MIT",
    "metadata_tags": "a,b",
    "metadata_title": "title",
    "min_bucket_reso": 256,
    "min_snr_gamma": 5,
    "min_timestep": 10,
    "mixed_precision": "bf16",
    "multires_noise_discount": 0.3,
    "multires_noise_iterations": 6,
    "network_alpha": 1,
    "network_args": [],
    "network_dim": 8,
    "network_dropout": 0.1,
    "network_module": "networks.lora",
    "no_half_vae": True,
    "noise_offset": 0.05,
    "noise_offset_random_strength": True,
    "noise_offset_type": "Original",
    "optimizer_args": [],
    "optimizer_type": "AdamW",
    "output_dir": "out",
    "output_name": "last",
    "persistent_data_loader_workers": 1,
    "pretrained_model_name_or_path": "owner/base",
    "prior_loss_weight": 1,
    "resolution": "512,512",
    "sample_every_n_epochs": 1,
    "sample_every_n_steps": 100.0,
    "sample_prompts": "",
    "sample_sampler": "euler_a",
    "save_every_n_epochs": 1,
    "save_every_n_steps": 100,
    "save_last_n_epochs": 2,
    "save_last_n_epochs_state": 2,
    "save_last_n_steps": 2,
    "save_last_n_steps_state": 2,
    "save_model_as": "safetensors",
    "save_precision": "bf16",
    "save_state": True,
    "save_state_on_train_end": True,
    "scale_weight_norms": 1,
    "sdpa": True,
    "seed": 1234,
    "shuffle_caption": True,
    "stop_text_encoder_training": 50,
    "text_encoder_lr": [0.0001, 0.0001],
    "train_batch_size": 1,
    "training_comment": "comment",
    "unet_lr": 0.0001,
    "vae_batch_size": 4,
    "wandb_api_key": "key",
    "wandb_run_name": "last",
    "weighted_captions": True,
}
# Keys of the GUI that are not in the file above, as they exclude others or need a file.
SEPARATE = {
    "cache_text_encoder_outputs": (True, ["--network_train_unet_only"]),
    "color_aug": (True, []),
    "fp8_base": (False, []),
    "full_fp16": (True, ["--mixed_precision", "fp16"]),
    "masked_loss": (True, ["--alpha_mask"]),
    "mem_eff_attn": (True, []),
    "network_train_text_encoder_only": (True, []),
    "network_train_unet_only": (True, []),
    "random_crop": (True, []),
    "scale_v_pred_loss_like_noise_pred": (True, ["--v_parameterization"]),
    "v2": (True, []),
    "v_parameterization": (True, []),
    "v_pred_like_loss": (0.1, []),
}
PATHS = "dataset_config log_tracker_config network_weights reg_data_dir resume vae".split()


@pytest.fixture
def parsed(tmp_path):
    (tmp_path / "images").mkdir()

    def parse(values, *words, sdxl=False):
        (tmp_path / "gui.toml").write_text(toml.dumps(values))
        needed = ["--train_data_dir", str(tmp_path / "images"), "--config_file", str(tmp_path / "gui.toml")]
        if "output_dir" not in values:
            needed += ["--output_dir", "out", "--resolution", "64", "--pretrained_model_name_or_path", "owner/base"]
        return parse_arguments([*needed, *words], sdxl)

    return parse


def test_every_key_that_the_gui_writes_is_taken(parsed, caplog):
    with caplog.at_level(logging.WARNING):
        args = parsed(WRITTEN)
    assert (args.max_train_epochs, args.max_train_steps, args.max_token_length) == (10, 1600, 75)
    assert (args.text_encoder_lr, args.persistent_data_loader_workers, args.sample_every_n_steps) == (1e-4, True, 100)
    assert "stop_text_encoder_training is not used: " in caplog.text and "noise_offset_type" not in caplog.text
    known = {action.dest for action in build_parser(sdxl=True)._actions}
    assert set(WRITTEN) | set(SEPARATE) <= known | set(WITHOUT_FLAG) | {"epoch"}


@pytest.mark.parametrize("key", SEPARATE)
def test_keys_that_exclude_others_are_taken_alone(parsed, key):
    value, words = SEPARATE[key]
    assert getattr(parsed({key: value}, *words, sdxl=key.startswith("cache_text")), key) == value


@pytest.mark.parametrize(
    "key", [*PATHS, *REJECTED, *OTHER_FAMILIES, *SDXL_ONLY, *WITHOUT_FLAG, "train_inpainting", "log_with"]
)
def test_an_empty_text_means_off(parsed, key):
    assert parsed({key: ""}) == parsed({})


@pytest.mark.parametrize("key", OFF_AT_ZERO)
def test_a_zero_means_off(parsed, key):
    assert vars(parsed({key: 0})) == vars(parsed({}))


def test_a_length_of_zero_is_off_beside_another_and_refused_alone(parsed):
    assert parsed({"max_train_epochs": 0, "max_train_steps": 30}).max_train_steps == 30
    assert parsed({"max_train_epochs": 3, "max_train_steps": 0}).max_train_epochs == 3
    assert parsed({"max_train_steps": 0, "epoch": 3}).max_train_epochs == 3
    for length in ("max_train_steps", "max_train_epochs"):
        with pytest.raises(ValueError, match=f"--{length} 0 is not allowed"):
            parsed({length: 0})


def test_epoch_counts_where_nothing_else_says_how_long(parsed):
    assert parsed({"epoch": 3}).max_train_epochs == 3
    assert parsed({"epoch": 3, "max_train_steps": 30}).max_train_epochs is None
    assert parsed({"epoch": 3}, "--max_train_steps", "30").max_train_epochs is None
    assert parsed({"epoch": 3}, "--max_train_epochs", "2").max_train_epochs == 2


def test_the_clip_skip_that_the_gui_writes_for_sdxl_is_no_clip_skip(parsed):
    assert parsed({"clip_skip": 1}, sdxl=True).clip_skip is None
    with pytest.raises(ValueError, match="SDXL always takes the penultimate layer"):
        parsed({"clip_skip": 2}, sdxl=True)


@pytest.mark.parametrize("written", [{"xformers": True}, {"xformers": "xformers"}])
def test_sdpa_stands_in_for_the_guis_xformers_where_that_cannot_be_used(parsed, caplog, monkeypatch, written):
    monkeypatch.setattr("settings.kohya_gui.xformers_works", lambda: False)
    args = parsed(written)
    assert (args.sdpa, args.xformers) == (True, False) and "sdpa computes the same attention" in caplog.text
    monkeypatch.setattr("settings.kohya_gui.xformers_works", lambda: True)
    assert parsed(written).xformers is True and parsed({}, "--xformers").xformers is True


@pytest.mark.parametrize("name", ["sdpa", "mem_eff_attn", "none"])
def test_the_guis_own_files_name_the_attention(parsed, name):
    args = parsed({"xformers": name})
    assert args.xformers is False and (args.sdpa, args.mem_eff_attn) == (name == "sdpa", name == "mem_eff_attn")


def test_what_is_not_supported_is_refused_with_the_reason(parsed):
    with pytest.raises(ValueError) as caught:
        parsed({"t5xxl": "t5.safetensors", "train_inpainting": True, "cache_text_encoder_outputs": True})
    assert "cache_text_encoder_outputs is not supported: it is a setting of es_lora_sdxl.py" in str(caught.value)
    assert "t5xxl is not supported: it belongs to another kind of base" in str(caught.value)
    assert "train_inpainting is not supported: inpainting" in str(caught.value)
    with pytest.raises(ValueError) as caught:
        parsed({"resume_from_huggingface": "owner/state", "fp8_base": True, "huggingface_token": "hf_x"})
    for name in ("resume_from_huggingface", "fp8_base", "huggingface_token"):
        assert f"--{name} is not supported: " in str(caught.value)


@pytest.mark.parametrize("key", ["flip_aug", "network_dim", "epochs", "noise_ofset_type"])
def test_what_is_no_value_or_no_key_is_still_refused(parsed, key):
    with pytest.raises(ValueError, match=key):
        parsed({key: "yes"})


BAD_FILES = {
    '{"network_dim": 8}': "It is JSON: convert it",
    'train_data_dir = "C:\\pictures\\cats"\n': "between single quotes",
    'train_data_dir = "D:\\temp"\n': "between single quotes",
    'train_data_dir = "data\\images"\n': "between single quotes",
    'train_data_dir = "data\\train"\n': "between single quotes",
}


@pytest.mark.parametrize("text", BAD_FILES)
@pytest.mark.parametrize("flag", ["config_file", "dataset_config", "sample_prompts", "log_tracker_config"])
def test_json_and_windows_paths_are_refused_with_the_fix_in_every_toml_file(tmp_path, text, flag):
    from settings.toml_files import read_toml

    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_toml(tmp_path / "run.toml", f"--{flag}")
    assert BAD_FILES[text] in str(caught.value) and f"--{flag} {tmp_path}/run.toml" in str(caught.value)
    (tmp_path / "run.toml").write_text("train_data_dir = 'C:\\pictures\\cats'\n")
    assert read_toml(tmp_path / "run.toml", "--config_file") == {"train_data_dir": "C:\\pictures\\cats"}
