"""Real trainings of the patched trainers on a CPU, against the same seeded trainings unpatched.

    python tests/patches/real_training.py --sd_scripts CHECKOUT --qlora CHECKOUT --musubi CHECKOUT \
        --work FOLDER --python_new PY --python_old PY --python_qlora PY [--torchvision FOLDER] \
        [--only NAME ...]

CHECKOUT: a git repository that holds the revisions; those of a scenario that is not run are not
needed. FOLDER of torchvision: where it is, if it is not installed (musubi-tuner imports it). PY:
the Python of an environment with torch 2.13.0 and
  new    transformers 4.54.1, diffusers 0.32.1, accelerate 1.6.0, lycoris_lora, schedulefree
         (sd-scripts v0.8.7 to v0.10.1)
  old    transformers 4.26.0, diffusers 0.10.2, accelerate 0.15.0, numpy 1.26.4, setuptools 80.9.0
         (sd-scripts 54500b86)
  qlora  qlora's own requirements.txt, datasets 2.14.7, pyarrow 17.0.0, numpy 1.26.4, setuptools
         80.9.0
each with what the trainer imports besides (real_training.md beside this file). Needs torch,
safetensors, numpy and Pillow itself.

Each scenario prints one line of figures; all go into FOLDER/results.json. Exit code 1 where one
fails.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from literal_average import is_average, literal_average  # noqa: E402

APPLY = HERE.parents[1] / "patches" / "apply_patches.py"
STEPS, WIDTH = 40, 0.25
STOP_FLAGS = ["--early_stop", "--stop_rule", "second-valley", "--cs_interval", "1", "--window_size", "3"]
NEWER = {  # of v0.10.1: the LoRA module and the flags of each
    "flux_train_network.py": ["networks.lora_flux", "--guidance_scale", "1", "--t5xxl_max_token_length", "32"],
    "sd3_train_network.py": ["networks.lora_sd3", "--t5xxl_max_token_length", "32", "--network_train_unet_only"],
    "lumina_train_network.py": ["networks.lora_lumina", "--network_train_unet_only"],
}
MUSUBI = {  # of v0.3.4: the LoRA module and the flags of each
    "zimage_train_network.py": ["networks.lora_zimage"],
    "qwen_image_train_network.py": ["networks.lora_qwen_image"],
    "wan_train_network.py": ["networks.lora_wan", "--task", "t2v-1.3B"],
    "flux_2_train_network.py": ["networks.lora_flux_2", "--model_version", "klein-4b"],
}
PARTS = {
    "sd-scripts": ["train_network.py", "sdxl_train_network.py", *NEWER, "library", "networks"],
    "qlora": ["qlora.py"],
    "musubi-tuner": ["src", *MUSUBI],
}
TINY = {"musubi-tuner": "tiny_musubi.py"}


# ---------------------------------------------------------------------------------- what is trained


def unpack(repository, revision, folder, upstream):
    """The files of a revision that training needs, without a work tree in the repository."""
    listed = subprocess.run(
        ["git", "-C", repository, "ls-tree", "--name-only", revision], check=True, stdout=subprocess.PIPE
    )
    parts = [name for name in PARTS[upstream] if name in listed.stdout.decode().split("\n")]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = ["git", "-C", repository, "archive", revision, "--", *parts]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as archive:
        with tarfile.open(fileobj=archive.stdout, mode="r|") as tar:
            tar.extractall(folder, filter="data")
    return folder


def make_data(folder):
    """Four noise images with captions, twenty lines of text, and tokenizers that know single
    characters."""
    images = folder / "images" / "2_thing"
    images.mkdir(parents=True, exist_ok=True)
    generator = numpy.random.default_rng(0)
    for number in range(4):
        Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=numpy.uint8)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a thing {number}")
    for name in ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"):
        letters = [chr(code) for code in range(33, 127)]
        words = letters + [letter + "</w>" for letter in letters]
        words += [f"<unused{n}>" for n in range(598 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
        write_tokenizer(
            folder / "tokenizers" / name, words, {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
        )
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in plain] + [
        chr(256 + n) for n in range(256 - len(plain))
    ]  # GPT-2's names of the bytes
    words = ["<s>", "</s>", "<pad>", "<unk>", *letters]
    words += [f"<unused{n}>" for n in range(300 - len(words))]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    model = folder / "opt"
    write_tokenizer(model, words, {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 128, **special})
    (model / "config.json").write_text(json.dumps({"model_type": "opt"}))
    lines = [json.dumps({"input": f"Question {n}: ", "output": f"answer {n * 37 % 101}"}) for n in range(20)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")


def write_tokenizer(folder, words, settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


class Trainer:
    """Runs one upstream, patched and unpatched, and reads what it leaves."""

    def __init__(self, arguments, upstream, revision, script):
        self.work, self.upstream, self.script = arguments.work, upstream, script
        is_old = revision == "54500b861dff"
        self.python = (
            arguments.python_qlora if upstream == "qlora" else arguments.python_old if is_old else arguments.python_new
        )
        repository = getattr(arguments, upstream.replace("-", "_").replace("_tuner", ""))
        self.torchvision = arguments.torchvision
        self.folders = {}
        for kind in ("plain", "patched"):
            folder = self.work / "checkouts" / f"{upstream}-{revision}-{kind}"
            self.folders[kind] = unpack(repository, revision, folder, upstream)
        subprocess.run(
            [sys.executable, str(APPLY), str(self.folders["patched"])], check=True, stdout=subprocess.DEVNULL
        )

    def run(self, kind, output, flags, steps=None):
        """(exit code, output folder, losses as hexadecimal text, what it printed)."""
        folder = self.work / "runs" / output
        if not (flags and "--resume" in flags):
            shutil.rmtree(folder, ignore_errors=True)
        losses = self.work / "runs" / f"{output}-losses.txt"
        losses.unlink(missing_ok=True)
        steps = steps or (STEPS * 3 // 4 if "sdxl" in self.script else STEPS)  # SDXL's steps take seconds
        flags_of = {"qlora": self.qlora_flags, "musubi-tuner": self.musubi_flags}
        common = flags_of.get(self.upstream, self.network_flags)(folder)
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true", "TINY_LOSSES": str(losses)}
        settings["TORCHVISION"] = self.torchvision or ""
        (self.work / "runs").mkdir(exist_ok=True)
        command = [
            self.python,
            str(HERE / TINY.get(self.upstream, "tiny_trainer.py")),
            self.script,
            *common,
            "--max_train_steps",
            str(steps),
            *flags,
        ]
        if self.upstream == "qlora":
            command[command.index("--max_train_steps")] = "--max_steps"
        done = subprocess.run(
            command, cwd=self.folders[kind], env={**os.environ, **settings, "TINY_BASE": str(self.base(output))},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        printed = done.stdout.decode("utf-8", "replace")
        (self.work / "runs" / f"{output}.log").write_text(printed)
        return done.returncode, folder, losses.read_text().split() if losses.exists() else [], printed

    def base(self, output):
        return self.work / "runs" / f"{output}-base.safetensors"

    def network_flags(self, folder):
        data = self.work / "data"
        return [
            "--pretrained_model_name_or_path", "tiny", "--tokenizer_cache_dir", str(data / "tokenizers"),
            "--train_data_dir", str(data / "images"), "--output_dir", str(folder), "--output_name", "lora",
            "--resolution", "64", "--train_batch_size", "1", "--network_alpha", "1", "--max_data_loader_n_workers", "0",
            "--cache_latents", "--learning_rate", "1e-2", "--seed", "3", "--caption_extension", ".txt",
            "--save_model_as", "safetensors",
        ]  # fmt: skip

    def musubi_flags(self, folder):
        config = self.work / "data" / f"{self.script}.toml"
        caches = self.work / "data" / f"{self.script}-caches"
        config.write_text(
            f'[general]\nresolution = [64, 64]\nbatch_size = 1\n[[datasets]]\nimage_directory = "{caches}"\n'
            f'cache_directory = "{caches}"\ncaption_extension = ".txt"\n'
        )
        return [
            "--dit", "tiny", "--dataset_config", str(config), "--output_dir", str(folder), "--output_name", "lora",
            "--sdpa", "--mixed_precision", "no", "--network_alpha", "1", "--max_data_loader_n_workers", "0",
            "--learning_rate", "1e-2", "--seed", "3", "--timestep_sampling", "uniform",
        ]  # fmt: skip

    def qlora_flags(self, folder):
        data = self.work / "data"
        return [
            "--model_name_or_path", str(data / "opt"), "--dataset", str(data / "text.jsonl"), "--dataset_format",
            "input-output", "--output_dir", str(folder), "--bits", "32", "--optim", "adamw_torch",
            "--gradient_checkpointing", "False", "--lora_r", "4", "--learning_rate", "1e-2", "--source_max_len", "32",
            "--target_max_len", "32", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
            "--seed", "3", "--logging_steps", "1", "--save_steps", "1", "--save_total_limit", "100",
        ]  # fmt: skip

    def saved(self, folder, step=None, kind=""):
        """{name: tensor} of a step's file, or of the result ("" or "-last")."""
        if self.upstream == "qlora":
            place = "turning-point" if step is None else f"checkpoint-{step}"
            return torch.load(folder / place / "adapter_model" / "adapter_model.bin", weights_only=True)
        return load_file(folder / (f"lora-step{step:08d}.safetensors" if step else f"lora{kind}.safetensors"))

    def history_folder(self, folder):
        return folder if self.upstream == "qlora" else folder / "lora-es-lora"


# --------------------------------------------------------------------------------- what is compared


def same(first, second):
    """Whether two sets of tensors agree in names, dtypes, shapes and bits."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def update_of(parts):
    """The update D (out, in) in float64, up to a positive factor, of one module's saved tensors;
    None where it is none."""
    tensors = {name: value.double() for name, value in parts.items()}
    if "lora_up.weight" in tensors:
        return tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1)
    if "hada_w1_a" in tensors:
        first = tensors["hada_w1_a"] @ tensors["hada_w1_b"]
        return first * (tensors["hada_w2_a"] @ tensors["hada_w2_b"])
    return None


def cosine(weight, update, reduction):
    weight = weight.double().flatten(1)
    if reduction == "row":
        norms = weight.norm(dim=1) * update.norm(dim=1)
        return torch.where(norms > 0, (weight * update).sum(1) / norms.clamp_min(1e-300), 0.0).mean().item()
    norm = (weight.norm() * update.norm()).item()
    return (weight * update).sum().item() / norm if norm else 0.0


def cs_of_file(tensors, base, reduction):
    """{component: CS} from a saved LoRA and the frozen weights, formed in full, in float64."""
    values = {}
    if any(".lora_A." in name for name in tensors):
        for name, down in tensors.items():
            if ".lora_A." in name:
                up = tensors[name.replace(".lora_A.", ".lora_B.")]
                weight = base["lm." + name.replace("base_model.model.", "").replace(".lora_A", "")]
                values.setdefault("lm", []).append(cosine(weight, up.double() @ down.double(), reduction))
    else:
        modules = {}
        for name, tensor in tensors.items():
            modules.setdefault(name.split(".")[0], {})[name.split(".", 1)[1]] = tensor
        flat = {"lora_" + key[: -len(".weight")].replace(".", "_"): key for key in base if key.endswith(".weight")}
        for module, parts in modules.items():
            key = flat.get(module) or flat[module.replace("lora_te1_", "lora_te_")]
            values.setdefault(key.split(".")[0], []).append(cosine(base[key], update_of(parts), reduction))
    means = {component: sum(found) / len(found) for component, found in values.items()}
    means["all"] = sum(sum(found) for found in values.values()) / sum(len(found) for found in values.values())
    return means


def compare(trainer, plain, stopped, base, offset=0, end_of=None):
    """Figures of a stopped run against the unpatched one whose every step was saved: raises
    AssertionError with the fault.

    plain(step): the unpatched run's folder. offset: the step at which a resumed run began to count
    anew. end_of(step): the folder of an unpatched run that was told to end there, where a file
    saved at a step is not what it would end with.
    """
    result = json.loads((trainer.history_folder(stopped) / "result.json").read_text())
    assert result["outcome"] == "stopped_early", result
    kept, last = result["keep_step"], result["last_step"]
    assert same(trainer.saved(stopped), trainer.saved(plain(kept), kept - offset * (kept > offset))), (
        "the turning point differs"
    )
    if trainer.upstream != "qlora":
        last_saved = trainer.saved(end_of(last)) if end_of else trainer.saved(plain(last), last - offset)
        assert same(trainer.saved(stopped, kind="-last"), last_saved), "the last weights differ"
        with safe_open(stopped / "lora.safetensors", "pt") as handle:
            metadata = handle.metadata()
        assert metadata["ss_steps"] == str(kept) and metadata["es_lora_step"] == str(kept), metadata
    worst, records = cs_differences(trainer, plain, stopped, base, offset)
    if end_of is None:  # the files of a schedule-free optimizer hold averaged weights; CS is of the training weights
        assert worst < 1e-6, f"CS differs by {worst}"
    epoch = int(metadata["ss_epoch"]) if trainer.upstream != "qlora" else None
    return {"kept": kept, "last": last, "epoch": epoch, "measurements": records, "largest CS difference": worst}


def cs_differences(trainer, plain, stopped, base, offset):
    """(largest difference of the logged CS from that of the unpatched run's files, number of
    measurements)."""
    lines = [json.loads(line) for line in open(trainer.history_folder(stopped) / "cs_history.jsonl")]
    records, worst = [line for line in lines[1:] if "event" not in line], 0.0
    for record in records:
        tensors = trainer.saved(plain(record["step"]), record["step"] - offset * (record["step"] > offset))
        truth = cs_of_file(tensors, base, lines[0]["reduction"])
        assert truth.keys() == record["cs"].keys(), (truth, record)
        worst = max([worst, *(abs(truth[name] - record["cs"][name]) for name in truth)])
    return worst, len(records)


# ---------------------------------------------------------------------------------------- scenarios

LORA = ["--network_module", "networks.lora", "--network_dim", "2", "--optimizer_type", "AdamW"]
LYCORIS = ["--network_module", "lycoris.kohya", "--network_dim", "2", "--optimizer_type", "AdamW"]
NETWORKS = {
    "": LORA,
    " LoCon (conv_dim)": [*LORA, "--network_args", "conv_dim=2", "conv_alpha=1"],
    " rank 1": ["--network_module", "networks.lora", "--network_dim", "1", "--optimizer_type", "AdamW"],
    " U-Net only": [*LORA, "--network_train_unet_only"],
    " text encoder only": [*LORA, "--network_train_text_encoder_only"],
    " accumulation 2": [*LORA, "--gradient_accumulation_steps", "2"],
    " LyCORIS locon": [*LYCORIS, "--network_args", "algo=locon", "conv_dim=2"],
    " LyCORIS loha": [*LYCORIS, "--network_args", "algo=loha"],
    " schedule-free": [
        "--network_module",
        "networks.lora",
        "--network_dim",
        "2",
        "--optimizer_type",
        "AdamWScheduleFree",
    ],
}


def scenario(trainer, name, network, with_off_run=True):
    """The three runs: unpatched, patched without flags, patched with --early_stop."""
    short = name.replace(" ", "-")
    each_step = ["--save_every_n_steps", "1"] if trainer.upstream != "qlora" else []
    code, plain, plain_losses, _ = trainer.run("plain", f"{short}-plain", [*network, *each_step])
    assert code == 0, "the unpatched run failed"
    figures = {}
    if with_off_run:
        code, off, off_losses, _ = trainer.run("patched", f"{short}-off", [*network, *each_step], steps=8)
        equal = [same(trainer.saved(off, step), trainer.saved(plain, step)) for step in range(1, 9)]
        assert code == 0 and all(equal), f"patched without flags: code {code}, equal files {equal}"
        assert off_losses == plain_losses[: len(off_losses)] and len(off_losses) == 8 * (
            2 if "accumulation" in name else 1
        )
        figures["off: equal losses"], figures["off: equal files"] = len(off_losses), len(equal)
    code, stopped, losses, printed = trainer.run("patched", f"{short}-stopped", [*network, *STOP_FLAGS])
    assert code == 0, f"exit code {code}"
    assert "ES-LoRA: on." in printed
    assert losses == plain_losses[: len(losses)] and len(losses) < len(plain_losses), (
        "the losses differ, or no early stop"
    )
    # A schedule-free optimizer rounds when it swaps weights to save; how often it has done so
    # differs at the end.
    shorter = lambda step: trainer.run("plain", f"{short}-end", [*network, *each_step], steps=step)[1]  # noqa: E731
    end_of = shorter if "schedule-free" in name else None
    base = load_file(trainer.base(f"{short}-stopped"))
    figures.update(compare(trainer, lambda step: plain, stopped, base, end_of=end_of))
    return figures


def averaged(trainer, name):
    """The patched run with --average keeps the average of the unpatched run's own files."""
    short = name.replace(" ", "-")
    network = LORA if trainer.upstream != "qlora" else []
    each_step = ["--save_every_n_steps", "1"] if trainer.upstream != "qlora" else []
    code, plain, plain_losses, _ = trainer.run("plain", f"{short}-plain", [*network, *each_step])
    assert code == 0, "the unpatched run failed"
    flags = [*network, *STOP_FLAGS, "--average", str(WIDTH)]
    code, stopped, losses, _ = trainer.run("patched", f"{short}-stopped", flags)
    assert code == 0 and losses == plain_losses[: len(losses)], f"exit code {code}, or the losses differ"
    result = json.loads((trainer.history_folder(stopped) / "result.json").read_text())
    kept, last = result["keep_step"], result["last_step"]
    assert result["outcome"] == "stopped_early" and result["files"]["kept"]["averaged"], result
    steps = [trainer.saved(plain, step) for step in range(1, last + 1)]
    assert is_average(trainer.saved(stopped), steps[:kept], WIDTH), "the kept file is not the average of the steps"
    if trainer.upstream != "qlora":
        assert same(trainer.saved(stopped, kind="-last"), steps[-1]), "the last weights differ"
    expected = literal_average(steps[:kept], WIDTH)
    worst = max((trainer.saved(stopped)[key].double() - value).abs().max().item() for key, value in expected.items())
    return {"kept": kept, "last": last, "largest difference from the average of the files": worst}


def resumed(trainer, name):
    """Eight steps with a saved state, then --resume until it stops; the same unpatched."""
    short, folders = name.replace(" ", "-"), {}
    for kind, flags in (("plain", []), ("patched", STOP_FLAGS)):
        steps = ["--save_every_n_steps", "1"] if kind == "plain" else []
        first = [*LORA, *flags, *steps, "--save_state"]
        code, folders[kind], _, _ = trainer.run(kind, f"{short}-{kind}", first, steps=8)
        assert code == 0, f"first half, {kind}: exit code {code}"
        state = folders[kind] / "lora-state"
        shutil.move(str(folders[kind]), str(folders[kind]) + "-first")
        folders[kind + " first"] = Path(str(folders[kind]) + "-first")
        again = [*LORA, *flags, *steps, "--resume", str(folders[kind + " first"] / state.name)]
        code, folders[kind], _, _ = trainer.run(kind, f"{short}-{kind}", again)
        assert code == 0, f"second half, {kind}: exit code {code}"
    plain = lambda step: folders["plain first"] if step <= 8 else folders["plain"]  # noqa: E731
    return compare(trainer, plain, folders["patched"], load_file(trainer.base(f"{short}-patched")), offset=8)


def scenarios(arguments):
    """{name: function that gives figures}."""
    found = {}
    for revision in ("54500b861dff", "v0.8.7", "v0.9.1", "v0.10.1"):
        trainers = {"train_network": "train_network.py", "sdxl_train_network": "sdxl_train_network.py"}
        for title, script in trainers.items():
            if title == "train_network" or revision != "54500b861dff":
                found[f"{revision} {title}"] = lambda n, r=revision, s=script: scenario(
                    Trainer(arguments, "sd-scripts", r, s), n, LORA
                )
    for script, (module, *flags) in NEWER.items():
        network = ["--network_module", module, "--network_dim", "2", "--optimizer_type", "AdamW", *flags]
        found[f"v0.10.1 {script[:-3]}"] = lambda n, s=script, w=network: scenario(
            Trainer(arguments, "sd-scripts", "v0.10.1", s), n, w
        )
    for script, (module, *flags) in MUSUBI.items():
        network = ["--network_module", module, "--network_dim", "2", "--optimizer_type", "AdamW", *flags]
        found[f"v0.3.4 {script[:-3]}"] = lambda n, s=script, w=network: scenario(
            Trainer(arguments, "musubi-tuner", "v0.3.4", s), n, w
        )
    for title, network in NETWORKS.items():
        if title:
            found[f"v0.10.1{title}"] = lambda n, w=network: scenario(
                Trainer(arguments, "sd-scripts", "v0.10.1", "train_network.py"), n, w, with_off_run=False
            )
    for revision in ("54500b861dff", "v0.10.1"):
        found[f"{revision} resume"] = lambda n, r=revision: resumed(
            Trainer(arguments, "sd-scripts", r, "train_network.py"), n
        )
    found["v0.10.1 average"] = lambda n: averaged(Trainer(arguments, "sd-scripts", "v0.10.1", "train_network.py"), n)
    found["qlora average"] = lambda n: averaged(Trainer(arguments, "qlora", "7f4e95a68dc0", "qlora.py"), n)
    found["qlora"] = lambda n: scenario(Trainer(arguments, "qlora", "7f4e95a68dc0", "qlora.py"), n, [])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("sd_scripts", "qlora", "musubi", "work", "python_new", "python_old", "python_qlora"):
        parser.add_argument(f"--{name}", required=name == "work")
    parser.add_argument("--torchvision")
    parser.add_argument("--only", nargs="*", help="names of scenarios, or parts of them")
    arguments = parser.parse_args()
    arguments.work = Path(arguments.work).resolve()
    make_data(arguments.work / "data")
    path, failed = arguments.work / "results.json", 0
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, function in scenarios(arguments).items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        try:
            results[name] = function(name)
        except AssertionError as error:
            results[name], failed = {"failed": str(error)[:500]}, 1
        print(f"{name}: {results[name]}", flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
