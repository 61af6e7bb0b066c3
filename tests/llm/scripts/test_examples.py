"""The one-file examples: short, runnable as they are, and they keep the turning point."""

import importlib
import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).resolve().parents[3] / "lora-llm" / "examples"
EXAMPLES = ["plain_trainer.py", "sft_trainer.py"]
INTO_OTHERS = ["axolotl_plugin.py", "llamafactory_train.py"]


def run_here(example, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
    runpy.run_path(str(FOLDER / example), run_name="__main__")


def adapter_of(folder):
    return load_file(str(folder / "adapter_model.safetensors"))


def test_all_examples_are_there():
    assert sorted(path.name for path in FOLDER.glob("*.py")) == sorted(EXAMPLES + INTO_OTHERS)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_short_and_takes_one_import_and_one_line(example):
    lines = (FOLDER / example).read_text().splitlines()
    assert len(lines) < 40
    code = [line for line in lines if "EarlyStopCallback" in line]
    assert len(code) == 2 and code[0].startswith("from early_stop_callback import EarlyStopCallback")
    assert "callbacks=[EarlyStopCallback()]" in code[1]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_stops_and_saves_the_weights_it_says(example, random_base, text_files, tmp_path, monkeypatch):
    output = tmp_path / "run"
    arguments = ("--base", random_base, "--data", text_files["train"], "--output", output, "--epochs", 40)
    run_here(example, monkeypatch, *arguments)
    result = json.loads((output / "result.json").read_text())
    assert result["outcome"] == "stopped_early" and result["last_step"] < result["total_steps"] == 80
    saved, last = adapter_of(output), adapter_of(output / "adapter-last")
    same = all(torch.equal(saved[name], last[name]) for name in saved)
    assert saved.keys() == last.keys() and same == (result["held_step"] == result["last_step"])
    assert "<svg" in (output / "report.html").read_text()


def test_by_default_the_examples_train_the_embedded_base_on_a_bundled_set_offline(tmp_path):
    """Both in one process, for the time of the imports; as an entry point each, with their
    screens."""
    runs = [[str(FOLDER / name), "--output", str(tmp_path / name), "--max_steps", "2"] for name in EXAMPLES]
    code = f"import runpy, sys\nfor sys.argv in {runs!r}:\n    runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warn" not in (done.stdout + done.stderr).lower()
    assert done.stdout.count("Trained to its budget of 2 steps") == 2
    for name in EXAMPLES:
        assert any(tensor.abs().sum() > 0 for key, tensor in adapter_of(tmp_path / name).items() if "lora_B" in key)


def stand_in(monkeypatch, name, **members):
    """A package that is not installed beside the pins, with just these members."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    for member, value in members.items():
        setattr(sys.modules[name], member, value)


def test_llama_factory_is_given_the_callback_and_its_own_configuration(monkeypatch):
    given = []
    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=lambda callbacks: given.append((callbacks, sys.argv[1:])))
    run_here("llamafactory_train.py", monkeypatch, "config.yaml", "learning_rate=1e-3")
    ((callbacks, words),) = given
    assert [type(callback).__name__ for callback in callbacks] == ["EarlyStopCallback"]
    assert words == ["config.yaml", "learning_rate=1e-3"]


def test_axolotl_is_given_the_callback_by_the_plugin_its_configuration_names(monkeypatch):
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=type("BasePlugin", (), {}))
    line = next(line for line in (FOLDER / "axolotl_plugin.py").read_text().split("\n") if "EarlyStopPlugin" in line)
    module, name = line.strip(" -").split(".")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, module, raising=False)
    plugin = getattr(importlib.import_module(module), name)()
    callbacks = plugin.add_callbacks_post_trainer(cfg=None, trainer=None)
    assert [type(callback).__name__ for callback in callbacks] == ["EarlyStopCallback"]
