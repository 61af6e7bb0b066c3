"""A training state, a LoRA and a run folder of the version before the rooms: resumed to the same
end, loaded, read."""

import json
import shutil
from pathlib import Path

import torch
from es_lora_ldm import main
from safetensors.torch import load_file

from demo.run_folders import Run

ROOT = Path(__file__).resolve().parents[3]
EARLIER = ROOT / "tests" / "golden" / "earlier_version" / "ldm"
FACTS = json.loads((EARLIER / "command.json").read_text(encoding="utf-8"))


def test_a_state_is_resumed_to_the_same_turning_point(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    output, expected = tmp_path / "run", FACTS["expect"]
    state = "portraits-step00000008-state"
    shutil.copytree(EARLIER / state, output / state)
    shutil.copytree(EARLIER / "images", tmp_path / "images")
    shutil.copy(EARLIER / "start.safetensors", tmp_path)
    words = [word.format(data=tmp_path, output=output) for word in [*FACTS["flags"], *FACTS["resume"]]]
    assert main(words) == 0
    result = json.loads((output / "result.json").read_text())
    assert result["outcome"] == expected["outcome"] and result["last_step"] == expected["last_step"]
    assert (result["keep_step"], result["detected_step"]) == (expected["turning_step"], expected["detection_step"])
    assert {part: verdict["turning_step"] for part, verdict in result["parts"].items()} == expected["parts"]
    for name in (expected["keeps"], expected["last"]):
        ours, theirs = load_file(output / name), load_file(EARLIER / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-6) for key in ours)


def test_a_lora_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shutil.copytree(EARLIER / "images", tmp_path / "images")
    words = [word.format(data=tmp_path, output=tmp_path / "run") for word in FACTS["flags"]]
    words[words.index("--network_weights") + 1] = str(EARLIER / "portraits.safetensors")
    assert main([*words, "--max_train_epochs", "1", "--early_stop", "False"]) == 0
    assert (
        load_file(tmp_path / "run" / "portraits.safetensors").keys()
        == load_file(EARLIER / "portraits.safetensors").keys()
    )


def test_the_page_reads_its_run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("result.json", "cs_history.jsonl", "portraits.safetensors", "portraits-last.safetensors"):
        shutil.copy(EARLIER / name, folder)
    run = Run("run", folder)
    assert set(run.weights()) == {"turning point", "last"} and run.history() is not None
    assert run.verdict().startswith("Stopped after step 11 of 48: overfitting began at about step 7.")
