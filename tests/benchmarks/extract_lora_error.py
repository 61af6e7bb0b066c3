"""How far a LoRA extracted from a fine-tuned U-Net is from it, by rank.

    python tests/benchmarks/extract_lora_error.py [--steps 60] [--learning_rate 1e-4]

Fine-tunes the U-Net of lora-ldm/tiny_base on dataset/portraits with --train_full_unet, extracts
LoRAs of it, folds each into the base and compares what the U-Nets predict on 16 noisy latents with
four prompts. Error: ||LoRA - tuned|| / ||tuned - base||, 0 is the fine-tuned model and 1 is the
base. Once against the whole fine-tuned U-Net, and once against one with only the changes that a
LoRA can hold (biases, norms, embeddings, first and last convolution are the base's). Writes
extract_lora_error.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "lora-ldm"))

import torch  # noqa: E402
from es_lora_ldm import main as train  # noqa: E402
from extract_lora import Selection, changed_layers, extract, share_outside  # noqa: E402

from base.sd import load_sd_model  # noqa: E402
from network.folding import fold_lora  # noqa: E402
from network.lora import find_modules  # noqa: E402

BASE = str(ROOT / "lora-ldm" / "tiny_base")
RESULT = Path(__file__).with_suffix(".md")
PROMPTS = ["a smiling face", "a portrait of a woman with a hat", "a red apple", "a house by the sea"]
CHOICES = [
    ("all", 4),
    ("all", 32),
    ("all", 128),
    ("all", 10_000),
    ("energy:0.9", 4),
    ("energy:0.9", 32),
    ("energy:0.9", 128),
]


@torch.no_grad()
def predictions(model):
    """What the U-Net says to 16 noisy latents, flat."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for timestep in (50, 300, 600, 900):
        latents = torch.randn(len(PROMPTS), 4, 8, 8, generator=generator)
        results.append(model.predict_noise(latents, torch.full((len(PROMPTS),), timestep), model.encode_text(PROMPTS)))
    return torch.cat(results).flatten()


def only_lora_changes(base, tuned):
    """The base with the fine-tuned weights of the layers that a LoRA can change."""
    finals = {name: layer.weight for _, _, name, layer in find_modules(tuned, with_convolutions=True)}
    for _, _, name, layer in find_modules(base, with_convolutions=True):
        layer.weight.data.copy_(finals[name])
    return base


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning_rate", default="1e-4")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = ["--pretrained_model_name_or_path", BASE, "--train_data_dir", str(ROOT / "dataset/portraits/train")]
        words += [
            "--caption_extension",
            ".txt",
            "--resolution",
            "64",
            "--cache_latents",
            "--train_full_unet",
            "--seed",
            "1",
        ]
        words += ["--output_dir", folder, "--output_name", "tuned", "--max_train_steps", str(args.steps)]
        assert train([*words, "--learning_rate", args.learning_rate, "--train_batch_size", "2"]) == 0
        tuned = load_sd_model(f"{folder}/tuned")
    base = load_sd_model(BASE)
    layers = changed_layers(base, tuned)
    start, whole = predictions(base), predictions(tuned)
    linear = predictions(only_lora_changes(load_sd_model(BASE), tuned))
    rows = []
    for select, rank in CHOICES:
        kept, model = Selection.parse(select).choose(layers), load_sd_model(BASE)
        tensors, shares = extract(kept, rank)
        fold_lora(model, tensors)
        said = predictions(model)
        errors = [((said - wanted).norm() / (wanted - start).norm()).item() for wanted in (whole, linear)]
        held = sum(shares[layer.name] * layer.energy for layer in kept) / sum(layer.energy for layer in layers)
        size = sum(tensor.numel() for tensor in tensors.values()) / 1e6
        name = "full" if rank > 1000 else rank
        rows.append(
            f"| {select} | {len(kept)} | {name} | {size:.2f} | {held:.1%} | {errors[0]:.3g} | {errors[1]:.3g} |"
        )
    head = "| layers | how many | rank | million numbers | of the change | error, whole U-Net |"
    head += " error, what a LoRA can hold |"
    facts = (
        f"{args.steps} steps of AdamW at {args.learning_rate}, batch 2, float32 on a CPU; {len(layers)} layers; "
        f"{share_outside(base, tuned, layers):.1%} of the change is outside of them. Largest absolute difference\n"
        "at full rank to what a LoRA can hold: "
    )
    model = load_sd_model(BASE)
    fold_lora(model, extract(layers, 10_000)[0])
    facts += f"{(predictions(model) - linear).abs().max():.1e}."
    text = f"# Error of an extracted LoRA\n\n{__doc__}\n{head}\n|{' --- |' * 7}\n" + "\n".join(rows) + f"\n\n{facts}\n"
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
