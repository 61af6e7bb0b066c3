"""A state that is damaged, not whole or of another run: one message that says what, exit code 2,
and nothing is trained."""

import json
import shutil

import pytest
import torch
from ldm_runs import run, train
from safetensors.torch import load_file, save_file

SETTINGS = dict(max_train_steps=2, network_dim=2, save_state=True)


@pytest.fixture(scope="module")
def state(base, images, tmp_path_factory):
    """The state of a run of 2 steps."""
    out = tmp_path_factory.mktemp("first")
    train(base, images, out, **SETTINGS)
    return out / "lora-state"


@pytest.fixture
def refused(base, images, state, tmp_path, capsys):
    """Resumes a copy of the state that was changed; it must be refused with these words."""

    def check(change, *words, **settings):
        copy = shutil.copytree(state, tmp_path / "a-state")
        change(copy)
        capsys.readouterr()
        assert (
            run(base, images, tmp_path / "out", **{**SETTINGS, "max_train_steps": 4, "resume": copy, **settings}) == 2
        )
        message = capsys.readouterr().err
        assert "Traceback" not in message and "a-state" in message
        assert all(word in message for word in words), message
        assert not list(tmp_path.glob("out/*.safetensors"))

    return check


@pytest.mark.parametrize("name", ["optimizer.pt", "random-0.pt", "lora.safetensors", "progress.json"])
def test_a_missing_file_is_named(refused, name):
    refused(lambda folder: (folder / name).unlink(), name)


def edited_weights(edit):
    def change(folder):
        save_file(edit(load_file(folder / "lora.safetensors")), folder / "lora.safetensors")

    return change


def without_half(tensors):
    return dict(sorted(tensors.items())[: len(tensors) // 2])


WEIGHTS = {
    "half": (without_half, ("it lacks 26 of 52 tensors", "(and 23 more)")),
    "foreign": (lambda tensors: {**tensors, "lora_unet_nope.lora_up.weight": torch.ones(1, 2)}, ("lora_unet_nope",)),
    "other names": (lambda tensors: {f"x_{key}": value for key, value in tensors.items()}, ("it lacks 52 of 52",)),
    "other shapes": (lambda tensors: {k: torch.ones(*v.shape, 2) for k, v in tensors.items()}, ("another shape",)),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_must_have_exactly_the_networks_names_and_shapes(refused, state, kind):
    edit, words = WEIGHTS[kind]
    count = len(load_file(state / "lora.safetensors"))
    words = [word.replace("52", str(count)).replace("26", str(count - count // 2)) for word in words]
    words = [word.replace("23 more", f"{count - count // 2 - 3} more") for word in words]
    refused(edited_weights(edit), "does not fit this network", *words)


@pytest.mark.parametrize("name", ["cs_average.safetensors", "cs_gradients.safetensors", "shadows.safetensors"])
def test_what_was_measured_must_be_finite(base, images, tmp_path, capsys, name):
    settings = dict(early_stop=True, cs_interval=1, shadows=2, average=0.2, save_state=True)
    train(base, images, tmp_path / "first", **settings, max_train_steps=2)
    state = tmp_path / "first/lora-state"
    tensors = load_file(state / name)
    broken = {key: value * float("nan") if value.is_floating_point() else value for key, value in tensors.items()}
    save_file(broken, state / name)
    capsys.readouterr()
    assert run(base, images, tmp_path / "out", **settings, max_train_steps=4, resume=state) == 2
    message = capsys.readouterr().err
    assert name in message and "NaN or Inf" in message and "Traceback" not in message


def edited_optimizer(edit):
    def change(folder):
        content = torch.load(folder / "optimizer.pt", weights_only=True)
        torch.save(edit(content), folder / "optimizer.pt")

    return change


def with_state(**entries):
    return lambda content: {**content, "optimizer": {**content["optimizer"], **entries}}


def first_is_nan(content):
    content["optimizer"]["state"][0]["exp_avg"].fill_(float("nan"))
    return content


def last_is_gone(content):
    content["optimizer"]["state"].popitem()
    return content


def scheduler_without_step(content):
    del content["scheduler"]["last_epoch"]
    return content


OPTIMIZERS = {
    "empty": (lambda content: {}, "optimizer"),
    "a list": (lambda content: [], "optimizer"),
    "no optimizer": (lambda content: {key: content[key] for key in ("scheduler", "scaler")}, "optimizer"),
    "no scheduler": (lambda content: {key: content[key] for key in ("optimizer", "scaler")}, "scheduler"),
    "empty scheduler": (lambda content: {**content, "scheduler": {}}, "the scheduler lacks"),
    "scheduler without step": (scheduler_without_step, "the scheduler lacks last_epoch"),
    "scheduler of words": (lambda c: {**c, "scheduler": dict.fromkeys(c["scheduler"], "x")}, "of another kind"),
    "no moments": (with_state(state={}), "have no state"),
    "moments of one weight are gone": (last_is_gone, "1 have no state"),
    "no groups": (with_state(param_groups=[]), "optimizer"),
    "groups without settings": (with_state(param_groups=[{"params": []}, {"params": []}]), "lacks"),
    "NaN": (first_is_nan, "NaN or Inf"),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_that_is_not_whole_is_refused(refused, kind):
    edit, word = OPTIMIZERS[kind]
    refused(edited_optimizer(edit), word)


def test_the_state_of_another_optimizer_rank_or_choice_of_modules_is_refused(refused, tmp_path):
    def unchanged(folder):
        return None

    for settings, words in (
        (dict(optimizer_type="SGDNesterov"), ("torch.optim.adamw.AdamW", "torch.optim.sgd.SGD")),
        (dict(optimizer_type="torch.optim.Adam"), ("torch.optim.adamw.AdamW",)),
        (dict(network_dim=4), ("have another shape", "(2, 16)")),
        (dict(network_train_unet_only=True), ("that do not belong there", "lora_te_")),
        (dict(network_args=["conv_dim=2"]), ("it lacks",)),
    ):
        refused(unchanged, *words, **settings)
        shutil.rmtree(tmp_path / "a-state")


def test_the_optimizer_of_a_run_of_another_rank_is_refused(refused, base, images, tmp_path):
    train(base, images, tmp_path / "other", **{**SETTINGS, "network_dim": 3})
    other = tmp_path / "other/lora-state/optimizer.pt"
    refused(lambda folder: shutil.copy(other, folder / "optimizer.pt"), "of weights of another shape")


@pytest.mark.parametrize(
    "change",
    [
        {"step": "2"},
        {"step": -1},
        {"step": 1.5},
        {"step": True},
        {"step": None},
        {"step": 10**30},
        {"steps_per_epoch": 0},
        {"loss_sum": float("nan")},
        {"loss_sum": float("inf")},
        {"epoch_loss_count": []},
        {"seed": -5},
        {"unknown": 1},
    ],
    ids=str,
)
def test_progress_must_be_numbers_that_can_be(refused, change):
    def edit(folder):
        content = json.loads((folder / "progress.json").read_text())
        (folder / "progress.json").write_text(json.dumps({**content, **change}))

    refused(edit, "progress.json is damaged", next(iter(change)))


def test_progress_that_lacks_a_field_is_refused_by_its_name(refused):
    def edit(folder):
        content = json.loads((folder / "progress.json").read_text())
        del content["step"], content["loss_count"]
        (folder / "progress.json").write_text(json.dumps(content))

    refused(edit, "it lacks loss_count", "it lacks step")


@pytest.mark.parametrize(
    "content", [{}, {"python": 1}, [1], {"python": [3, [1], None], "numpy": [], "torch": 0}], ids=str
)
def test_a_random_state_that_is_none_is_refused(refused, content):
    refused(lambda folder: torch.save(content, folder / "random-0.pt"), "random-0.pt")
