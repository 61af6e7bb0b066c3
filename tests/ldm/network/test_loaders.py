"""No key of a written file is left by ComfyUI, AUTOMATIC1111, sd-scripts and diffusers.

golden/loader_keys.json has what they took when benchmarks/loaders.py ran them. Where checkouts are
named (COMFYUI_DIR, A1111_DIR, SD_SCRIPTS_DIR with SD_SCRIPTS_PYTHON), the programs run here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS / "loaders"), str(TESTS / "benchmarks")]

from loaders import DAMAGES, NEEDS, grouped, verdict  # noqa: E402
from shaped_files import LYCORIS_KINDS, damaged, shaped_model  # noqa: E402

from network.lora import create_network, find_modules  # noqa: E402
from network.lora_file import group_modules, save_lora  # noqa: E402
from network.lycoris_network import create_lycoris_network  # noqa: E402

GOLDEN = json.loads((TESTS / "golden" / "loader_keys.json").read_text())
WEBUIS = ["ComfyUI", "AUTOMATIC1111"]
EVERY = 10


def known_layers(family):
    groups = GOLDEN["layers"][family].items()
    return {
        pattern.replace("#", "{}").format(*entry.split("-")) for pattern, all_ in groups for entry in all_.split(" ")
    }


def left(family, tool, keys):
    """The keys that a tool does not know, and alphas that its update needs and that lack."""
    layers = known_layers(family) - set(GOLDEN["left"][tool].get(family, []))
    modules = group_modules(keys)
    lacking = [f"{name}.alpha" for name, parts in modules.items() if "alpha" not in parts]
    return lacking + [
        key for key in keys if key.partition(".")[0] not in layers or key.partition(".")[2] not in GOLDEN["parts"][tool]
    ]


def lora_keys(model, with_convolutions=False):
    """The keys of a LoRA or LoCon, without the time that it takes to make one of SDXL."""
    found = find_modules(model, with_convolutions=with_convolutions)
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    return {f"{name}.{part}": torch.zeros(()) for _, _, name, _ in found for part in parts}


@pytest.fixture(scope="module")
def lora():
    return create_network(shaped_model("sd15"), rank=4, alpha=2.0).state_for_file()


def test_the_keys_of_a_lora_are_as_the_fast_list_says(lora):
    assert lora.keys() == lora_keys(shaped_model("sd15")).keys()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_tool_knows_every_key_of_loras_and_locons(family):
    model, tools = shaped_model(family), [tool for tool in GOLDEN["left"] if family in GOLDEN["left"][tool]]
    assert len(tools) >= 9
    for with_convolutions in (False, True):
        keys = lora_keys(model, with_convolutions)
        assert {tool: left(family, tool, keys) for tool in tools} == {tool: [] for tool in tools}


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoCon, Tucker"])
def test_web_uis_know_every_key_of_lycoris_files(kind):
    settings = {"rank": 4, "alpha": 2.0, "network_args": LYCORIS_KINDS[kind]}
    keys = create_lycoris_network(shaped_model("sd15"), **settings).state_for_file()
    assert grouped(set(group_modules(keys))) == GOLDEN["layers"]["sd15"]
    assert {tool: left("sd15", tool, keys) for tool in WEBUIS} == {tool: [] for tool in WEBUIS}


def test_a_renamed_key_and_a_missing_alpha_are_found(lora):
    found = {kind: (layer, left("sd15", "ComfyUI", keys)) for kind, layer, keys in damaged(lora, EVERY)}
    renamed, without_alpha = (found[kind] for kind in DAMAGES)
    assert len(renamed[1]) == 3 and renamed[0] not in known_layers("sd15") - {renamed[0]}
    assert without_alpha[1] == [f"{without_alpha[0]}.alpha"]


@pytest.mark.parametrize("script", ["comfyui.py", "automatic1111.py", "kohya.py"])
def test_the_loader_itself_takes_a_lora_and_shows_the_two_damages(tmp_path, script):
    needed = [NEEDS[script], *(["SD_SCRIPTS_PYTHON"] if script == "kohya.py" else [])]
    if not all(name in os.environ for name in needed):
        pytest.skip(f"{' and '.join(needed)}: needed to run {script}, not set")
    python = os.environ["SD_SCRIPTS_PYTHON"] if script == "kohya.py" else sys.executable
    files = [sys.executable, TESTS / "loaders" / "shaped_files.py", tmp_path]
    subprocess.run([*files, "--only", "LoRA", "--families", "sd15", "--every", str(EVERY)], check=True)
    out = tmp_path / "out.pt"
    subprocess.run([python, TESTS / "loaders" / script, tmp_path, "--every", str(EVERY), "--out", out], check=True)
    results = torch.load(out, weights_only=True)
    said = {}
    for kind in ("LoRA", *DAMAGES):
        expected = torch.load(tmp_path / f"sd15.{kind}.expected.pt", weights_only=True)
        tools = results[f"sd15.{kind}.safetensors"]
        said[kind] = {tool: verdict(result, expected) for tool, result in tools.items()}
    assert set(said["LoRA"].values()) <= {"all keys loaded", "all keys shown"}
    loading = [tool for tool in said["LoRA"] if tool in ("ComfyUI", "AUTOMATIC1111", "--network_weights")]
    assert loading
    for tool in loading:
        assert said[DAMAGES[0]][tool] == "left: 3 keys"
        assert said[DAMAGES[1]][tool] == "all keys loaded, another change in 1 of the layers"


def test_a_file_keeps_the_keys_that_the_loaders_know(lora, tmp_path):
    from safetensors import safe_open

    save_lora(tmp_path / "it.safetensors", lora)
    with safe_open(tmp_path / "it.safetensors", "pt") as file:
        assert {tool: left("sd15", tool, dict.fromkeys(file.keys())) for tool in WEBUIS} == dict.fromkeys(WEBUIS, [])
