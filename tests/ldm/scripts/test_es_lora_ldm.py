"""Whole runs of the trainer on a tiny random model: what they leave, and that they repeat bit for
bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ldm_runs import history_of, make_pictures, reset_accelerate, run, train, words
from literal_average import is_average

from network.lora_file import load_lora


def tensors(path):
    return load_lora(path)[0]


def paths(result):
    return {what: weights["path"] for what, weights in result["files"].items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


EARLY = dict(early_stop=True, stop_rule="second-valley", window_size=3, cs_interval=1, max_train_steps=40)


@pytest.fixture(scope="module")
def stopped(base, images, tmp_path_factory):
    """A run that stops early; (folder, result)."""
    out = tmp_path_factory.mktemp("stopped")
    prompts = out / "prompts.txt"
    prompts.write_text("a cat --s 2 --d 7\na dog --s 2\n")
    result = train(
        base, images, out, **EARLY, sample_prompts=str(prompts), logging_dir=str(out / "logs"), log_with="tensorboard"
    )
    return out, result


def test_early_stop_keeps_the_weights_of_the_turning_point(stopped, base, images, tmp_path):
    out, result = stopped
    assert result["outcome"] == "stopped_early" and result["exit_code"] == 0
    assert result["files"]["kept"]["step"] == result["keep_step"] < result["detected_step"] == result["last_step"] < 40
    train(base, images, tmp_path, max_train_steps=result["keep_step"])
    assert same(tensors(out / "lora.safetensors"), tensors(tmp_path / "lora.safetensors"))
    assert not same(tensors(out / "lora.safetensors"), tensors(out / "lora-last.safetensors"))


def test_early_stop_leaves_result_history_report_and_pictures(stopped):
    out, result = stopped
    assert set(result["parts"]) == {"unet", "te"} and result["parts"]["unet"]["turning_step"] == result["keep_step"]
    assert paths(result) == {"kept": "lora.safetensors", "last": "lora-last.safetensors"}
    assert result["settings"]["network_alpha"] == 4 and result["seed"] == 1 and "torch" in result["versions"]
    header = json.loads((out / "cs_history.jsonl").read_text().splitlines()[0])
    assert header["decided_on"] == "unet" and header["steps_per_epoch"] == 3
    report = (out / "report.html").read_text()
    assert report.count("data:image/png") == 6  # two prompts: without LoRA, turning point, last
    assert "turning point: a cat (seed 7)" in report and "text" in report
    assert len(list((out / "sample").glob("*.png"))) == 6
    assert not (out / "cs_snapshots").exists()
    assert not [path for path in out.rglob("*") if path.name.endswith((".part", ".tmp"))]


def test_early_stop_writes_tensorboard_scalars(stopped):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, result = stopped
    (file,) = (out / "logs").rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"unet_cs/step", "te_cs/step", "total_cs/step", "cs_fluctuation/step", "lr/unet", "lr/textencoder"} <= tags
    measured = history_of(out)
    assert [e.step for e in events.Scalars("unet_cs/step")] == [record["step"] for record in measured]
    assert events.Scalars("unet_cs/step")[-1].value == pytest.approx(measured[-1]["cs"]["unet"], rel=1e-5)


def test_the_file_is_kohyas(stopped):
    out, result = stopped
    state, metadata = load_lora(out / "lora.safetensors")
    modules = {name.partition(".")[0] for name in state}
    assert len(state) == 3 * len(modules)
    assert {name.split("_")[1] for name in modules} == {"unet", "te"}
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_num_train_images"] == "6" and metadata["ss_steps"] == str(result["keep_step"])
    assert (
        metadata["es_lora_keep_step"] == metadata["es_lora_step"] == metadata["ss_steps"]
        and metadata["sshs_model_hash"]
    )
    last = load_lora(out / "lora-last.safetensors")[1]
    assert last["ss_steps"] == last["es_lora_step"] == str(result["last_step"])
    assert last["es_lora_keep_step"] == metadata["ss_steps"]


STEPS = dict(save_every_n_steps=1, save_precision="float")


def step_files(folder, last):
    return [tensors(folder / f"lora-step{step:08d}.safetensors") for step in range(1, last + 1)]


def test_an_average_of_the_steps_own_files_is_kept(stopped, base, images, tmp_path):
    result = train(base, images, tmp_path, **EARLY, **STEPS, average=0.25)
    assert result["keep_step"] == stopped[1]["keep_step"] and result["outcome"] == "stopped_early"
    steps = step_files(tmp_path, result["last_step"])
    assert is_average(tensors(tmp_path / "lora.safetensors"), steps[: result["keep_step"]], 0.25)
    assert same(tensors(tmp_path / "lora-last.safetensors"), steps[-1])
    assert same(steps[-1], tensors(stopped[0] / "lora-last.safetensors"))  # averaging changes nothing in the training
    assert {what: entry["averaged"] for what, entry in result["files"].items()} == {"kept": True, "last": False}
    assert load_lora(tmp_path / "lora.safetensors")[1]["es_lora_averaged"] == "True"


@pytest.mark.parametrize("network", [{}, dict(network_module="lycoris.kohya", network_args=["algo=loha"])])
def test_at_the_end_of_the_budget_the_average_is_kept(base, images, tmp_path, network):
    more = {**network, "network_alpha": 4}
    result = train(base, images, tmp_path, **STEPS, early_stop=True, average=0.4, max_train_steps=6, **more)
    assert result["outcome"] == "no_turning_point"
    assert paths(result) == {"kept": "lora.safetensors", "last": "lora-last.safetensors"}
    steps = step_files(tmp_path, 6)
    assert is_average(tensors(tmp_path / "lora.safetensors"), steps, 0.4)
    assert same(tensors(tmp_path / "lora-last.safetensors"), steps[-1])


def test_without_early_stop_the_full_run_is_the_result(stopped, base, images, tmp_path):
    out, early = stopped
    result = train(
        base, images, tmp_path, **{**EARLY, "early_stop": False, "calculate_cs": True, "max_train_steps": 25}
    )
    assert result["outcome"] == "budget_reached" and result["files"]["kept"]["step"] == result["last_step"] == 25
    assert result["keep_step"] == early["keep_step"] == result["files"]["turning_point"]["step"]
    assert paths(result) == {"kept": "lora.safetensors", "turning_point": "lora-turning-point.safetensors"}
    assert same(tensors(tmp_path / "lora-turning-point.safetensors"), tensors(out / "lora.safetensors"))


def test_no_turning_point_leaves_one_file_and_says_so(base, images, tmp_path, capsys):
    result = train(base, images, tmp_path, early_stop=True, stop_rule="second-valley", max_train_steps=6)
    assert result["outcome"] == "no_turning_point" and paths(result) == {"kept": "lora.safetensors"}
    output = capsys.readouterr().out
    assert "too short for the rule" in output and "No evidence of overfitting yet" in output and "Try it:" in output


def test_measuring_does_not_change_training(base, images, tmp_path):
    train(base, images, tmp_path / "a", network_dropout=0.2)
    train(base, images, tmp_path / "b", network_dropout=0.2, calculate_cs=True, cs_interval=1)
    assert same(tensors(tmp_path / "a/lora.safetensors"), tensors(tmp_path / "b/lora.safetensors"))


@pytest.fixture
def states(monkeypatch, tmp_path):
    """A folder with a copy of every state as it was when it was saved: later ones take the
    snapshots over."""
    from training import loop

    save = loop.save_state

    def saved_and_copied(folder, *words):
        save(folder, *words)
        if not (tmp_path / "states" / folder.name).exists():
            shutil.copytree(folder, tmp_path / "states" / folder.name)

    monkeypatch.setattr(loop, "save_state", saved_and_copied)
    return tmp_path / "states"


RANDOM = dict(
    network_dropout=0.1, shuffle_caption=True, flip_aug=True, caption_tag_dropout_rate=0.2, calculate_cs=True,
    cs_interval=1,
    lr_scheduler="cosine", lr_warmup_steps=2, noise_offset=0.1, window_size=2, network_args=["rank_dropout=0.1"],
)  # fmt: skip


BLOCKS = [
    "block_dims=" + ",".join("0123" + "4" * 21),
    "conv_block_dims=" + ",".join("2" * 25),
    "down_lr_weight=cosine+.25",
    "loraplus_lr_ratio=4",
]


@pytest.mark.parametrize(
    "changes",
    [
        dict(average=0.25, network_args=BLOCKS),
        dict(cache_latents=False, color_aug=True, max_data_loader_n_workers=0),
        dict(gradient_accumulation_steps=2),
    ],
    ids=["cached", "augmented", "accumulated"],
)
def test_resumed_equals_uninterrupted(base, images, tmp_path, states, changes):
    settings = {**RANDOM, **changes, "max_train_steps": 16, "save_every_n_steps": 5, "save_state": True}
    train(base, images, tmp_path / "whole", **settings)
    train(base, images, tmp_path / "again", **settings, resume=str(states / "lora-step00000005-state"))
    assert same(tensors(tmp_path / "whole/lora.safetensors"), tensors(tmp_path / "again/lora.safetensors"))
    assert history_of(tmp_path / "whole") == history_of(tmp_path / "again")
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "again"))
    assert one["keep_step"] == two["keep_step"] and one["parts"] == two["parts"]


def test_resume_after_the_decision_still_has_its_weights(base, images, tmp_path, states):
    settings = dict(
        calculate_cs=True, window_size=3, cs_interval=1, max_train_steps=30, save_every_n_steps=25, save_state=True
    )
    train(base, images, tmp_path / "whole", **settings)
    train(base, images, tmp_path / "again", **settings, resume=str(states / "lora-step00000025-state"))
    names = ("lora.safetensors", "lora-turning-point.safetensors")
    assert all(same(tensors(tmp_path / "whole" / name), tensors(tmp_path / "again" / name)) for name in names)


def test_accumulation_equals_batch(base, tmp_path):
    images = make_pictures(tmp_path / "images", count=4, repeats=3)
    one = dict(calculate_cs=True, cs_interval=1, max_train_steps=8, noise_offset=0.1)
    train(base, images, tmp_path / "batch", **one, train_batch_size=12)
    train(base, images, tmp_path / "accumulated", **one, train_batch_size=3, gradient_accumulation_steps=4)
    trajectories = [
        [record["cs"]["unet"] for record in history_of(tmp_path / name)] for name in ("batch", "accumulated")
    ]
    assert trajectories[0] == pytest.approx(trajectories[1], rel=1e-3, abs=1e-6)
    losses = [history_of(tmp_path / name, "loss") for name in ("batch", "accumulated")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_previews_and_validation_leave_the_losses_alone(base, images, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 2\n")
    common = dict(calculate_cs=True, cs_interval=1, network_dropout=0.2, validation_split=0.34)
    common.update(sample_sampler="euler_a", stop_rule="second-valley")  # which decides nothing in so few steps
    train(base, images, tmp_path / "plain", **common, validate_every_n_steps=1000)
    shown = dict(sample_prompts=str(prompts), sample_every_n_steps=2, sample_at_first=True, validate_every_n_steps=1)
    train(base, images, tmp_path / "shown", **common, **shown)
    assert history_of(tmp_path / "plain", "loss") == history_of(tmp_path / "shown", "loss")
    assert same(tensors(tmp_path / "plain/lora.safetensors"), tensors(tmp_path / "shown/lora.safetensors"))
    lines = [json.loads(line) for line in (tmp_path / "shown/cs_history.jsonl").read_text().splitlines()]
    heldout = [line["heldout_loss"] for line in lines if line.get("event") == "evaluation"]
    assert len(heldout) == 9 and all(value > 0 for value in heldout) and len(set(heldout)) > 1
    assert (
        len(list((tmp_path / "shown/sample").glob("*.png"))) == 1 + 4 + 2
    )  # at first, steps 2 4 6 8, without and last


def test_every_epoch_is_validated_and_shown(base, images, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 1\n")
    epochs = dict(max_train_epochs=3, max_train_steps=None, validation_split=0.34, calculate_cs=True)
    train(base, images, tmp_path / "out", **epochs, sample_prompts=str(prompts), sample_every_n_epochs=1)
    lines = [json.loads(line) for line in (tmp_path / "out/cs_history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("event") == "evaluation"] == [2, 4, 6]
    shown = sorted(path.name for path in (tmp_path / "out/sample").glob("lora-0*"))
    assert shown == [f"lora-00000{epoch}_00_1.png" for epoch in (1, 2, 3)]


def test_divergence_keeps_finite_weights(base, images, tmp_path, capsys):
    assert (
        run(
            base, images, tmp_path, learning_rate=1e30, optimizer_type="SGDNesterov", calculate_cs=True, max_grad_norm=0
        )
        == 3
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["outcome"] == "diverged" and result["exit_code"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in tensors(tmp_path / "lora.safetensors").values())
    assert "Training diverged at step 1: NaN or Inf" in capsys.readouterr().out


def test_checkpoints_are_named_and_forgotten_as_in_kohya(base, images, tmp_path):
    train(
        base, images, tmp_path / "a", max_train_epochs=4, save_every_n_epochs=1, save_last_n_epochs=2, save_state=True
    )
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"lora-000002.safetensors", "lora-000003.safetensors", "lora.safetensors"} <= names
    assert "lora-000001.safetensors" not in names and "lora-000001-state" not in names
    assert {"lora-000003-state", "lora-state"} <= names and "lora-000004.safetensors" not in names
    train(base, images, tmp_path / "b", save_every_n_steps=2, save_last_n_steps=3, max_train_steps=9)
    assert sorted(path.name for path in (tmp_path / "b").glob("*step*")) == [
        f"lora-step0000000{n}.safetensors" for n in (6, 8)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        dict(mixed_precision="bf16"),
        dict(mixed_precision="bf16", full_bf16=True, save_precision="bf16", no_half_vae=True),
        dict(gradient_checkpointing=True, sdpa=True),
        dict(mem_eff_attn=True, cache_latents=False),
        dict(optimizer_type="AdamWScheduleFree", lr_warmup_steps=0),
        dict(optimizer_type="Prodigy", learning_rate=1.0, unet_lr=1.0, text_encoder_lr=1.0),
        dict(optimizer_type="Adafactor"),
        dict(network_args=["conv_dim=2", "conv_alpha=1"], scale_weight_norms=0.05),
        dict(max_token_length=150, clip_skip=2, weighted_captions=True, min_snr_gamma=5.0),
        dict(save_model_as="pt", loss_type="huber", ip_noise_gamma=0.1, multires_noise_iterations=3),
        dict(cache_latents_to_disk=True),
    ],
    ids=lambda changes: ",".join(changes),
)
def test_settings_train(base, images, tmp_path, changes):
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    result = train(
        base, copy, tmp_path / "out", **{**changes, "calculate_cs": True, "max_train_steps": 4, "cs_interval": 1}
    )
    measured = history_of(tmp_path / "out")
    assert result["last_step"] == 4 and all(0 < abs(record["cs"]["unet"]) < 1 for record in measured[1:])
    kept = load_lora(tmp_path / "out" / result["files"]["kept"]["path"])[0]
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    assert any(tensor.abs().max() > 0 for name, tensor in kept.items() if "lora_up" in name)


def test_gradient_checkpointing_changes_nothing(base, images, tmp_path):
    train(base, images, tmp_path / "a", max_train_steps=4, network_dropout=0.3)
    train(base, images, tmp_path / "b", max_train_steps=4, network_dropout=0.3, gradient_checkpointing=True)
    one, two = tensors(tmp_path / "a/lora.safetensors"), tensors(tmp_path / "b/lora.safetensors")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_parts_can_be_trained_alone(base, images, tmp_path):
    result = train(
        base, images, tmp_path / "te", network_train_text_encoder_only=True, calculate_cs=True, max_train_steps=4
    )
    assert {name.split("_")[1] for name in tensors(tmp_path / "te/lora.safetensors")} == {"te"}
    assert set(result["parts"]) == {"te"}
    header = json.loads((tmp_path / "te/cs_history.jsonl").read_text().splitlines()[0])
    assert header["decided_on"] == "te"
    train(base, images, tmp_path / "unet", text_encoder_lr=0, max_train_steps=4)
    assert {name.split("_")[1] for name in tensors(tmp_path / "unet/lora.safetensors")} == {"unet"}


def test_regularisation_images_and_masks_count(base, tmp_path):
    images = make_pictures(tmp_path / "images", count=4)
    reg = make_pictures(tmp_path / "reg", count=4, name="animal", seed=5)
    train(base, images, tmp_path / "a", reg_data_dir=reg, max_train_steps=4)
    train(base, images, tmp_path / "b", reg_data_dir=reg, max_train_steps=4, prior_loss_weight=0.1)
    assert not same(tensors(tmp_path / "a/lora.safetensors"), tensors(tmp_path / "b/lora.safetensors"))


def test_start_from_weights_and_folded_base_weights(base, images, tmp_path, stopped):
    first = str(stopped[0] / "lora.safetensors")
    train(
        base,
        images,
        tmp_path / "on",
        network_weights=first,
        dim_from_weights=True,
        max_train_steps=1,
        learning_rate=1e-9,
    )
    one, two = tensors(first), tensors(tmp_path / "on/lora.safetensors")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    pytest.importorskip("merge_lora", reason="merge_lora.py is not there yet")
    train(base, images, tmp_path / "plain", calculate_cs=True, cs_interval=1, max_train_steps=2)
    train(base, images, tmp_path / "folded", calculate_cs=True, cs_interval=1, max_train_steps=2, base_weights=[first])
    assert history_of(tmp_path / "plain", "loss") != history_of(tmp_path / "folded", "loss")


def test_start_in_the_middle(base, images, tmp_path):
    result = train(base, images, tmp_path / "a", initial_step=5, skip_until_initial_step=True)
    assert result["last_step"] == 9
    train(base, images, tmp_path / "b", initial_epoch=3, max_train_steps=7)
    train(base, images, tmp_path / "c", initial_step=6, max_train_steps=7)
    assert same(tensors(tmp_path / "b/lora.safetensors"), tensors(tmp_path / "c/lora.safetensors"))


def test_a_model_family_overrides_the_points(base, images, tmp_path):
    from base.families import StableDiffusion
    from settings.parsing import parse_arguments
    from training.loop import train as train_run
    from training.results import finish
    from training.setup import set_up

    called = []

    class Other(StableDiffusion):
        def encode_text(self, captions):
            called.append("encode_text")
            return super().encode_text(captions)

        def predict_noise(self, noisy, timesteps, text, batch):
            called.append(tuple(batch["original_sizes_hw"][0].tolist()))
            return super().predict_noise(noisy, timesteps, text, batch)

    reset_accelerate()
    ready = set_up(parse_arguments(words(base, images, tmp_path, max_train_steps=1)), Other)
    ending = train_run(ready)
    assert called == ["encode_text", (32, 32)]
    assert finish(ready, ending).exit_code == 0


def test_debug_dataset_shows_and_trains_nothing(base, images, tmp_path, capsys):
    assert run(base, images, tmp_path / "out", debug_dataset=True) == 0
    output = capsys.readouterr().out
    assert output.count("loss weight 1") == 6 and "a photo of a cat" in output
    assert not Path(tmp_path / "out").exists()
