"""Real trainings of diffusers' patched DreamBooth LoRA scripts on a CPU, against the same seeded
trainings unpatched.

    python tests/patches/real_scripts.py --diffusers REPOSITORY --work FOLDER --python PY \
        [--revision HEAD] [--torchvision FOLDER] [--only NAME ...]

REPOSITORY: a git repository of diffusers. PY: the Python of an environment with torch, diffusers of
that revision or newer, transformers, accelerate and peft. FOLDER of torchvision: where it is, if it
is not installed there.

Each script trains over a tiny random base of its structure: unpatched with every step saved,
patched without flags, patched with --early_stop, and with an average. Each prints one line of
figures; all go into FOLDER/scripts.json. Exit code 1 where one fails."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from literal_average import is_average  # noqa: E402

APPLY = HERE.parents[1] / "patches" / "apply_patches.py"
EXAMPLES = "examples/dreambooth"
STEPS, WIDTH = 40, 0.25
STOP = ["--early_stop", "--stop_rule", "second-valley", "--cs_interval", "1", "--window_size", "3"]
# Script (train_dreambooth_lora + this) and the base it trains over.
SCRIPTS = {
    "": "sd",
    "_sdxl": "sdxl",
    "_flux": "flux",
    "_flux2_klein": "flux2_klein",
    "_sd3": "sd3",
    "_qwen_image": "qwen_image",
    "_z_image": "z_image",
}
MORE = {
    "": ["--num_validation_images", "0"],
    "_flux": ["--max_sequence_length", "64"],
    "_sd3": ["--max_sequence_length", "64"],
    "_qwen_image": ["--skip_final_inference", "--max_sequence_length", "64"],
    "_flux2_klein": [
        *("--skip_final_inference", "--max_sequence_length", "64"),
        *("--text_encoder_out_layers", "9", "18", "27"),
    ],
    "_z_image": ["--skip_final_inference", "--max_sequence_length", "64"],
}
WITH_TEXT_ENCODER = ("", "_sdxl", "_flux", "_sd3")
WEIGHTS = "pytorch_lora_weights.safetensors"


class Scripts:
    """The scripts of one revision, as they are and patched."""

    def __init__(self, arguments):
        self.work, self.python = arguments.work, arguments.python
        self.settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHVISION": arguments.torchvision or ""}
        for kind in ("plain", "patched"):
            folder = self.work / kind / EXAMPLES
            shutil.rmtree(self.work / kind, ignore_errors=True)
            folder.mkdir(parents=True)
            git = ["git", "-C", arguments.diffusers]
            tree = [*git, "ls-tree", "--name-only", f"{arguments.revision}:{EXAMPLES}"]
            for name in subprocess.run(tree, check=True, stdout=subprocess.PIPE).stdout.decode().split():
                if name.startswith("train_dreambooth_lora"):
                    show = [*git, "show", f"{arguments.revision}:{EXAMPLES}/{name}"]
                    (folder / name).write_bytes(subprocess.run(show, check=True, stdout=subprocess.PIPE).stdout)
        subprocess.run([sys.executable, str(APPLY), str(self.work / "patched"), "--yes"], check=True)
        self.pictures = self.work / "pictures"
        self.pictures.mkdir(exist_ok=True)
        generator = numpy.random.default_rng(0)
        for number in range(4):
            pixels = generator.integers(0, 255, (64, 64, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(self.pictures / f"{number}.png")

    def base(self, kind):
        folder = self.work / "bases" / kind
        if not (folder / "model_index.json").is_file():
            self._run(["tiny_pipelines.py", kind, folder], {})
        return folder

    def run(self, kind, suffix, name, flags, steps=STEPS):
        """(folder, losses as hexadecimal text, what it printed). Raises AssertionError."""
        folder, losses = self.work / "runs" / name, self.work / "runs" / f"{name}.losses"
        shutil.rmtree(folder, ignore_errors=True)
        losses.parent.mkdir(exist_ok=True)
        losses.unlink(missing_ok=True)
        script = self.work / kind / EXAMPLES / f"train_dreambooth_lora{suffix}.py"
        words = [
            "tiny_pipelines.py", "--run", script, "--pretrained_model_name_or_path", self.base(SCRIPTS[suffix]),
            "--instance_data_dir", self.pictures, "--instance_prompt", "a thing", "--output_dir", folder,
            "--resolution", 32, "--train_batch_size", 1, "--learning_rate", "1e-2", "--seed", 3, "--rank", 2,
            "--max_train_steps", steps, "--lr_warmup_steps", 0, *MORE.get(suffix, []), *flags,
        ]  # fmt: skip
        code, printed = self._run(words, {"TINY_LOSSES": str(losses)})
        (self.work / "runs" / f"{name}.log").write_text(printed)
        assert code == 0, f"{name}: exit code {code}: {printed[-600:]}"
        return folder, losses.read_text().split(), printed

    def _run(self, words, more):
        done = subprocess.run(
            [self.python, *map(str, words)], cwd=HERE, env={**os.environ, **self.settings, **more},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout.decode("utf-8", "replace")


def same(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def held(folder, checkpoint):
    """What a result holds of a checkpoint's tensors: SD3's own checkpoints leave its two text
    encoders out."""
    return {name: value for name, value in load_file(folder / WEIGHTS).items() if name in checkpoint}


def scenario(scripts, suffix, more=()):
    """Figures of one script's four runs; raises AssertionError with the fault."""
    name = f"script{suffix}{'-te' if more else ''}"
    plain, all_losses, _ = scripts.run("plain", suffix, f"{name}-plain", ["--checkpointing_steps", 1, *more])
    at = lambda step: load_file(plain / f"checkpoint-{step}" / WEIGHTS)  # noqa: E731
    off, losses, _ = scripts.run("patched", suffix, f"{name}-off", ["--checkpointing_steps", 1, *more], steps=8)
    assert losses == all_losses[:8], "the losses differ without flags"
    equal = [same(load_file(off / f"checkpoint-{step}" / WEIGHTS), at(step)) for step in range(1, 9)]
    assert all(equal) and not (off / "es-lora").exists(), "the files differ without flags"
    stopped, losses, printed = scripts.run("patched", suffix, f"{name}-stopped", [*STOP, "--average", "0", *more])
    result = json.loads((stopped / "es-lora" / "result.json").read_text())
    assert result["outcome"] == "stopped_early" and "ES-LoRA: Stopped early" in printed, result
    kept, last = result["keep_step"], result["last_step"]
    assert losses == all_losses[:last] and last < STEPS, "the losses differ, or no early stop"
    assert same(held(stopped, at(kept)), at(kept)), "the turning point differs"
    assert same(held(stopped / "last", at(last)), at(last)), "the last weights differ"
    averaged, _, _ = scripts.run("patched", suffix, f"{name}-average", [*STOP, "--average", WIDTH, *more])
    steps = [at(step) for step in range(1, kept + 1)]
    assert is_average(held(averaged, at(kept)), steps, WIDTH), "the kept file is not the average of the steps"
    measured = (stopped / "es-lora" / "cs_history.jsonl").read_text().split("\n")[1]
    return {
        "kept": kept,
        "last": last,
        "components": sorted(json.loads(measured)["cs"]),
        "tensors": len(at(kept)),
        "saved": len(load_file(stopped / WEIGHTS)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("diffusers", "work", "python"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--revision", default="HEAD")
    parser.add_argument("--torchvision")
    parser.add_argument("--only", nargs="*", help="names of scripts, or parts of them")
    arguments = parser.parse_args()
    arguments.work = Path(arguments.work).resolve()
    scripts = Scripts(arguments)
    wanted = [(suffix, ()) for suffix in SCRIPTS] + [
        (suffix, ("--train_text_encoder",)) for suffix in WITH_TEXT_ENCODER
    ]
    path, failed = arguments.work / "scripts.json", False
    results = json.loads(path.read_text()) if path.exists() else {}
    for suffix, more in wanted:
        name = f"train_dreambooth_lora{suffix}" + (" --train_text_encoder" if more else "")
        if arguments.only and not any(part in (suffix, name) for part in arguments.only):
            continue
        try:
            results[name] = scenario(scripts, suffix, more)
        except AssertionError as error:
            results[name], failed = {"failed": str(error)}, True
        print(name, json.dumps(results[name]), flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
