"""Shadows beside a diffusion LoRA: they change nothing, never see their fold, decide, and
resume."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_runs import history_of, make_pictures, run, train
from PIL import Image
from safetensors.torch import load_file

from es_lora.shadows import auto_interval, make_folds
from network.lora_file import load_lora


@pytest.fixture
def rising_rule(monkeypatch):
    """A rule that stops when the shadows' loss is above its lowest value."""
    from es_lora.rules import RULES, Decision, StopRule

    class Rising(StopRule):
        name, needs, lowest = "rising", ("shadow_loss",), float("inf")

        def update(self, record):
            loss, step = record["shadow_loss"], record["step"]
            if loss is not None and loss > self.lowest:
                return Decision(step, step, (step, step), "The shadows' loss rises.")
            self.lowest = min(self.lowest, loss if loss is not None else float("inf"))
            return None

    monkeypatch.setitem(RULES, "rising", Rising)
    return "rising"


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights(path):
    return load_lora(path)[0]


CS = dict(calculate_cs=True, cs_interval=1, window_size=2)
BESIDE = dict(CS, shadows=2, shadow_rank=2)


@pytest.mark.parametrize(
    "settings",
    [
        dict(network_dropout=0.2, gradient_accumulation_steps=2),
        dict(cache_latents=False, flip_aug=True, network_train_unet_only=True, scale_weight_norms=1.0),
        dict(lr_scheduler="cosine", gradient_checkpointing=True, network_args=["conv_dim=2", "rank_dropout=0.1"]),
    ],
    ids=["accumulated", "uncached", "convolutions"],
)
def test_the_main_run_is_bit_for_bit_that_without_shadows(base, images, tmp_path, settings):
    train(base, images, tmp_path / "alone", **{**CS, **settings})
    train(base, images, tmp_path / "beside", **{**BESIDE, **settings})
    assert same(weights(tmp_path / "alone/lora.safetensors"), weights(tmp_path / "beside/lora.safetensors"))
    beside = history_of(tmp_path / "beside")
    scores = [record.pop("shadow_loss") for record in beside]
    assert history_of(tmp_path / "alone") == beside
    assert len(set(scores)) == len(scores) == 9 and all(0 < score < 10 for score in scores)


def test_a_shadow_without_a_fold_is_a_second_main_network(base, images, tmp_path, monkeypatch):
    """Same rank, same first weights, nothing left out: the shadow's passes and steps must end where
    the main ones do."""
    from training import shadows

    create = shadows.create_network_beside

    def with_the_same_start(model, network, adapter, rank):
        beside = create(model, network, adapter, rank)
        beside.load_tensors({name: tensor.detach().clone() for name, tensor in network.tensors().items()})
        return beside

    monkeypatch.setattr(shadows, "create_network_beside", with_the_same_start)
    monkeypatch.setattr(shadows, "make_folds", lambda *words: {"cat/none.png": 0})
    monkeypatch.setattr(shadows.ShadowNetworks, "score", lambda self: None)
    train(
        base, images, tmp_path, **{**BESIDE, "shadows": 1, "shadow_rank": 4}, lr_scheduler="linear", noise_offset=0.1,
        gradient_accumulation_steps=2, max_grad_norm=0.01, text_encoder_lr=3e-4, optimizer_args=["weight_decay=0.1"],
        save_state_on_train_end=True, network_dim=4, network_args=["down_lr_weight=.5,.25", "loraplus_lr_ratio=4"],
    )  # fmt: skip
    (state,) = tmp_path.glob("*-state")
    main, shadow = load_file(state / "lora.safetensors"), load_file(state / "shadows.safetensors")
    trained = [tensor for name, tensor in shadow.items() if name.endswith(".weight")]
    assert len(trained) == len(main)
    wanted = sorted(tensor.double().norm().item() for tensor in main.values())
    assert sorted(tensor.double().norm().item() for tensor in trained) == pytest.approx(wanted, rel=1e-4)


def test_shadows_start_from_the_lora_that_the_main_network_starts_from(base, images, tmp_path, monkeypatch, capsys):
    """Nothing is learnt at a rate of next to nothing: what a shadow computes then is what the main
    network computes, and not what the base alone does."""
    from training import shadows

    strong = dict(network_dim=4, network_args=["conv_dim=2"])
    train(base, images, tmp_path / "first", **strong, learning_rate=5e-2, max_train_steps=6)
    losses = {}
    fold_loss = shadows.ShadowNetworks._fold_loss

    def compared(self, number):
        loss = fold_loss(self, number)
        run_main = self.objective.fixed_losses(self.fold_batches[number], len(self.fold_batches[number]))
        losses.setdefault(number, (loss, sum(run_main) / len(run_main)))
        return loss

    monkeypatch.setattr(shadows.ShadowNetworks, "_fold_loss", compared)
    first = str(tmp_path / "first" / "lora.safetensors")
    more = dict(BESIDE, learning_rate=1e-12, max_train_steps=1, network_dropout=None)
    train(base, images, tmp_path / "second", **more, **strong, network_weights=first)
    assert "what that LoRA was trained on is not new to them" in capsys.readouterr().out
    started = dict(losses)
    losses.clear()
    train(base, images, tmp_path / "bare", **more, **strong)
    for number in (0, 1):
        assert started[number][0] == pytest.approx(started[number][1], rel=1e-5)
        assert abs(started[number][0] - losses[number][0]) > 1e-3


def test_every_shadow_is_trained(base, images, tmp_path):
    train(base, images, tmp_path, **{**BESIDE, "shadows": 3}, save_state_on_train_end=True)
    (state,) = tmp_path.glob("*-state")
    shadows = load_file(state / "shadows.safetensors")
    for shadow in "012":
        moments = [shadows[name] for name in shadows if name.startswith(f"{shadow}.") and name.endswith(".exp_avg")]
        assert moments and any(moment.abs().max() > 0 for moment in moments)


def test_a_shadow_never_learns_from_its_fold_and_is_scored_on_it(base, images, tmp_path):
    """With other pixels in the pictures of a fold, its shadow ends with the same weights and
    another score."""
    (folder,) = Path(images).iterdir()
    pictures = [f"{folder.name}/{path.name}" for path in folder.glob("*.png")]
    left_out = {picture for picture, fold in make_folds(pictures, 2, 1).items() if fold == 0}
    shutil.copytree(images, tmp_path / "changed")
    for picture in left_out:
        pixels = np.asarray(Image.open(tmp_path / "changed" / picture))
        Image.fromarray(255 - pixels).save(tmp_path / "changed" / picture)
    states = {}
    for name, data in (("as they are", images), ("changed", tmp_path / "changed")):
        train(base, str(data), tmp_path / name, **BESIDE, save_state_on_train_end=True)
        (state,) = (tmp_path / name).glob("*-state")
        states[name] = load_file(state / "shadows.safetensors")
    own = [name for name in states["changed"] if name.startswith("0.")]
    assert own and all(torch.equal(states["as they are"][name], states["changed"][name]) for name in own)
    other = [name for name in states["changed"] if name.startswith("1.") and name.endswith(".weight")]
    assert not all(torch.equal(states["as they are"][name], states["changed"][name]) for name in other)
    assert history_of(tmp_path / "as they are", "shadow_loss") != history_of(tmp_path / "changed", "shadow_loss")


def test_repeats_and_flips_share_a_fold_and_regularisation_pictures_are_in_none(base, tmp_path):
    from ldm_runs import reset_accelerate, words

    from settings.parsing import parse_arguments
    from training.setup import set_up

    data = make_pictures(tmp_path / "images", count=4, repeats=3)
    regular = make_pictures(tmp_path / "reg", count=4, name="animal", seed=9)
    reset_accelerate()
    shadows = set_up(
        parse_arguments(words(base, data, tmp_path / "out", **BESIDE, reg_data_dir=regular, flip_aug=True))
    ).shadows
    folds = shadows.training.folds
    assert len(folds) == 2 and set(folds.values()) == {0, 1} and all(name.startswith("3_cat/") for name in folds)
    for number, batches in enumerate(shadows.fold_batches):
        (batch,) = [batches[index] for index in range(len(batches))]
        (key,) = batch["image_keys"]
        assert folds[f"3_cat/{Path(key).name}"] == number and batch["latents"] is not None


def test_a_rule_on_the_shadows_switches_them_on_and_stops(base, images, tmp_path, rising_rule, capsys):
    result = train(base, images, tmp_path, early_stop=True, cs_interval=1, stop_rule=rising_rule, max_train_steps=60)
    assert result["outcome"] == "stopped_early" and result["reason"] == "The shadows' loss rises."
    scores = history_of(tmp_path, "shadow_loss")
    assert scores[-1] > min(scores) and result["settings"]["shadows"] == 1
    assert result["shadows"]["count"] == 1 and result["shadows"]["cost_factor"] > 1
    assert result["shadows"]["sentence"] in capsys.readouterr().out


def test_scores_at_every_nth_measurement_only(base, images, tmp_path):
    train(base, images, tmp_path, **BESIDE, shadow_interval=3)
    assert [score is not None for score in history_of(tmp_path, "shadow_loss")] == [True, False, False] * 3


def test_automatic_scores_follow_from_the_pictures_of_a_fold(base, images, tmp_path):
    """One picture of six, at four timesteps, against two trained on between two measurements, three
    times an epoch."""
    result = train(base, images, tmp_path, **BESIDE, shadow_interval="auto")
    assert result["shadows"]["interval"] == auto_interval(1 * 4, 2, 6) == 3
    assert [score is not None for score in history_of(tmp_path, "shadow_loss")] == [i % 3 == 0 for i in range(9)]


def test_a_resumed_run_equals_an_uninterrupted_one(base, images, tmp_path):
    settings = dict(
        BESIDE, shadow_interval=2, network_dropout=0.1, gradient_accumulation_steps=2, lr_scheduler="cosine"
    )
    settings.update(max_train_steps=8, save_state=True)
    train(base, images, tmp_path / "whole", **settings, save_every_n_steps=3)
    state = next((tmp_path / "whole").glob("*0003-state"))
    train(base, images, tmp_path / "resumed", **settings, resume=str(state))
    assert history_of(tmp_path / "resumed") == history_of(tmp_path / "whole")
    last = [load_file(tmp_path / name / "lora-state" / "shadows.safetensors") for name in ("whole", "resumed")]
    assert same(*last)


def test_other_shadows_than_the_saved_ones_are_refused(base, images, tmp_path, capsys):
    train(base, images, tmp_path / "one", **BESIDE, max_train_steps=3, save_state=True)
    state = str(tmp_path / "one" / "lora-state")
    assert run(base, images, tmp_path / "a", **{**BESIDE, "shadow_rank": 3}, resume=state) == 2
    assert run(base, images, tmp_path / "b", **{**BESIDE, "shadows": 1}, resume=state) == 2
    assert capsys.readouterr().err.count("the saved shadows belong to other data or other settings") == 2


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(shadows=2), "--shadows are scored when CS is measured: add --early_stop or --calculate_cs"),
        (dict(CS, shadows=2, optimizer_type="Prodigy"), "the rate of Prodigy means something else: use AdamW"),
        (dict(CS, shadows=2, use_lion_optimizer=True), "the rate of Lion means something else"),
        (dict(CS, shadows=2, network_module="lycoris.kohya"), "--shadows need --network_module networks.lora"),
        (dict(CS, shadows=-1), "--shadows -1: must be at least 0"),
        (dict(CS, shadows=1, shadow_interval=0), "--shadow_interval 0: give a number of 1 or more, or auto"),
        (dict(CS, shadows=7), "--shadows 7 needs at least 7 different training examples, and there are 6"),
        (dict(CS, shadows=0, stop_rule="rising"), "--stop_rule rising decides on shadows: leave out --shadows 0"),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(base, images, tmp_path, capsys, rising_rule, settings, message):
    assert run(base, images, tmp_path / "out", **settings) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
