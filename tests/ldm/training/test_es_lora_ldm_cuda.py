"""What only a GPU can do: fp16, gradients in fp16, 8-bit optimizers, the same run on both
devices."""

import pytest
import torch
from ldm_runs import history_of, run, train

from network.lora_file import load_lora

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "changes",
    [
        dict(mixed_precision="fp16"),
        dict(mixed_precision="fp16", full_fp16=True, no_half_vae=True),
        dict(mixed_precision="bf16", full_bf16=True, gradient_checkpointing=True),
        dict(cache_latents=False, gradient_accumulation_steps=2),
        dict(optimizer_type="AdamW8bit"),
        dict(optimizer_type="PagedAdamW8bit"),
        dict(xformers=True),
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()),
)
def test_settings_train(base, images, tmp_path, changes):
    if "8bit" in changes.get("optimizer_type", ""):
        pytest.importorskip("bitsandbytes")
    if "xformers" in changes:
        pytest.importorskip("xformers")
    settings = dict(calculate_cs=True, cs_interval=1, max_train_steps=6)
    assert run(base, images, tmp_path, **settings, **changes) == 0
    weights = load_lora(tmp_path / "lora.safetensors")[0]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert all(0 < abs(record["cs"]["unet"]) < 1 for record in history_of(tmp_path)[2:])


def test_a_step_is_the_same_on_both_devices(base, images, tmp_path, monkeypatch):
    train(base, images, tmp_path / "gpu", calculate_cs=True, cs_interval=1, max_train_steps=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(base, images, tmp_path / "cpu", calculate_cs=True, cs_interval=1, max_train_steps=4)
    losses = [history_of(tmp_path / device, "loss") for device in ("gpu", "cpu")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_resumed_equals_uninterrupted(base, images, tmp_path):
    settings = dict(
        calculate_cs=True, cs_interval=1, max_train_steps=10, save_every_n_steps=5, save_state=True,
        mixed_precision="fp16",
        network_dropout=0.1,
    )  # fmt: skip
    train(base, images, tmp_path / "whole", **settings)
    train(base, images, tmp_path / "again", **settings, resume=str(tmp_path / "whole/lora-step00000005-state"))
    one, two = (load_lora(tmp_path / name / "lora.safetensors")[0] for name in ("whole", "again"))
    assert all(torch.allclose(one[name].float(), two[name].float(), rtol=1e-2, atol=1e-5) for name in one)
