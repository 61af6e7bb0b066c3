"""Bases and adapters that lack tensors, or have others: refused, with the first names and how many.

Else what is missing would be drawn at random, and trained on, asked or merged."""

import json
import shutil

import generate_text
import judge_checkpoints
import merge_adapter
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.weights import attach_lora
from base.loading import load_base
from base.spec import BaseSpec

MODEL = "model.safetensors"
ADAPTER = "adapter_model.safetensors"


def changed(folder, file, change):
    tensors = change(load_file(folder / file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
    return folder


def half(tensors):
    return {name: tensors[name] for name in sorted(tensors)[: len(tensors) // 2]}


def renamed(tensors):
    return {name.replace("self_attn", "attention"): tensor for name, tensor in tensors.items()}


def cut(tensors):
    return {name: tensor[:-1] if "q_proj" in name else tensor for name, tensor in tensors.items()}


# -------------------------------------------------------------------------------------------- bases


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (half, "11 of its tensors are missing (model.layers.0.self_attn.v_proj.weight, model.layers.1."),
        (renamed, "8 of its tensors are missing (model.layers.0.self_attn.k_proj.weight, "),
        (cut, "2 of its tensors have another shape than its config.json says (model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_a_base_that_lacks_tensors_or_has_others_is_refused(random_base, tmp_path, change, told, bits):
    folder = changed(shutil.copytree(random_base, tmp_path / "base"), MODEL, change)
    with pytest.raises(ValueError) as refused:
        load_base(BaseSpec(str(folder), bits))
    assert told in str(refused.value) and str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


def sharded(base, folder, lost_file=False, lost_tensors=False):
    shutil.copytree(base, folder)
    tensors = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    first = half(tensors)
    second = {name: tensor for name, tensor in tensors.items() if name not in first}
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = {name: names[name in second] for name in tensors}
    (folder / f"{MODEL}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_file(first, folder / names[0], metadata={"format": "pt"})
    if not lost_file:
        save_file(half(second) if lost_tensors else second, folder / names[1], metadata={"format": "pt"})
    return folder


def test_a_sharded_base_whose_index_names_what_is_not_there_is_refused(random_base, tmp_path):
    load_base(BaseSpec(str(sharded(random_base, tmp_path / "whole")), 32))
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors"):
        load_base(BaseSpec(str(sharded(random_base, tmp_path / "file", lost_file=True)), 32))
    with pytest.raises(ValueError, match="of its tensors are missing"):
        load_base(BaseSpec(str(sharded(random_base, tmp_path / "tensors", lost_tensors=True)), 32))


def test_tied_tensors_are_not_missed(random_base, tmp_path):
    folder = shutil.copytree(random_base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    changed(folder, MODEL, lambda tensors: {name: tensors[name] for name in tensors if name != "lm_head.weight"})
    load_base(BaseSpec(str(folder), 32))


# ----------------------------------------------------------------------------------------- adapters


@pytest.fixture
def adapter(random_base, tmp_path):
    """A LoRA of q_proj and v_proj, as PEFT saves it."""
    base = load_base(BaseSpec(str(random_base), 32, for_lora=False))
    torch.manual_seed(0)
    model = attach_lora(base, rank=4, alpha=8, modules="q_proj,v_proj")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "run" / "checkpoint-1")
    return tmp_path / "run" / "checkpoint-1"


def foreign(tensors):
    extra = {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)}
    return {**tensors, **extra}


HALF = "4 tensors that its base has a place for are missing (base_model.model.model.layers.1.self_attn.q_proj.lora_A"
FOREIGN = "1 tensors of it have no place in the base (base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight)"
ONE_MATRIX = "2 tensors that its base has a place for are missing"


def without_a_matrix(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("q_proj.lora_B.weight")}


@pytest.mark.parametrize(("change", "told"), [(half, HALF), (foreign, FOREIGN), (without_a_matrix, ONE_MATRIX)])
def test_half_an_adapter_and_foreign_names_are_refused_by_every_tool(adapter, tmp_path, capsys, change, told):
    given = ["--adapter", str(changed(adapter, ADAPTER, change))]
    assert generate_text.main([*given, "--prompt", "a", "--max_new_tokens", "2"]) == 2
    outputs = [["--output", str(tmp_path / "merged")], ["--lora_gguf", str(tmp_path / "lora.gguf")]]
    assert [merge_adapter.main([*given, *output]) for output in outputs] == [2, 2]
    lines = [line for line in capsys.readouterr().err.splitlines() if "--adapter" in line]
    assert len(lines) == 3 and all(told in line for line in lines)
    assert not (tmp_path / "merged").exists() and not (tmp_path / "lora.gguf").exists()


def test_a_whole_adapter_is_used(adapter, tmp_path, capsys):
    assert generate_text.main(["--adapter", str(adapter), "--prompt", "a", "--max_new_tokens", "2"]) == 0
    assert merge_adapter.main(["--adapter", str(adapter), "--lora_gguf", str(tmp_path / "lora.gguf")]) == 0


@pytest.mark.parametrize(
    "config",
    [
        {"r": 10**9},
        {"r": "4"},
        {"r": None},
        {"rank_pattern": {"q_proj": 10**9}},
        {"lora_alpha": "x"},
        {"target_modules": 5},
        {"target_modules": "("},
        {"alpha_pattern": [1]},
        {"peft_type": ["LORA"]},
        {"base_model_name_or_path": 5},
    ],
)
def test_a_configuration_of_other_kinds_is_one_message(adapter, capsys, config):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    assert generate_text.main(["--adapter", str(adapter), "--prompt", "a", "--max_new_tokens", "2"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("generate_text: ")]
    assert len(told) == 1 and "fault of ES-LoRA" not in told[0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (half, "2 layers that its configuration names are missing (model.layers.1.self_attn.q_proj, "),
        (lambda tensors: {name: tensors[name] for name in tensors if "q_proj" in name}, "are missing (v_proj)"),
        (without_a_matrix, "has no lora_up matrix"),
    ],
)
def test_the_judge_refuses_half_an_adapter(adapter, random_base, capsys, change, told):
    changed(adapter, ADAPTER, change)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "v_proj"]}))
    words = [str(adapter.parent), "--base", str(random_base), "--steps_per_epoch", "1"]
    assert judge_checkpoints.main(words) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
