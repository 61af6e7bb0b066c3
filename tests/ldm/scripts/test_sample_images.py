"""Prompt files, samplers, seeds, the random state, and the command line of sample_images.py."""

import importlib.util
import json
import random

import numpy as np
import pytest
import sample_images as si
import torch
from PIL import Image

from base import sampling

# diffusers meets a newer numpy: nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def sampler(base):
    from base.sd import load_sd_model

    model = load_sd_model(base)
    return sampling.Sampler(model, model.encode_text)


def test_prompt_line_of_kohya():
    prompt = sampling.parse_prompt_line(
        "a cat, --ish tail --n bad, ugly --w 64 --h 32 --d 7 --l 5.5 --s 4".replace("--ish ", "")
    )
    assert (prompt.prompt, prompt.negative_prompt) == ("a cat, tail", "bad, ugly")
    assert (prompt.width, prompt.height, prompt.seed, prompt.scale, prompt.sample_steps) == (64, 32, 7, 5.5, 4)
    plain = sampling.parse_prompt_line("a well-known cat")
    assert plain.prompt == "a well-known cat" and plain.seed is None and plain.sample_steps == 30 and plain.scale == 7.5


@pytest.mark.parametrize(
    "line, message",
    [
        ("a --w wide", "width 'wide' is not a number"),
        ("a --q 3", "--q is unknown"),
        ("a --s 0", "steps must be at least 1"),
        ("a --ss fast", "sampler 'fast': choose from ddim"),
    ],
)
def test_prompt_line_mistakes(line, message):
    with pytest.raises(ValueError, match=message):
        sampling.parse_prompt_line(line)


def test_prompt_files_of_three_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("# comment\n\na cat --w 64 --n dull\na dog --w 64 --n dull --d 3\n")
    (tmp_path / "a.toml").write_text(
        '[prompt]\nwidth = 64\nnegative_prompt = "dull"\n[[prompt.subset]]\nprompt = "a cat"\n'
        '[[prompt.subset]]\nprompt = "a dog"\nseed = 3\n'
    )
    common = {"width": 64, "negative_prompt": "dull"}
    (tmp_path / "a.json").write_text(
        json.dumps([{"prompt": "a cat", **common}, {"prompt": "a dog", "seed": 3, **common}])
    )
    one, two, three = (sampling.read_prompts(tmp_path / f"a.{kind}") for kind in ("txt", "toml", "json"))
    assert one == two == three and len(one) == 2 and one[1].seed == 3
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="has no prompts"):
        sampling.read_prompts(tmp_path / "empty.txt")
    (tmp_path / "bad.json").write_text('[{"prompt": "a", "sead": 3}]')
    with pytest.raises(ValueError, match="unknown key 'sead'"):
        sampling.read_prompts(tmp_path / "bad.json")


@pytest.mark.parametrize("name", sorted(sampling.SCHEDULERS))
def test_every_sampler_makes_a_picture(sampler, name):
    if name in ("lms", "k_lms") and importlib.util.find_spec("scipy") is None:
        pytest.skip("the sampler lms needs scipy")
    picture = sampler.picture(sampling.Prompt("a cat", sample_steps=3, seed=1, sample_sampler=name))
    assert picture.size == (32, 32)


def test_seed_size_guidance_and_negative_prompt_count(sampler):
    def pixels(**changes):
        return np.array(sampler.picture(sampling.Prompt("a cat", **{"sample_steps": 2, "seed": 1, **changes})))

    first = pixels()
    assert np.array_equal(first, pixels())
    assert not np.array_equal(first, pixels(seed=2)) and not np.array_equal(first, pixels(scale=1.0))
    assert not np.array_equal(first, pixels(negative_prompt="dog"))
    assert pixels(width=64, height=37).shape == (32, 64, 3)  # down to a multiple of 8


def test_random_state_is_untouched(sampler):
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    sampler.picture(sampling.Prompt("a cat", sample_steps=3, seed=1, sample_sampler="euler_a"))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_files_are_named_and_seeds_are_shown(sampler, tmp_path):
    prompts = [sampling.Prompt("a cat", sample_steps=1), sampling.Prompt("a dog", sample_steps=1, seed=42)]
    made = sampler.save_pictures(prompts, tmp_path / "new", "lora-000001", run_seed=5)
    assert [path.name for _, path in made] == ["lora-000001_00_5.png", "lora-000001_01_42.png"]
    assert [prompt.seed for prompt, _ in made] == [5, 42] and len(list((tmp_path / "new").iterdir())) == 2
    assert Image.open(made[0][1]).size == (32, 32)


def test_weight_of_a_lora():
    assert si.split_weight("a/b.safetensors:0.5") == ("a/b.safetensors", 0.5)
    assert si.split_weight("a/b.safetensors") == ("a/b.safetensors", 1.0)
    assert si.split_weight("C:\\loras\\b.safetensors") == ("C:\\loras\\b.safetensors", 1.0)


def test_command_line_with_lora(base, tmp_path, capsys):
    from base.sd import load_sd_model
    from network.lora import create_network
    from network.lora_file import save_lora

    network = create_network(load_sd_model(base))
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    save_lora(tmp_path / "lora.safetensors", network.state_for_file())
    pictures = {}
    for name, lora in {"without": [], "with": [str(tmp_path / "lora.safetensors")]}.items():
        words = ["--base", base, "--prompt", "a cat --s 2 --d 1", "--out", str(tmp_path / name), "--device", "cpu"]
        assert si.main([*words, *(word for file in lora for word in ("--lora", file))]) == 0
        (path,) = (tmp_path / name).glob("*.png")
        assert str(path) in capsys.readouterr().out
        pictures[name] = np.array(Image.open(path))
    assert not np.array_equal(pictures["without"], pictures["with"])
    assert si.main(["--base", str(tmp_path / "none"), "--prompt", "a"]) == 2
    assert "does not exist" in capsys.readouterr().err
