"""The runs that are killed: text, image and many adapters; their settings, drawn by a seed; what
they leave; and how a person would go on with them."""

import hashlib
import json
import random
import shutil
from pathlib import Path

from forked import ROOT, Forked


def digest(path):
    """Of a file's bytes; None where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else None


def drawn(generator, *choices):
    """One of each tuple of word lists."""
    return [str(word) for choice in choices for word in generator.choice(choice)]


RESULT = ("outcome", "keep_step", "detected_step", "usable_steps", "last_step", "average", "heldout")
AVERAGES = ([], ["--average", 0.1], ["--average", 0.25])
RULES = (
    ["--early_stop", "True", "--stop_rule", "second-valley", "--window_size", 3],
    ["--early_stop", "True", "--stop_rule", "gradient-agreement"],
    ["--early_stop", "True", "--stop_rule", "shadow", "--shadows", 2],
    ["--calculate_cs", "True", "--early_stop", "False", "--stop_rule", "second-valley", "--window_size", 2],
)


class Text:
    """A run of es_lora_llm.py of 24 steps over a random base of two layers."""

    program = "es_lora_llm"
    weights = tuple(f"adapter{part}/adapter_model.safetensors" for part in ("", "-last", "-turning-point"))

    def __init__(self, scratch):
        self.forked = Forked("llm", "es_lora_llm")
        from short_runs import random_llama

        self.base, self.scratch = random_llama(scratch / "base"), scratch

    def flags(self, generator):
        """The words of a run without its output folder."""
        more = drawn(
            generator,
            RULES,
            AVERAGES,
            (["--cs_interval", 1], ["--cs_interval", 2]),
            ([], ["--lora_dropout", 0.1]),
            (["--gradient_accumulation_steps", 1], ["--gradient_accumulation_steps", 2]),
            (["--save_steps", 3], ["--save_steps", 5]),
            (["--save_total_limit", 1], ["--save_total_limit", 2], []),
            ([], ["--lr_scheduler_type", "cosine"]),
            ([], ["--do_eval", "--eval_dataset_size", 4, "--eval_strategy", "epoch"]),
            (["--bits", 32], ["--bits", 32], ["--bits", 4]),
        )
        return [
            *("--model_name_or_path", self.base, "--dataset", ROOT / "dataset/kitchen_notes/train.jsonl"),
            *("--max_train_samples", 24, "--source_max_len", 24, "--target_max_len", 24, "--lora_r", 4),
            *("--learning_rate", 5e-3, "--per_device_train_batch_size", 2, "--gradient_checkpointing", "False"),
            *("--max_steps", 24, "--optim", "adamw_torch", "--report_to", "none", "--use_cpu", *more),
        ]

    def resume(self, folder):
        return ["--resume_from_checkpoint", "true"] if folder.is_dir() else []

    def anew(self, ended, folder):
        """The words to begin again with, where a killed run has left nothing to go on from."""
        return ["--overwrite_output_dir", "True"] if "no complete checkpoint" in ended.screen else None

    def facts(self, folder):
        return {**result_facts(folder), **{p: digest(folder / p) for p in self.weights}}


class Image:
    """A run of es_lora_ldm.py of 18 steps over a random base of a tenth of a million parameters."""

    program = "es_lora_ldm"
    weights = ("lora.safetensors", "lora-last.safetensors", "lora-turning-point.safetensors")

    def __init__(self, scratch):
        self.forked = Forked("ldm", "es_lora_ldm")
        from ldm_runs import make_base, make_pictures

        self.base, self.pictures = make_base(scratch / "base"), make_pictures(scratch / "pictures")
        self.prompts = scratch / "prompts.txt"
        self.prompts.write_text("a cat --w 32 --h 32 --s 2\n")

    def flags(self, generator):
        more = drawn(
            generator,
            RULES,
            AVERAGES,
            (["--cs_interval", 1], ["--cs_interval", 2]),
            ([], ["--network_dropout", 0.1]),
            ([], ["--gradient_accumulation_steps", 2]),
            (["--save_every_n_steps", 3], ["--save_every_n_steps", 5]),
            (["--save_last_n_steps", 5], []),
            ([], ["--lr_scheduler", "cosine"], ["--optimizer_type", "Lion"]),
            ([], ["--shuffle_caption", "--caption_dropout_rate", 0.2]),
            ([], ["--sample_prompts", self.prompts, "--sample_every_n_steps", 8]),
            ([], ["--save_state_on_train_end"]),
        )
        more = ["AdamW" if word == "Lion" and "shadow" in more else word for word in more]  # shadows learn by AdamW
        return [
            *("--pretrained_model_name_or_path", self.base, "--train_data_dir", self.pictures),
            *("--caption_extension", ".txt", "--resolution", 32, "--cache_latents", "--output_name", "lora"),
            *("--network_dim", 2, "--network_alpha", 2, "--learning_rate", 5e-3, "--train_batch_size", 1),
            *("--max_train_steps", 18, "--seed", 7, "--save_state", *more),
        ]

    def resume(self, folder):
        states = [p for p in folder.glob("*-state") if (p / "progress.json").is_file()]
        newest = max(states, key=lambda p: json.loads((p / "progress.json").read_text())["step"], default=None)
        return ["--resume", str(newest)] if newest is not None else []

    def anew(self, ended, folder):
        if ended.code == 2 and not self.resume(folder):
            shutil.rmtree(folder)
            return []
        return None

    def facts(self, folder):
        return {**result_facts(folder), **{name: tensors_digest(folder / name) for name in self.weights}}


class Jobs:
    """Three adapters of multi_lora.py over one base, two of them at a time."""

    program = "multi_lora"

    def __init__(self, scratch):
        self.forked = Forked("llm", "multi_lora")
        from short_runs import random_llama

        self.base, self.scratch, self.count = random_llama(scratch / "base"), scratch, 0
        rows = (ROOT / "dataset/kitchen_notes/train.jsonl").read_text().splitlines(keepends=True)[:24]
        (scratch / "rows.jsonl").write_text("".join(rows))

    def flags(self, generator):
        jobs = []
        for name in "abc":
            facts = {
                "name": f'"{name}"',
                "max_steps": generator.choice((8, 12, 16)),
                "seed": generator.randrange(9),
                "dropout": generator.choice((0.0, 0.1)),
                "stop_rule": f'"{generator.choice(("second-valley", "gradient-agreement"))}"',
                "average": generator.choice((0, 0, 0.25)),
                "early_stop": generator.choice(("true", "true", "false")),
            }
            jobs.append("[[jobs]]\n" + "".join(f"{key} = {value}\n" for key, value in facts.items()))
        self.count += 1
        config = self.scratch / f"jobs-{self.count}.toml"
        config.write_text(
            f'[defaults]\ndataset = "{self.scratch}/rows.jsonl"\nrank = 4\n'
            "batch_size = 2\naccumulation = 2\nsource_max_len = 24\ntarget_max_len = 24\nlearning_rate = 5e-3\n"
            "cs_interval = 1\nwindow_size = 3\n" + "".join(jobs)
        )
        return [
            *("--base_model", self.base, "--config", config, "--bits", 32, "--save_minutes", 0.002, "--max_jobs", 2),
            "--use_cpu",
        ]

    def resume(self, folder):
        return ["--resume", "true"] if folder.is_dir() else []

    def anew(self, ended, folder):
        return None

    def facts(self, folder):
        found = {}
        for name in "abc":
            found.update({f"{name}/{key}": value for key, value in result_facts(folder / name).items()})
            found.update({f"{name}/{part}": digest(folder / name / part) for part in Text.weights})
            found[f"{name}/report"] = (folder / name / "report.html").is_file()
        return found


KINDS = {"text": Text, "image": Image, "jobs": Jobs}


def result_facts(folder):
    result = json.loads((folder / "result.json").read_text())
    return {**{key: result.get(key) for key in RESULT}, "history": digest(folder / "cs_history.jsonl")}


def tensors_digest(path):
    """Of names and tensors; the metadata of a LoRA file holds times."""
    if not path.is_file():
        return None
    from safetensors.torch import load_file

    tensors = load_file(str(path))
    parts = [name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def left_over(folder):
    """What a finished run should have cleared away."""
    names = [str(path.relative_to(folder)) for path in Path(folder).rglob("*")]
    return sorted(n for n in names if "/." in f"/{n}" or n.startswith("cs_snapshots"))


def settings_of(kind, seed, number):
    """The words of round `number`'s run; the same for the same seed."""
    return kind.flags(random.Random(f"{seed}/{number}"))
