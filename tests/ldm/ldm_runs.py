"""Small complete training runs for the tests: a random base model, a few pictures, and the trainer
in this process."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

TREE = Path(__file__).resolve().parents[2] / "lora-ldm"
SCRIPT = TREE / "es_lora_ldm.py"


def make_base(folder, prediction_type="epsilon"):
    """A random Stable Diffusion of about 0.1M parameters for pictures of 32 px, as a diffusers
    folder."""
    import quiet_libraries  # noqa: F401  (before diffusers)
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from tiny_sd import tiny_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel

    from base.sd import SDModel

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(Path(folder) / "tiny_tokenizer")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, bos_token_id=bos, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=2, mid_block_type=None,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=32, block_out_channels=(4, 4, 4, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction_type,
    )
    SDModel(unet, vae, [text], [tokenizer], dict(scheduler.config), base_path=str(folder)).save_pipeline(folder)
    return str(folder)


def make_pictures(folder, count=6, repeats=1, name="cat", size_px=32, seed=0):
    """`count` noisy pictures with captions in FOLDER/<repeats>_<name>."""
    target = Path(folder) / f"{repeats}_{name}"
    target.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for number in range(count):
        pixels = draw.integers(0, 255, (size_px // 8, size_px // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(target / f"{number}.png")
        (target / f"{number}.txt").write_text(f"a photo of a {name}, number {number}, red, blue")
    return str(folder)


def words(base, images, out, *more, **flags):
    """The command line of a short run on the CPU; flags override: seed=3, early_stop=True."""
    settings = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": images,
        "output_dir": out,
        "output_name": "lora",
        "caption_extension": ".txt",
        "resolution": 32,
        "cache_latents": True,
        "learning_rate": 1e-3,
        "train_batch_size": 2,
        "max_train_steps": 9,
        "seed": 1,
        "network_alpha": 4,
        **flags,
    }
    result = []
    for name, value in settings.items():
        if value is True:
            result.append(f"--{name}")
        elif value is not None and value is not False:
            result += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return [*result, *more]


def reset_accelerate():
    """accelerate keeps its settings for the whole process; each run of a test gets fresh ones."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(base, images, out, *more, **flags):
    """Run the trainer here; -> its exit code."""
    from es_lora_ldm import main

    reset_accelerate()
    return main(words(base, images, out, *more, **flags))


def train(base, images, out, *more, **flags):
    """Run the trainer here and expect success; -> the content of result.json."""
    assert run(base, images, out, *more, **flags) == 0
    return result_of(out)


def result_of(out):
    return json.loads((Path(out) / "result.json").read_text())


def history_of(out, column=None):
    """The measurements of a run as records, or one column of them."""
    lines = [json.loads(line) for line in (Path(out) / "cs_history.jsonl").read_text().splitlines()]
    records = [line for line in lines[1:] if "event" not in line]
    return [record[column] for record in records] if column else records


def command(base, images, out, *more, **flags):
    """The same run as a command for a process of its own."""
    return [sys.executable, str(SCRIPT), *words(base, images, out, *more, **flags)]
