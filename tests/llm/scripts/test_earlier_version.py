"""A checkpoint and an adapter of the version before the rooms: resumed to the same end, and
loaded."""

import json
import shutil
from pathlib import Path

import torch
from es_lora_llm import main
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[3]
EARLIER = ROOT / "tests" / "golden" / "earlier_version" / "llm"


def test_a_checkpoint_is_resumed_to_the_same_turning_point(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    facts = json.loads((EARLIER / "command.json").read_text(encoding="utf-8"))
    output = tmp_path / "run"
    shutil.copytree(EARLIER / "checkpoint-10", output / "checkpoint-10")
    words = [word.format(data=EARLIER, output=output) for word in [*facts["flags"], *facts["resume"]]]
    assert main(words) == 0
    result, expected = json.loads((output / "result.json").read_text()), facts["expect"]
    assert result["outcome"] == expected["outcome"] and result["last_step"] == expected["last_step"]
    assert (result["keep_step"], result["detected_step"]) == (expected["turning_step"], expected["detection_step"])
    for name in ("adapter", "adapter-last"):
        ours, theirs = (load_file(folder / name / "adapter_model.safetensors") for folder in (output, EARLIER))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-6) for key in ours)


def test_an_adapter_is_loaded():
    base = AutoModelForCausalLM.from_pretrained(ROOT / "lora-llm" / "tiny_base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, EARLIER / "adapter")
    saved = load_file(EARLIER / "adapter" / "adapter_model.safetensors")
    live = {name.replace(".default", ""): tensor for name, tensor in model.named_parameters() if "lora_" in name}
    assert saved and all(torch.equal(live[name], tensor) for name, tensor in saved.items())
