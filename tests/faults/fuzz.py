"""Wrong inputs, drawn by a seed: flags, files, tables, pictures, LoRAs, bases, checkpoints.

    .venv-llm/bin/python tests/faults/fuzz.py text --cases 1000
    .venv-ldm/bin/python tests/faults/fuzz.py image --cases 1000

Every case must end with 0 or with one message: no traceback, no hang, no more than 4 GB. Where
nothing of the input is left to use, the exit code must be 2 and the output folder as before. Exit
code 1 where a case does not; the table says how many of each kind were refused."""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from damage import (
    EITHER,
    NO_NUMBERS,
    REFUSED,
    bent_json,
    bent_tensors,
    copied,
    damaged,
)
from forked import ROOT, Forked
from run_kinds import digest
from tqdm import tqdm

LONGEST_SEC, MOST_GB = 90, 4
LETTERS = "abcdefghijklmnopqrstuvwxyz_"


def numeric_flags(parser):
    """The flags of a parser that take a number: by their type, or by that of their default."""
    found = []
    for action in parser._actions:
        named = action.type in (int, float)
        known = isinstance(action.default, (int, float)) and not isinstance(action.default, bool)
        if action.option_strings and action.nargs is None and action.choices is None and (named or known):
            found.append(max(action.option_strings, key=len))
    return found


def misspelt(flag, generator):
    place = generator.randrange(3, len(flag))
    return flag[:place] + generator.choice(LETTERS) + generator.choice(LETTERS) + flag[place:]


class Cases:
    """What both trees share. Each case is (program, words, what is expected, label)."""

    def __init__(self, forked, scratch):
        self.forked, self.scratch, self.out = forked, scratch, scratch / "out"
        self.kinds = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("case_")]

    def finished(self, program, words):
        """What is damaged later is accepted as it is."""
        ended = self.forked.run(program, words)
        assert ended.code == 0, ended.screen[-2000:]

    def number(self, program, words, flags, generator):
        flag, value = generator.choice(flags), generator.choice(NO_NUMBERS)
        return program, [*words, f"{flag}={value}"], REFUSED, f"{flag}={value[:20]}"

    def unknown(self, program, words, flags, generator):
        flag = misspelt(generator.choice(flags), generator)
        return program, [*words, flag, "1"], REFUSED, flag


class TextCases(Cases):
    def __init__(self, scratch):
        programs = ("es_lora_llm", "multi_lora", "generate_text", "merge_adapter", "cs_replay", "judge_checkpoints")
        super().__init__(Forked("llm", *programs), scratch)
        import es_lora_llm
        import multi_lora
        from short_runs import random_llama

        self.flags = numeric_flags(es_lora_llm.parse_arguments.__globals__["build_parser"]())
        self.job_flags = numeric_flags(multi_lora.build_parser())
        self.base, self.rows = random_llama(scratch / "base"), scratch / "rows.jsonl"
        kitchen = (ROOT / "dataset/kitchen_notes/train.jsonl").read_text().splitlines()[:6]
        self.rows.write_text("".join(line + "\n" for line in kitchen))
        self.finished("es_lora_llm", [*self.words(self.base, self.rows, 4), "--output_dir", scratch / "run"])
        self.files = sorted(path.name for path in (scratch / "run" / "checkpoint-2").iterdir() if path.is_file())
        for program, words in (self.speaking(self.adapter(), merges) for merges in (False, True)):
            self.finished(program, words)

    def words(self, base, rows, steps=1):
        return [
            *("--model_name_or_path", base, "--dataset", rows, "--bits", 32, "--lora_r", 2, "--max_steps", steps),
            *("--source_max_len", 16, "--target_max_len", 16, "--per_device_train_batch_size", 2, "--use_cpu"),
            *("--gradient_accumulation_steps", 1, "--gradient_checkpointing", "False", "--save_steps", 2),
            *("--cs_interval", 1, "--window_size", 2, "--stop_rule", "second-valley", "--report_to", "none"),
        ]

    def trained(self, base, rows):
        return [*self.words(base, rows), "--output_dir", self.out]

    def case_flag(self, generator):
        return self.number("es_lora_llm", self.trained(self.base, self.rows), self.flags, generator)

    def case_flag_unknown(self, generator):
        return self.unknown("es_lora_llm", self.trained(self.base, self.rows), self.flags, generator)

    def case_jobs_flag(self, generator):
        config = self.jobs("rank = 2\n")
        words = ["--base_model", self.base, "--config", config, "--output_dir", self.out, "--bits", 32]
        return self.number("multi_lora", words, self.job_flags, generator)

    def jobs(self, more):
        config = self.scratch / "jobs.toml"
        if config.is_dir():
            config.rmdir()
        config.write_text(
            f'[[jobs]]\nname = "a"\ndataset = "{self.rows}"\nsource_max_len = 16\ntarget_max_len = 16\n{more}'
        )
        return config

    def case_jobs_value(self, generator):
        keys = ("rank", "batch_size", "accumulation", "max_steps", "learning_rate", "window_size", "seed", "dropout")
        key, value = (
            generator.choice(keys),
            generator.choice(("nan", "inf", "-1", '"x"', "[1]", "1e999", "[[1]]", "{}")),
        )
        config = self.jobs(f"{key} = {value}\n")
        words = ["--base_model", self.base, "--config", config, "--output_dir", self.out, "--bits", 32, "--use_cpu"]
        return "multi_lora", words, REFUSED, f"{key} = {value}"

    def case_jobs_file(self, generator):
        config = self.jobs("rank = 2\nmax_steps = 1\n")
        how, expected = damaged(config, generator)
        words = ["--base_model", self.base, "--config", config, "--output_dir", self.out, "--bits", 32, "--use_cpu"]
        return "multi_lora", words, EITHER if how == "half" else expected, how

    def case_table(self, generator):
        rows = self.scratch / f"table{generator.choice(('.jsonl', '.json', '.csv', '.txt', '.parquet'))}"
        if rows.is_dir():
            rows.rmdir()
        shutil.copyfile(self.rows, rows)
        how, _ = damaged(rows, generator)
        return "es_lora_llm", self.trained(self.base, rows), EITHER, f"{how} {rows.suffix}"

    def case_table_value(self, generator):
        rows = self.scratch / "bent.jsonl"
        shutil.copyfile(self.rows, rows)
        bent_json(rows, generator)
        return "es_lora_llm", self.trained(self.base, rows), EITHER, "bent row"

    def case_base(self, generator):
        base = copied(self.base, self.scratch / "bad_base")
        name = generator.choice(("config.json", "model.safetensors", "model.safetensors", "tokenizer.json"))
        how, expected = damaged(base / name, generator)
        return "es_lora_llm", self.trained(base, self.rows), expected, f"{how} {name}"

    def case_base_value(self, generator):
        base = copied(self.base, self.scratch / "bad_base")
        bent_json(base / "config.json", generator)
        return "es_lora_llm", self.trained(base, self.rows), EITHER, "bent config.json"

    def case_checkpoint(self, generator):
        copied(self.scratch / "run", self.out)
        shutil.rmtree(self.out / "checkpoint-4")
        name = generator.choice([name for name in self.files if name not in ("README.md", "training_args.bin")])
        how, expected = damaged(self.out / "checkpoint-2" / name, generator)
        needed = not name.startswith(("tokenizer", "special", "chat", "adapter_config"))
        words = [*self.words(self.base, self.rows, 4), "--output_dir", self.out, "--resume_from_checkpoint", "true"]
        return "es_lora_llm", words, expected if needed else EITHER, f"{how} {name}"

    def case_checkpoint_tensors(self, generator):
        copied(self.scratch / "run", self.out)
        shutil.rmtree(self.out / "checkpoint-4")
        how = bent_tensors(self.out / "checkpoint-2" / "adapter_model.safetensors", generator)
        words = [*self.words(self.base, self.rows, 4), "--output_dir", self.out, "--resume_from_checkpoint", "true"]
        return "es_lora_llm", words, REFUSED, how

    def adapter(self):
        return copied(self.scratch / "run" / "adapter", self.scratch / "bad_adapter")

    def speaking(self, adapter, merges):
        if merges:
            return "merge_adapter", ["--adapter", adapter, "--base", self.base, "--output", self.out]
        words = ["--adapter", adapter, "--base", self.base, "--prompt", "Salt?", "--max_new_tokens", 1]
        return "generate_text", words

    def case_adapter(self, generator):
        adapter = self.adapter()
        name = generator.choice(("adapter_model.safetensors", "adapter_config.json"))
        how, expected = damaged(adapter / name, generator)
        return *self.speaking(adapter, generator.random() < 0.5), expected, f"{how} {name}"

    def case_adapter_tensors(self, generator):
        adapter = self.adapter()
        how = bent_tensors(adapter / "adapter_model.safetensors", generator)
        return *self.speaking(adapter, generator.random() < 0.5), REFUSED, how

    def case_history(self, generator):
        folder = copied(self.scratch / "run", self.scratch / "bad_run")
        path = folder / generator.choice(("cs_history.jsonl", "cs_history.jsonl", "result.json"))
        if generator.random() < 0.6:
            bent_json(path, generator)
            how = "bent"
        else:
            how, _ = damaged(path, generator)
        program = generator.choice(("cs_replay", "judge_checkpoints"))
        words = [folder, "--html", self.scratch / "r.html"] if program == "cs_replay" else [folder, "--base", self.base]
        return program, words, EITHER, f"{how} {path.name}"


class ImageCases(Cases):
    def __init__(self, scratch):
        programs = ("es_lora_ldm", "sample_images", "merge_lora", "extract_lora")
        super().__init__(Forked("ldm", *programs), scratch)
        from ldm_runs import make_base, make_pictures

        from settings.flags import build_parser

        self.flags = numeric_flags(build_parser())
        self.base, self.pictures = Path(make_base(scratch / "base")), Path(make_pictures(scratch / "pictures", count=3))
        more = ["--max_train_steps", 4, "--save_state", "--save_every_n_steps", 2, "--output_dir", scratch / "run"]
        self.finished("es_lora_ldm", [*self.words(self.base, self.pictures), *more])
        self.state = "lora-step00000002-state"
        self.files = sorted(path.name for path in (scratch / "run" / self.state).iterdir() if path.is_file())
        for kind in range(3):
            self.finished(*self.used(self.lora(), kind))
            shutil.rmtree(self.out, ignore_errors=True)

    def words(self, base, pictures):
        return [
            *("--pretrained_model_name_or_path", base, "--train_data_dir", pictures, "--caption_extension", ".txt"),
            *("--resolution", 32, "--cache_latents", "--output_name", "lora", "--network_dim", 2, "--seed", 1),
            *("--network_alpha", 2, "--train_batch_size", 1, "--early_stop", "True", "--cs_interval", 1),
            *("--window_size", 2, "--stop_rule", "second-valley", "--learning_rate", 1e-3),
        ]

    def trained(self, base, pictures, *more):
        return [*self.words(base, pictures), "--max_train_steps", 1, "--output_dir", self.out, *more]

    def case_flag(self, generator):
        return self.number("es_lora_ldm", self.trained(self.base, self.pictures), self.flags, generator)

    def case_flag_unknown(self, generator):
        return self.unknown("es_lora_ldm", self.trained(self.base, self.pictures), self.flags, generator)

    def case_config_value(self, generator):
        config = self.scratch / "config.toml"
        keys = ("network_dim", "learning_rate", "train_batch_size", "max_train_steps", "network_alpha", "noise_offset")
        key, value = generator.choice(keys), generator.choice(("nan", "inf", '"x"', "[1]", "1e999", "[[1]]", "{}"))
        config.write_text(f"{key} = {value}\n")
        words = [*self.words(self.base, self.pictures), "--output_dir", self.out, "--config_file", config]
        for flag in [f"--{key}"] if f"--{key}" in words else []:
            del words[words.index(flag) : words.index(flag) + 2]
        return "es_lora_ldm", words, REFUSED, f"{key} = {value}"

    def case_dataset_value(self, generator):
        config = self.scratch / "dataset.toml"
        keys = ("resolution", "batch_size", "num_repeats", "min_bucket_reso", "keep_tokens", "caption_dropout_rate")
        key, value = generator.choice(keys), generator.choice(("nan", "inf", "-3", '"x"', "1e999", "[[1]]", "{}"))
        config.write_text(
            f'[[datasets]]\n{key} = {value}\n[[datasets.subsets]]\nimage_dir = "{self.pictures}/1_cat"\n'
            'caption_extension = ".txt"\n'
        )
        words = [*self.trained(self.base, self.pictures), "--dataset_config", config]
        del words[words.index("--train_data_dir") : words.index("--train_data_dir") + 2]
        return "es_lora_ldm", words, REFUSED, f"{key} = {value}"

    def case_dataset_file(self, generator):
        config = self.scratch / "broken.toml"
        if config.is_dir():
            config.rmdir()
        config.write_text(f'[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = "{self.pictures}/1_cat"\n')
        how, expected = damaged(config, generator)
        words = [*self.trained(self.base, self.pictures), "--dataset_config", config]
        del words[words.index("--train_data_dir") : words.index("--train_data_dir") + 2]
        return "es_lora_ldm", words, EITHER if how in ("half", "noise") else expected, how

    def case_picture(self, generator):
        pictures = copied(self.pictures, self.scratch / "bad_pictures")
        path = generator.choice(sorted(next(pictures.iterdir()).iterdir()))
        how, _ = damaged(path, generator)
        return "es_lora_ldm", self.trained(self.base, pictures), EITHER, f"{how} {path.suffix}"

    def case_base(self, generator):
        base = copied(self.base, self.scratch / "bad_base")
        parts = [path for path in sorted(base.rglob("*.safetensors")) if "safety" not in str(path)]
        path = generator.choice([*parts, base / "model_index.json", base / "unet" / "config.json"])
        how, expected = damaged(path, generator)
        needed = path.name != "model_index.json"
        return (
            "es_lora_ldm",
            self.trained(base, self.pictures),
            expected if needed else EITHER,
            f"{how} {path.parent.name}",
        )

    def case_base_value(self, generator):
        base = copied(self.base, self.scratch / "bad_base")
        path = base / generator.choice(("unet", "vae", "text_encoder", "scheduler"))
        path = next(path.glob("*config.json"))
        bent_json(path, generator)
        return "es_lora_ldm", self.trained(base, self.pictures), EITHER, f"bent {path.parent.name}"

    def case_state(self, generator):
        copied(self.scratch / "run", self.out)
        path = self.out / self.state / generator.choice(self.files)
        how, expected = damaged(path, generator)
        words = [*self.words(self.base, self.pictures), "--max_train_steps", 4, "--output_dir", self.out]
        return "es_lora_ldm", [*words, "--resume", path.parent], expected, f"{how} {path.name}"

    def case_state_tensors(self, generator):
        copied(self.scratch / "run", self.out)
        how = bent_tensors(self.out / self.state / "lora.safetensors", generator)
        words = [*self.words(self.base, self.pictures), "--max_train_steps", 4, "--output_dir", self.out]
        return "es_lora_ldm", [*words, "--resume", self.out / self.state], REFUSED, how

    def used(self, lora, kind):
        if kind == 0:
            return "es_lora_ldm", self.trained(self.base, self.pictures, "--network_weights", lora)
        if kind == 1:
            words = ["--base", self.base, "--lora", lora, "--prompt", "a cat --w 32 --h 32 --s 1", "--out", self.out]
            return "sample_images", words
        target = self.scratch / "merged.safetensors"
        return "merge_lora", [
            "--sd_model",
            self.base,
            "--models",
            lora,
            "--ratios",
            1,
            "--save_to",
            target.with_suffix(""),
        ]

    def lora(self):
        lora = self.scratch / "bad.safetensors"
        if lora.is_dir():
            lora.rmdir()
        shutil.copyfile(self.scratch / "run" / "lora.safetensors", lora)
        return lora

    def case_lora(self, generator):
        lora = self.lora()
        how, expected = damaged(lora, generator)
        return *self.used(lora, generator.randrange(3)), expected, how

    def case_lora_tensors(self, generator):
        lora = self.lora()
        how = bent_tensors(lora, generator)
        return *self.used(lora, generator.randrange(3)), REFUSED, how

    def case_prompt(self, generator):
        option = generator.choice(("--w", "--h", "--s", "--d", "--l"))
        value = generator.choice(("nan", "inf", "-5", "1e999", "x", "9" * 30, "999999999"))
        if option == "--d" and value in ("999999999", "-5"):  # seeds they are
            value = "x"
        words = ["--base", self.base, "--prompt", f"a cat {option} {value}", "--out", self.out]
        return "sample_images", words, EITHER if option == "--l" else REFUSED, f"{option} {value[:12]}"


KINDS = {"text": TextCases, "image": ImageCases}


def content(folder):
    return {str(path): digest(path) for path in folder.rglob("*")} if folder.exists() else {}


def problem_of(cases, case, generator):
    """(what is wrong with how a case ended, or None; how it ended; its label)."""
    shutil.rmtree(cases.out, ignore_errors=True)
    program, words, expected, label = case(generator)
    before = content(cases.out)
    ended = cases.forked.run(program, words, longest_sec=LONGEST_SEC, most_gb=MOST_GB)
    wrong = None
    if ended.has_traceback or ended.code not in (0, 2, 3):
        wrong = f"ended with {ended.code}"
    elif expected == REFUSED and ended.code != 2:
        wrong = f"accepted, ended with {ended.code}"
    elif ended.code == 2 and content(cases.out) != before:
        wrong = "refused, and the output folder is another"
    return wrong, ended, f"{program} {label}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    scratch = Path(tempfile.mkdtemp(prefix=f"fuzz-{arguments.kind}-"))
    cases = KINDS[arguments.kind](scratch)
    counts, failed, slowest, peak = Counter(), 0, (0.0, ""), 0.0
    for number in tqdm(range(arguments.cases), desc="cases"):
        generator = random.Random(f"{arguments.seed}/{number}")
        case = cases.kinds[number % len(cases.kinds)]
        wrong, ended, label = problem_of(cases, case, generator)
        counts[case.__name__[5:], "refused" if ended.code == 2 else "accepted" if ended.code == 0 else "other"] += 1
        peak = max(peak, ended.peak_mb)
        if ended.code == 2:
            slowest = max(slowest, (ended.seconds, label))
        if wrong is not None:
            failed += 1
            told = {"case": number, "kind": case.__name__[5:], "wrong": wrong, "of": label, "said": ended.screen[-400:]}
            print(json.dumps(told), flush=True)
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind}: {counts[kind, 'refused']} refused, {counts[kind, 'accepted']} accepted")
    print(f"{arguments.cases - failed} of {arguments.cases} cases are right; slowest refusal {slowest[0]:.1f} s "
          f"({slowest[1]}), most memory {peak / 1024:.1f} GB")  # fmt: skip
    shutil.rmtree(scratch, ignore_errors=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
