"""Folders as OneTrainer, ai-toolkit and PEFT's scripts leave them decide as the recorded run."""

import json

import pytest
import torch
from safetensors.torch import save_file
from test_judge_checkpoints import DIFFUSION, STEPS, STEPS_PER_EPOCH, assert_same_decision, diffusion_run, judged


def kohya_tensors(pairs):
    """kohya's keys, the U-Net named as diffusers does."""
    tensors = {}
    for (component, path, _, _), (down, up) in zip(DIFFUSION, pairs):
        name = f"lora_{component}_{path}".replace(".", "_")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down.contiguous(), up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors


def dotted_tensors(pairs):
    """OneTrainer's newer keys: dots, the original layout of the U-Net, clip_l."""
    tensors = {}
    for (component, path, original, _), (down, up) in zip(DIFFUSION, pairs):
        name = f"unet.{original}" if component == "unet" else f"clip_l.{path}"
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down.contiguous(), up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors


def one_trainer(tensors_of):
    def write(folder, step, pairs, _):
        bundle = {"bundle_emb.mycat.clip_l": torch.ones(2, 6)}
        place = f"{step}-{step // STEPS_PER_EPOCH}-{step % STEPS_PER_EPOCH}"
        save_file(
            {**tensors_of(pairs), **bundle},
            str(folder / f"cat2026-01-02_10-11-{step % 60:02d}-save-{place}.safetensors"),
        )

    return write


def ai_toolkit(folder, step, pairs, _):
    name = "my_cat" if step == STEPS else f"my_cat_{step:09d}"
    information = {"training_info": json.dumps({"step": step, "epoch": step // STEPS_PER_EPOCH})}
    save_file(kohya_tensors(pairs), str(folder / f"{name}.safetensors"), information)


def peft(inside):
    def write(folder, step, pairs, _):
        tensors = {}
        for (component, path, _, _), (down, up) in zip(DIFFUSION, pairs):
            if component == "unet":
                tensors[f"base_model.model.{path}.lora_A.weight"] = down.contiguous()
                tensors[f"base_model.model.{path}.lora_B.weight"] = up.contiguous()
        place = folder / f"checkpoint-{step}" / inside
        place.mkdir(parents=True)
        save_file(tensors, str(place / "adapter_model.safetensors"))
        (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))

    return write


@pytest.mark.parametrize(
    "layout, base_layout",
    [
        (one_trainer(kohya_tensors), "folder"),
        (one_trainer(dotted_tensors), "file"),
        (ai_toolkit, "folder"),
        (peft(""), "folder"),
        (peft("unet"), "file"),
    ],
    ids=["OneTrainer", "OneTrainer with dots", "ai-toolkit", "PEFT", "PEFT, a folder a part"],
)
def test_a_folder_of_another_trainer_decides_as_the_replay(tmp_path, capsys, layout, base_layout):
    run = diffusion_run(tmp_path, layout, base_layout)
    verdict = judged(run, capsys, "--steps_per_epoch", str(STEPS_PER_EPOCH))
    assert verdict["component"] == "unet"
    assert_same_decision(verdict, run)


def test_one_trainers_names_tell_how_many_steps_an_epoch_has(tmp_path, capsys):
    run = diffusion_run(tmp_path, one_trainer(kohya_tensors))
    assert judged(run, capsys)["steps_per_epoch"] == STEPS_PER_EPOCH
