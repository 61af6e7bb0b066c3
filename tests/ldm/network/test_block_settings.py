"""--network_args of kohya's networks/lora.py: ranks and learning rates of blocks, LoRA+.

The golden file holds what sd-scripts v0.10.1 makes of the same words on U-Nets and text encoders of
full size, shapes only. With SD_SCRIPTS_DIR its own code computes them again, beside ours."""

import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import quiet_libraries  # noqa: F401  (before diffusers)
import torch
from diffusers import UNet2DConditionModel
from tiny_sd import tiny_sd
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from base.sd import SDModel
from base.sdxl import SDXLModel
from base.single_file import CONFIG_ROOT
from network.blocks import block_of
from network.lora import create_network, create_network_beside, find_modules
from settings.network_args import parse_network_args

REVISION = "v0.10.1"
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / f"sd_scripts_network_args_{REVISION}.json"
RATES = {"text_encoder_lr": 5e-5, "unet_lr": 1e-3}
SD_DIMS = "0,0,4,4,4,8,8,8,2,2,2,2,16,2,2,2,8,8,8,4,4,4,1,1,0"
SDXL_DIMS = "4,4,4,4,8,8,8,16,16,2,4,8,2,16,16,16,8,8,8,2,0,0,4"
# fmt: off
CASES = {
    "sd1 ranks": ["block_dims=" + SD_DIMS, "block_alphas=" + ",".join(f"{n / 2}" for n in range(25)),
                  "conv_block_dims=" + ",".join("02" * 12 + "4"), "conv_alpha=0.5", "conv_dim=2"],
    "sd1 rates": ["down_lr_weight=cosine+.25", "mid_lr_weight=0.5", "up_lr_weight=0,1,.05,1,1,1,.5,,1,1,2,.1",
                  "block_lr_zero_threshold=0.05", "conv_dim=2", "conv_alpha=1"],
    "sd1 short": ["down_lr_weight=.5,.25", "loraplus_lr_ratio=16", "loraplus_text_encoder_lr_ratio=4"],
    "sdxl all": ["block_dims=" + SDXL_DIMS, "block_alphas=" + ",".join(["0"] + ["2"] * 22), "mid_lr_weight=0.1,1,.3",
                 "down_lr_weight=sine", "up_lr_weight=reverse_linear+.125", "loraplus_lr_ratio=2",
                 "loraplus_unet_lr_ratio=3"],
}
BESIDE = {  # slow to make, so only where sd-scripts' code is at hand
    "sdxl convolutions": ["conv_block_dims=" + ",".join(["2"] * 22 + ["0"]), "up_lr_weight=zeros+.5",
                           "mid_lr_weight=0,1,0", "conv_block_alphas=" + ",".join("1" * 23)],
    "sd1 plus": ["loraplus_unet_lr_ratio=8", "conv_dim=4"],
}
# fmt: on
WORDS = {**CASES, **BESIDE}


def text_encoder(kind, folder):
    return kind(CLIPTextConfig.from_pretrained(CONFIG_ROOT / folder))


class WithTextModel(torch.nn.Module):
    """A text encoder with the level in its names that transformers had before version 5."""

    def __init__(self, encoder):
        super().__init__()
        self.text_model = encoder


def full_size(family):
    """(U-Net, text encoders) of a family, shapes only."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIG_ROOT / family / "unet"))
        encoders = [text_encoder(CLIPTextModel, f"{family}/text_encoder")]
        if family == "sdxl":
            encoders.append(text_encoder(CLIPTextModelWithProjection, "sdxl/text_encoder_2"))
    return unet, encoders


def ours(case):
    """(groups, layers) of a case: [[name, rate, tensors]], {layer: [rank, alpha]}."""
    family = case.split()[0]
    unet, encoders = full_size(family)
    kind = SDXLModel if family == "sdxl" else SDModel
    model = kind(unet, None, encoders, [None] * len(encoders), {}, "x")
    network = create_network(model, rank=4, alpha=1, **parse_network_args(WORDS[case], family == "sdxl").options)
    groups = network.parameter_groups(1e-4, RATES["unet_lr"], RATES["text_encoder_lr"])
    layers = {module.name: [module.down.shape[0], module.alpha] for module in network.modules}
    return [[group["name"], group["lr"], len(group["params"])] for group in groups], layers


def kohyas(case, code):
    """The same of sd-scripts' own code. code(path): a file of it."""
    family = case.split()[0]
    unet, encoders = full_size(family)
    library = types.ModuleType("library.utils")
    library.setup_logging = lambda *_, **__: None
    sys.modules.update({"library": types.ModuleType("library"), "library.utils": library})
    modules = {}
    for name in ("library.sdxl_original_unet", "networks.lora"):
        modules[name] = sys.modules[name] = types.ModuleType(name)
        exec(compile(code(name.replace(".", "/") + ".py"), name, "exec"), modules[name].__dict__)
    with torch.device("meta"):
        if family == "sdxl":
            unet = modules["library.sdxl_original_unet"].SdxlUNet2DConditionModel()
        words = dict(word.split("=", 1) for word in WORDS[case])
        encoders = [encoder if hasattr(encoder, "text_model") else WithTextModel(encoder) for encoder in encoders]
        network = modules["networks.lora"].create_network(1.0, 4, 1.0, None, encoders, unet, **words)
        network.apply_to(encoders, unet)
    groups, names = network.prepare_optimizer_params(RATES["text_encoder_lr"], RATES["unet_lr"], 1e-4)
    loras = network.text_encoder_loras + network.unet_loras  # their alphas are tensors without values here
    layers = {lora.lora_name: [lora.lora_dim, round(lora.scale * lora.lora_dim, 9)] for lora in loras}
    return [[name, group["lr"], len(list(group["params"]))] for name, group in zip(names, groups)], layers


def as_kohya_groups(groups):
    """One text encoder's groups and the other's as one, as kohya has them; order of names."""
    joined = {}
    for name, rate, count in groups:
        name = name.replace("te1", "te").replace("te2", "te").replace("te", "textencoder", name.startswith("te"))
        before = joined.get(name, [name, rate, 0])
        assert before[1] == rate
        joined[name] = [name, rate, before[2] + count]
    return sorted(joined.values())


def condensed(groups, layers):
    text = "\n".join(f"{name} {rank} {alpha:g}" for name, (rank, alpha) in sorted(layers.items()))
    return {"groups": sorted(groups), "layers": len(layers), "sha256": hashlib.sha256(text.encode()).hexdigest()}


@pytest.mark.parametrize("case", CASES)
def test_groups_and_layers_are_those_of_the_golden_file(case):
    groups, layers = ours(case)
    assert condensed(as_kohya_groups(groups), layers) == json.loads(GOLDEN.read_text())[case]


@pytest.mark.parametrize("case", WORDS)
def test_groups_and_layers_are_those_that_kohyas_code_makes(case):
    repository = os.environ.get("SD_SCRIPTS_DIR")
    if not repository:
        pytest.skip("SD_SCRIPTS_DIR names no sd-scripts repository")
    show = ["git", "-C", repository, "show"]
    groups, layers = kohyas(case, lambda path: subprocess.check_output([*show, f"{REVISION}:{path}"]))
    own_groups, own_layers = ours(case)
    assert as_kohya_groups(own_groups) == sorted(groups)
    assert own_layers == layers


def test_numbers_are_parsed_as_arguments_of_the_network():
    assert parse_network_args(["conv_dim=4", "conv_alpha=2", "rank_dropout=0.1"]).options == {
        "conv_rank": 4, "conv_alpha": 2.0, "rank_dropout": 0.1,
    }  # fmt: skip
    assert parse_network_args(["conv_dim=4"]).options["conv_alpha"] == 1.0
    assert not parse_network_args(None).options


@pytest.mark.parametrize(
    "words, message",
    [
        (["conv_rnk=4"], "'conv_rnk=4'"),
        (["conv_dim=four"], "conv_dim=four' .not a whole number"),
        (["block_dims=4,4"], "it has 2 values, and this U-Net has 25 blocks"),
        (["block_dims=4,4,x" + ",4" * 22], "not a whole number"),
        (["down_lr_weight=1"], "12 numbers with commas, or one of cosine"),
        (["up_lr_weight=cosine+much"], "not a number"),
        (["mid_lr_weight=nan"], "it must be a finite number"),
        (["down_lr_weight=1,-1"], "it must be at least 0"),
        (["loraplus_lr_ratio=0"], "it must be above 0"),
        (["loraplus_ratio=2", "conv_dim=x"], "did you mean loraplus_lr_ratio.*conv_dim=x"),
    ],
)
def test_words_that_kohyas_network_cannot_use_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_network_args(words)
    assert collected(words), "refused before the base is loaded"


def collected(words):
    """The problems that the command line finds in --network_args."""
    from ldm_runs import words as command_line

    from settings.parsing import parse_arguments

    try:
        parse_arguments(command_line("base", "images", "out", network_args=words))
    except ValueError as error:
        return [line for line in str(error).splitlines() if line.startswith("--network_args")]
    return []


def test_sdxl_has_23_blocks():
    with pytest.raises(ValueError, match="it has 25 values, and this U-Net has 23 blocks"):
        parse_network_args(["block_dims=" + SD_DIMS], sdxl=True)


@pytest.mark.parametrize(
    "words, notice",
    [
        (["down_lr_weight=1,1"], "down_lr_weight has 2 values for 12 blocks: the others are 1"),
        (["mid_lr_weight=1,1"], "mid_lr_weight has 2 values for 1 blocks: the 1 last are left out"),
        (["conv_block_dims=" + SD_DIMS], "conv_block_dims has no effect without block_dims or a weight"),
        (["block_lr_zero_threshold=.1"], "block_lr_zero_threshold has no effect without down_lr_weight"),
        (["conv_alpha=2"], "conv_alpha has no effect without conv_dim"),
        (["block_dims=" + SD_DIMS], "no LoRA in blocks 0, 1, 24 of the U-Net"),
        (["mid_lr_weight=0"], "no LoRA in block 12 of the U-Net"),
    ],
)
def test_what_words_do_otherwise_is_said(words, notice):
    assert [line for line in parse_network_args(words).notices if notice in line]


def test_every_layer_of_both_families_has_its_block():
    for family, kind, blocks in (("sd1", SDModel, range(1, 25)), ("sdxl", SDXLModel, range(2, 22))):
        unet, encoders = full_size(family)
        model = kind(unet, None, encoders, [None] * len(encoders), {}, "x")
        found = find_modules(model, train_text_encoder=False, with_convolutions=True)
        assert {block_of(name) for _, _, name, _ in found} == set(blocks)
    assert block_of("lora_unet_out_2") is None and block_of("lora_unet_conv_in") is None


def test_a_rank_that_a_block_cannot_have_names_its_words(tmp_path):
    options = parse_network_args(["block_dims=" + ",".join(["99"] * 25)]).options
    with pytest.raises(ValueError, match="--network_args block_dims 99: no layer"):
        create_network(tiny_sd(tmp_path), **options)


def test_no_block_with_a_rank_is_nothing_to_train(tmp_path):
    options = parse_network_args(["block_dims=" + ",".join(["0"] * 25)]).options
    with pytest.raises(ValueError, match="every block of the U-Net has rank 0"):
        create_network(tiny_sd(tmp_path), train_text_encoder=False, **options)


def test_a_network_beside_another_learns_at_its_rates(tmp_path):
    model = tiny_sd(tmp_path)
    network = create_network(model, **parse_network_args(["up_lr_weight=sine", "loraplus_lr_ratio=2"]).options)
    beside = create_network_beside(model, network, "other", 2)
    rates = [[(group["name"], group["lr"]) for group in net.parameter_groups(1e-3)] for net in (network, beside)]
    assert rates[0] == rates[1] and len(rates[0]) > 4


def test_a_file_with_many_ranks_is_loaded_by_its_words_and_by_dim_from_weights(tmp_path):
    options = parse_network_args(["block_dims=" + ",".join(str(n % 3 + 1) for n in range(25)), "conv_dim=2"]).options
    saved = create_network(tiny_sd(tmp_path), **options).state_for_file()
    for settings in (options, {"dim_from_weights": True}):
        network = create_network(tiny_sd(tmp_path), **settings, weights=saved)
        assert all(torch.equal(value, saved[name]) for name, value in network.state_for_file().items())
        assert len({module.rank for module in network.modules}) > 2
