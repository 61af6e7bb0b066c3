"""Optimizers and schedulers by kohya's names: each really optimizes, and each rate follows its
formula."""

import argparse
import ast
import importlib
import importlib.util
import logging
import math
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch

from settings.key_values import key_values
from training.optimizers import OPTIMIZERS, is_schedule_free, make_optimizer
from training.schedulers import make_scheduler

DEFAULTS = dict(
    optimizer_type="AdamW",
    optimizer_args=None,
    learning_rate=1e-2,
    lr_scheduler="constant",
    lr_scheduler_type="",
    lr_scheduler_args=None,
    lr_warmup_steps=0,
    lr_decay_steps=0,
    lr_scheduler_num_cycles=1,
    lr_scheduler_power=1.0,
    lr_scheduler_timescale=None,
    lr_scheduler_min_lr_ratio=None,
)
NEEDS_CUDA = {
    "pagedadamw",
    "pagedadamw8bit",
    "pagedadamw32bit",
    "pagedlion8bit",
    "sgdnesterov8bit",
    "lion8bit",
    "adamw8bit",
}


def settings(**changes):
    return SimpleNamespace(**{**DEFAULTS, **changes})


def parameter():
    return torch.nn.Parameter(torch.full((64, 128), 3.0))  # 8192 values: large enough for 8-bit states


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_name_reaches_its_own_package_and_optimizes(name):
    package = OPTIMIZERS[name][0].split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    own_rate = name.startswith(("dadapt", "prodigy"))
    weight = parameter()
    rate = 1.0 if own_rate else 1e-2
    optimizer = make_optimizer(settings(optimizer_type=name, learning_rate=rate), [{"params": [weight], "lr": rate}])
    assert type(optimizer).__module__.startswith(package)
    if name in NEEDS_CUDA and not torch.cuda.is_available():
        pytest.skip("its step needs CUDA; the class was made")
    if is_schedule_free(optimizer):
        optimizer.train()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = weight.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == 9.0 and min(losses) < 9.0  # those that look for the rate themselves may overshoot later


@pytest.mark.parametrize(
    "name", [*sorted(set(OPTIMIZERS) - {"prodigyplusschedulefree"}), "Adamax", "SGD", "torch.optim.RAdam"]
)
def test_the_class_of_a_name_is_the_one_that_sd_scripts_takes(name):
    repository = os.environ.get("SD_SCRIPTS_DIR")
    if not repository:
        pytest.skip("SD_SCRIPTS_DIR names no sd-scripts repository")
    package = OPTIMIZERS.get(name, ("torch",))[0].split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    source = subprocess.check_output(["git", "-C", repository, "show", "v0.10.1:library/train_util.py"], text=True)
    (function,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == "get_optimizer"]
    names = {
        "torch": torch,
        "ast": ast,
        "importlib": importlib,
        "logger": logging.getLogger("its"),
        "argparse": argparse,
    }
    names["transformers"] = importlib.import_module("transformers")
    importlib.import_module("transformers.optimization")
    exec(compile(ast.Module([function], []), "train_util.py", "exec"), names)
    more = {"use_8bit_adam": False, "use_lion_optimizer": False, "fused_backward_pass": False, "max_grad_norm": 1.0}
    chosen = settings(optimizer_type=name, **more)
    theirs = names["get_optimizer"](chosen, [{"params": [parameter()], "lr": 1.0}])[2]
    ours = make_optimizer(settings(optimizer_type=name), [{"params": [parameter()], "lr": 1.0}])
    assert type(ours) is type(theirs)
    own, other = (
        {k: v for k, v in group.items() if k not in ("params", "train_mode")}
        for group in (ours.param_groups[0], theirs.param_groups[0])
    )
    assert own == other


def test_optimizer_arguments_are_read():
    assert key_values(["weight_decay=0.1", "betas=0.9,0.99", "decouple=true", "kind=linear", "x=None"]) == {
        "weight_decay": 0.1,
        "betas": (0.9, 0.99),
        "decouple": True,
        "kind": "linear",
        "x": None,
    }
    optimizer = make_optimizer(
        settings(optimizer_args=["weight_decay=0.1", "betas=.8,.9"]), [{"params": [parameter()]}]
    )
    assert optimizer.param_groups[0]["weight_decay"] == 0.1 and optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    optimizer = make_optimizer(
        settings(optimizer_type="SGDNesterov", optimizer_args=["momentum=0.5"]), [{"params": [parameter()]}]
    )
    assert optimizer.defaults["momentum"] == 0.5 and optimizer.defaults["nesterov"]
    optimizer = make_optimizer(settings(optimizer_type="torch.optim.Adamax"), [{"params": [parameter()]}])
    assert isinstance(optimizer, torch.optim.Adamax)
    assert isinstance(make_optimizer(settings(optimizer_type="NAdam"), [{"params": [parameter()]}]), torch.optim.NAdam)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(optimizer_type="AdamX"), "AdamX is unknown; did you mean adamw"),
        (dict(optimizer_type="torch.optim.Nothing"), "torch.optim has no class Nothing"),
        (dict(optimizer_type="no_such_package.Thing"), "pip install no_such_package"),
        (dict(optimizer_args=["weight_decay"]), "'weight_decay' is not of the form key=value"),
        (dict(optimizer_args=["wight_decay=1"]), "AdamW refuses them"),
        (dict(optimizer_type="Prodigy"), "needs the same --unet_lr and --text_encoder_lr"),
    ],
)
def test_optimizer_mistakes(changes, message):
    groups = [{"params": [parameter()], "lr": 1e-3}, {"params": [parameter()], "lr": 1e-4}]
    with pytest.raises(ValueError, match=message):
        make_optimizer(settings(**changes), groups)


def rates(total=100, **changes):
    chosen = settings(**changes)
    optimizer = make_optimizer(chosen, [{"params": [parameter()], "lr": 1.0}])
    scheduler = make_scheduler(chosen, optimizer, total)
    result = []
    for _ in range(total):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return result


WARMUP = [min(1, step / 10) for step in range(100)]
PROGRESS = [max(0, (step - 10) / 90) for step in range(100)]


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(lr_scheduler="constant", lr_warmup_steps=0), [1.0] * 100),
        (dict(lr_scheduler="constant_with_warmup"), WARMUP),
        (dict(lr_scheduler="linear"), [w * (1 - p) for w, p in zip(WARMUP, PROGRESS)]),
        (dict(lr_scheduler="cosine"), [w * (1 + math.cos(math.pi * p)) / 2 for w, p in zip(WARMUP, PROGRESS)]),
        (
            dict(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=3),
            [w * (1 + math.cos(math.pi * (3 * p % 1))) / 2 for w, p in zip(WARMUP, PROGRESS)],
        ),
        (
            dict(lr_scheduler="polynomial", lr_scheduler_power=2.0),
            [w * ((1 - 1e-5) * (1 - p) ** 2 + 1e-5) for w, p in zip(WARMUP, PROGRESS)],
        ),
        (
            dict(lr_scheduler="inverse_sqrt", lr_scheduler_timescale=20),
            [step / 10 if step < 10 else math.sqrt(20 / (step + 10)) for step in range(100)],
        ),
        (
            dict(lr_scheduler="cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.1),
            [w if p == 0 else 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2 for w, p in zip(WARMUP, PROGRESS)],
        ),
        (
            dict(lr_scheduler="warmup_stable_decay", lr_decay_steps=0.2, lr_scheduler_args=["decay_type=linear"]),
            [min(1, step / 10) if step < 80 else 1 - (step - 80) / 20 for step in range(100)],
        ),
        (
            dict(
                lr_scheduler="piecewise_constant", lr_warmup_steps=0, lr_scheduler_args=["step_rules=1:30,0.1:60,0.01"]
            ),
            [1.0] * 30 + [0.1] * 30 + [0.01] * 40,
        ),
    ],
    ids=lambda value: value["lr_scheduler"] if isinstance(value, dict) else "",
)
def test_rate_follows_its_formula(changes, expected):
    assert rates(**{"lr_warmup_steps": 10, **changes}) == pytest.approx(expected, abs=1e-6)


def test_warmup_as_a_fraction():
    assert rates(lr_scheduler="constant_with_warmup", lr_warmup_steps=0.1) == pytest.approx(WARMUP)


def test_foreign_scheduler():
    got = rates(lr_scheduler_type="StepLR", lr_scheduler_args=["step_size=50", "gamma=0.5"])
    assert got == pytest.approx([1.0] * 50 + [0.5] * 50)
    got = rates(lr_scheduler_type="torch.optim.lr_scheduler.StepLR", lr_scheduler_args=["step_size=50", "gamma=0.5"])
    assert got[-1] == pytest.approx(0.5)


def test_adafactor_sets_its_own_rate():
    chosen = settings(optimizer_type="Adafactor", lr_scheduler="adafactor:0.002")
    optimizer = make_optimizer(chosen, [{"params": [parameter()], "lr": 1e-3}])
    assert optimizer.param_groups[0]["lr"] is None and not optimizer.defaults["warmup_init"]
    warmed = settings(optimizer_type="Adafactor", optimizer_args=["relative_step=False", "warmup_init=True"])
    assert make_optimizer(warmed, [{"params": [parameter()]}]).defaults["relative_step"]  # as kohya's trainer does it
    assert make_scheduler(chosen, optimizer, 10).get_lr() == [0.002]
    fixed = settings(optimizer_type="Adafactor", optimizer_args=["relative_step=False", "scale_parameter=False"])
    assert make_optimizer(fixed, [{"params": [parameter()], "lr": 1e-3}]).param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(lr_scheduler="cosin"), "cosin is unknown; did you mean cosine"),
        (dict(lr_scheduler="constant", lr_warmup_steps=5), "no effect with --lr_scheduler constant; use constant_with"),
        (dict(lr_scheduler="linear", lr_decay_steps=5), "--lr_decay_steps has no effect"),
        (dict(lr_scheduler="cosine", lr_scheduler_args=["bogus=1"]), "cosine refuses them"),
        (dict(lr_scheduler="piecewise_constant"), "needs --lr_scheduler_args step_rules"),
        (dict(lr_scheduler_type="Nothing"), "no class Nothing"),
        (dict(optimizer_type="Adafactor", lr_scheduler="linear"), "relative steps sets its own rate"),
        (dict(optimizer_type="AdamWScheduleFree", lr_scheduler="linear"), "needs no schedule"),
    ],
)
def test_scheduler_mistakes(changes, message):
    with pytest.raises(ValueError, match=message):
        rates(**changes)
