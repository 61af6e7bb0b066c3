"""What the judge does not see of an adapter is said."""

import json
import shutil

import torch
from judge_checkpoints import main as judge
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def saved(base, folder, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder / "checkpoint-10")
    shutil.copytree(folder / "checkpoint-10", folder / "checkpoint-20")


def verdict(base, folder, capsys):
    capsys.readouterr()
    assert judge([str(folder), "--base", str(base), "--steps_per_epoch", "10", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["left_out"]


def test_dora_magnitudes_and_whole_modules_are_said_to_be_left_out(random_base, tmp_path, capsys):
    saved(random_base, tmp_path / "dora", use_dora=True)
    assert "the DoRA magnitudes of 2 layers" in verdict(random_base, tmp_path / "dora", capsys)
    assert judge([str(tmp_path / "dora"), "--base", str(random_base), "--steps_per_epoch", "10"]) == 0
    assert "Left out of the judgement: the DoRA magnitudes" in capsys.readouterr().out
    saved(random_base, tmp_path / "head", modules_to_save=["lm_head"])
    assert "1 other tensors" in verdict(random_base, tmp_path / "head", capsys)


def test_nothing_is_said_of_a_plain_lora(random_base, tmp_path, capsys):
    saved(random_base, tmp_path / "plain")
    assert verdict(random_base, tmp_path / "plain", capsys) == ""
