"""Numbers that cannot be or do not fit this machine are refused by one message that says what
would, before memory is taken."""

import time

import pytest
import toml
from ldm_runs import make_pictures, run
from PIL import Image

from base.sampling import Prompt, parse_prompt_line, read_prompts
from settings.bounds import MOST_OF, MOST_SIDE_PX, MOST_STEPS
from settings.flags import build_parser, int_or_float

SECONDS = 10  # of a refusal on a machine that is shared; about one where it is alone


@pytest.fixture
def refused(base, images, tmp_path, capsys):
    """The run must end with exit code 2, these words and no file."""

    def check(*words, more=(), **settings):
        settings = {"base": base, "images": images, "out": tmp_path / "out", **settings}
        capsys.readouterr()
        started = time.monotonic()
        assert run(settings.pop("base"), settings.pop("images"), settings.pop("out"), *more, **settings) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message and all(word in message for word in words), message
        assert len(message) < 2000 and time.monotonic() - started < SECONDS
        assert not (tmp_path / "out").exists()

    return check


NUMBERS = {
    action.option_strings[0].lstrip("-"): action.type
    for action in build_parser()._actions
    if action.type in (int, float, int_or_float) and not action.choices
}


def test_there_are_numeric_flags():
    assert len(NUMBERS) > 60 and {"learning_rate", "network_dim", "lr_warmup_steps"} <= NUMBERS.keys()


@pytest.mark.parametrize("flag", NUMBERS)
def test_every_numeric_flag_refuses_what_is_not_finite_or_huge(refused, flag):
    huge = "9" * 30
    if NUMBERS[flag] is int:
        for value in (huge, f"-{huge}", "9" * 5000):
            refused(flag, more=[f"--{flag}={value}"])
    else:
        for value in ("nan", "inf", "-inf", "1e999", "1e300", "-1e300"):
            refused(f"--{flag}", "not allowed", more=[f"--{flag}={value}"])


@pytest.mark.parametrize("flag", ["cs_interval", "window_size", "rule_value", "shadows", "snapshot_disk_gb", "average"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "9" * 30])
def test_the_flags_of_early_stopping_do_too(refused, flag, value):
    refused("" if flag == "rule_value" else f"--{flag}", early_stop=True, **{flag: value})


@pytest.mark.parametrize("flag", MOST_OF)
def test_what_makes_no_sense_is_refused_by_the_most_that_does(refused, flag):
    refused(f"--{flag} {MOST_OF[flag] + 1}", "is not allowed", str(MOST_OF[flag]), **{flag: MOST_OF[flag] + 1})


def test_the_same_numbers_are_refused_in_files(refused, images, tmp_path):
    for text in ("learning_rate = nan", "learning_rate = inf", "train_batch_size = 99999999999", "seed = -1"):
        (tmp_path / "run.toml").write_text(text)
        refused(text.split()[0], "not allowed", config_file=str(tmp_path / "run.toml"), learning_rate=None,
                train_batch_size=None, seed=None)  # fmt: skip
    for text in ("num_repeats = 99999999999999999999", "caption_dropout_rate = nan", "token_warmup_step = inf",
                 "batch_size = 5000", "max_bucket_reso = 100000", "resolution = 100000", "resolution = inf",
                 "face_crop_aug_range = [1.0, inf]"):  # fmt: skip
        subset = f'[[datasets.subsets]]\nimage_dir = "{images}/1_cat"\n'
        (tmp_path / "data.toml").write_text(f"[general]\nresolution = 32\n[[datasets]]\n{text}\n{subset}".replace(
            "resolution = 32\n[[datasets]]\nresolution", "[[datasets]]\nresolution"))  # fmt: skip
        refused(text.split()[0], dataset_config=str(tmp_path / "data.toml"), images=None)


@pytest.mark.parametrize("name", ["run.toml", "data.toml", "prompts.toml", "prompts.json", "images.json"])
def test_files_that_are_nested_without_end_are_one_message(refused, tmp_path, name):
    nested = "[" * 10_000 + "]" * 10_000
    (tmp_path / name).write_text(nested if name.endswith("json") else f"a = {nested}")
    flags = {"run": "config_file", "data": "dataset_config", "images": "in_json", "prompts": "sample_prompts"}
    refused(name, **{flags[name.split(".")[0]]: str(tmp_path / name)})


def test_settings_of_the_optimizer_and_the_network_are_numbers_too(refused):
    for flag, word in (
        ("optimizer_args", "weight_decay=1e999"),
        ("optimizer_args", "weight_decay=nan"),
        ("optimizer_args", "betas=0.9,inf"),
        ("optimizer_args", "eps=" + "(" * 5000),
        ("lr_scheduler_args", "power=inf"),
        ("network_args", "conv_dim=-1"),
        ("network_args", "conv_alpha=nan"),
        ("network_args", "rank_dropout=2"),
        ("network_args", "module_dropout=1"),
    ):
        refused(word[:20], **{flag: [word], "lr_scheduler": "polynomial"})
    for word in ("conv_dim=x", "conv_alpha=inf", "rank_dropout=1.5"):
        refused(word, network_args=[word], network_module="lycoris.kohya")


@pytest.mark.parametrize("words", [["preset=nope"], ["algo=dylora", "block_size=0"], ["algo=lokr", "factor=x"]])
def test_options_that_lycoris_stumbles_on_are_one_message(refused, words):
    refused("--network_args", words[0], network_args=words, network_module="lycoris.kohya")


@pytest.mark.parametrize("name", ["nope", "cuda:77", "meta"])
def test_a_device_that_is_not_there_is_one_message(base, tmp_path, capsys, name):
    import extract_lora
    import sample_images

    prompt = ["--base", base, "--prompt", "a", "--out", str(tmp_path / "out")]
    assert sample_images.main([*prompt, "--device", name]) == 2
    models = ["--model_org", base, "--model_tuned", base, "--save_to", str(tmp_path / "x.safetensors")]
    assert extract_lora.main([*models, "--device", name]) == 2
    message = capsys.readouterr().err
    assert message.count(f"--device {name} is not to be had here") == 2 and "Traceback" not in message


def test_a_rank_that_no_layer_has_is_refused_by_the_largest(refused):
    for more in ({}, {"network_module": "lycoris.kohya"}, {"network_args": ["conv_dim=100000"], "network_dim": 2}):
        refused("100000: no layer of this base has a rank above", **{"network_dim": 100_000, **more})
    refused("--shadow_rank", "no layer", early_stop=True, stop_rule="shadow", shadow_rank=4000)


def test_a_rank_for_which_there_is_no_memory_says_which_would_fit():
    from base.memory import memory_bytes, refuse_rank

    there = memory_bytes("cpu")
    assert 2**28 < there < 2**45
    sides = [(2**20, 2**20)] * 100
    fitting = there // (100 * 2**21 * 16)
    refuse_rank("--network_dim", fitting, sides)
    with pytest.raises(ValueError, match=f"{fitting} would fit"):
        refuse_rank("--network_dim", fitting * 4, sides)


def test_a_batch_for_which_there_is_no_memory_says_how_many_would_fit():
    from base.memory import memory_bytes, refuse_batch

    each = memory_bytes("cpu") // 7
    refuse_batch("--train_batch_size", 7, each, "cpu")
    with pytest.raises(ValueError, match="--train_batch_size 9: .* 7 would fit"):
        refuse_batch("--train_batch_size", 9, each, "cpu")


def test_repeats_that_make_no_epoch_are_refused_by_how_many_would(refused, tmp_path):
    make_pictures(tmp_path / "many", count=4, repeats=99_999_999_999)
    refused("99999999999_cat", "give at most 1250000 repeats", images=str(tmp_path / "many"))


def test_a_run_of_too_many_epochs_says_how_many_would_be_right():
    from argparse import Namespace

    from training.setup import length_of

    with pytest.raises(ValueError, match=f"give {MOST_STEPS // 300} at most"):
        length_of(Namespace(max_train_epochs=10**6, max_train_steps=1), 300)


@pytest.mark.parametrize("size", [(13_000, 13_000), (200_000, 1_000), (20_000, 20_000)])
def test_a_picture_that_is_too_large_is_named_with_the_limit_before_it_is_decoded(refused, tmp_path, size):
    make_pictures(tmp_path / "images", count=2)
    Image.new("1", size).save(tmp_path / "images/1_cat/huge.png")
    refused("huge.png", "pixels", images=str(tmp_path / "images"))


def test_a_stripe_that_would_be_scaled_up_without_end_is_named(refused, tmp_path):
    make_pictures(tmp_path / "images", count=2)
    Image.new("L", (60_000, 1)).save(tmp_path / "images/1_cat/stripe.png")
    refused("stripe.png", "60000 x 1 px", images=str(tmp_path / "images"), resolution=256)


@pytest.mark.parametrize(
    "line",
    ["a --s 100000", "a --w 100000", "a --h 99999999999", "a --l nan", "a --l inf", "a --d 99999999999999999999999"],
)
def test_prompts_have_bounds(line):
    with pytest.raises(ValueError, match="not allowed: at most"):
        parse_prompt_line(line)


def test_numbers_of_prompt_files_and_their_count_have_bounds(tmp_path):
    with pytest.raises(ValueError, match="width"):
        Prompt("a", width=float("inf"))
    assert Prompt("a", width=MOST_SIDE_PX).width == MOST_SIDE_PX
    (tmp_path / "p.txt").write_text("a cat\n" * 1001)
    with pytest.raises(ValueError, match="has 1001 prompts: 1000 are the most"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.json").write_text('[{"prompt": "a", "sample_steps": 1e999}]')
    with pytest.raises(ValueError, match="sample_steps"):
        read_prompts(tmp_path / "p.json")


def test_a_caption_without_end_is_named(refused, tmp_path):
    make_pictures(tmp_path / "images", count=2)
    (tmp_path / "images/1_cat/1.txt").write_text("a " * 60_000)
    refused("1_cat/1.png", "100000 are the most", images=str(tmp_path / "images"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["gone", "torn"])
def test_a_picture_that_is_lost_while_training_is_one_message(base, tmp_path, capsys, monkeypatch, workers, damage):
    """It is lost after all pictures were checked."""
    from images.loader import StepLoader

    make_pictures(tmp_path / "images", count=4)
    lost, steps = tmp_path / "images/1_cat/2.png", StepLoader.steps

    def lose(self, epoch, done):
        lost.unlink() if damage == "gone" else lost.write_bytes(b"no picture")
        return steps(self, epoch, done)

    monkeypatch.setattr(StepLoader, "steps", lose)
    settings = {"cache_latents": False, "max_data_loader_n_workers": workers, "max_train_epochs": 1}
    assert run(base, str(tmp_path / "images"), tmp_path / "out", **settings) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("es_lora_ldm")]
    assert len(said) == 1 and "1_cat/2.png" in said[0]


def test_the_settings_that_people_use_are_within_bounds(images):
    from settings.parsing import parse_arguments

    usual = {"network_dim": 128, "learning_rate": 1.0, "max_train_steps": 100_000, "train_batch_size": 64,
             "max_train_epochs": 500, "lr_warmup_steps": 0.1, "seed": 2**32 - 1, "min_snr_gamma": 5}  # fmt: skip
    words = [word for name, value in usual.items() for word in (f"--{name}", str(value))]
    base = ["--pretrained_model_name_or_path", "owner/name", "--train_data_dir", images, "--output_dir", "none-such"]
    args = parse_arguments([*base, *words, "--resolution", "1024,1536"])
    assert args.network_dim == 128 and toml.dumps(usual)


@pytest.mark.parametrize(
    "cuda, mps, device", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")], ids=["cuda", "mps", "cpu"]
)
def test_a_gpu_is_chosen_where_there_is_one(monkeypatch, cuda, mps, device):
    from base.memory import best_device

    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert best_device() == device
