"""The embedded base language model: it loads as it stands, knows English; the script that made it
does what it says."""

import importlib
import json
import math
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = Path(__file__).resolve().parents[3] / "lora-llm" / "tiny_base"
LARGEST_BYTES = 20_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE)


@pytest.fixture
def script(monkeypatch):
    """make_tiny_base.py as a module; it stands in the model's folder, beside collect_text.py."""
    monkeypatch.syspath_prepend(str(BASE))
    return importlib.import_module("make_tiny_base")


@pytest.fixture
def reader(monkeypatch):
    monkeypatch.syspath_prepend(str(BASE))
    return importlib.import_module("collect_text")


def test_loads_offline_without_a_word():
    code = (
        "import transformers; transformers.utils.logging.disable_progress_bar();"
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({str(BASE)!r});"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(BASE)!r});"
        "ids = tokenizer('And the king said', return_tensors='pt');"
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0]))"
    )
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert finished.stdout.startswith("<s>And the king said")


def test_weights_are_small_bf16_and_finite(model):
    assert sum(path.stat().st_size for path in BASE.iterdir() if path.is_file()) <= LARGEST_BYTES
    with safe_open(BASE / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a dictionary
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            assert torch.isfinite(tensor).all(), name
    assert model.dtype == torch.bfloat16
    assert 4e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 9e6
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_special_tokens_are_distinct_and_agree_with_the_model(tokenizer, model):
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    assert None not in ids and len(set(ids)) == 4
    for holder in (model.config, model.generation_config):
        assert [holder.bos_token_id, holder.eos_token_id, holder.pad_token_id] == ids[:3]
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer("word").input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    "text",
    [
        "Plain words, with punctuation: done!",
        "  leading blanks\n\n\tand tabs  ",
        "naïve café – “quoted” ½",
        "你好，世界",
        "emoji 😀👩‍🚀 and\u200bzero width",
        "12345 + 67 = 12412",
        "<b>markup</b> & {braces}",
        "",
    ],
)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_perplexity_is_below_a_tenth_of_the_unigrams(script, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)  # quicker than bf16 on most CPUs
    passages = [json.loads(line)["text"] for line in (BASE / "general_text.jsonl").read_text("utf-8").splitlines()]
    assert len(passages) == 60
    counts = json.loads((BASE / "unigram_counts.json").read_text())
    log_probabilities = torch.log((torch.tensor(counts) + 1.0) / (sum(counts) + len(counts)))
    model_loss = unigram_loss = tokens = 0
    for passage in passages:
        ids = tokenizer(passage, return_tensors="pt").input_ids[:, : script.CONTEXT_TOKENS]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        model_loss += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        unigram_loss -= log_probabilities[ids[0, 1:]].sum().item()
        tokens += ids.shape[1] - 1
    assert math.exp(model_loss / tokens) < 0.1 * math.exp(unigram_loss / tokens)


def test_committed_figures_are_of_these_weights():
    evaluation = json.loads((BASE / "figures.json").read_text("utf-8"))["evaluation"]
    assert evaluation["model_perplexity"] < 0.1 * evaluation["unigram_perplexity"]
    readme = (BASE / "README.md").read_text("utf-8")
    for figure in ("model_perplexity", "unigram_perplexity"):
        assert str(evaluation[figure]) in readme
    for source in json.loads((BASE / "sources.json").read_text("utf-8")):
        assert source["package"] in readme and source["version"] in readme and source["licence"] in readme


def test_dictionaries_kept_back_as_unseen_data_are_not_among_the_sources(reader):
    assert not {"dict-devil", "dict-bouvier"} & set(reader.SOURCES)


@pytest.mark.parametrize("layout", ["<IIH", "<III"])
def test_sword_module_is_read_in_both_layouts(reader, tmp_path, layout):
    verses = [
        'In the beginning<note>foot</note> it was.<div sID="1" type="x-p"/>',
        '<w lemma="x">Then</w> came &amp; went.',
    ]
    block, places, offset = "".join(verses).encode(), b"", 0
    for verse in verses:
        places += struct.pack(layout, 0, offset, len(verse))
        offset += len(verse)
    packed = zlib.compress(block)
    (tmp_path / "ot.bzz").write_bytes(packed)
    (tmp_path / "ot.bzs").write_bytes(struct.pack("<III", 0, len(packed), len(block)))
    (tmp_path / "ot.bzv").write_bytes(places)
    assert list(reader.sword_module(tmp_path)) == [["In the beginning it was.", "Then came & went."]]


def test_web_page_keeps_prose_and_drops_the_rest(reader, tmp_path):
    sentence = "This is a paragraph of running text that is long enough to be kept by the reader."
    page = (
        f"<html><head><title>{sentence}</title></head><body><nav><p>{sentence}</p></nav><h1>Title</h1>"
        f"<p>{sentence[:-1]} <code>indeed</code>.<a class='headerlink'>¶</a></p><pre>{sentence}</pre>"
        "<p>Too short.</p></body></html>"
    )
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "page.html").write_text(page, encoding="utf-8")
    (tmp_path / "elsewhere.html").write_text(page, encoding="utf-8")
    assert list(reader.web_pages("html")(tmp_path)) == [[sentence[:-1] + " indeed."]]


def test_r_strings_are_read(reader):
    def charsxp(text):
        return struct.pack(">Ii", 0x00040009, len(text)) + text

    vector = struct.pack(">Ii", 0x10, 2) + charsxp(b"It is a truth") + charsxp("caf\u00e9".encode())
    serialised = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8" + vector
    assert list(reader.charsxp_strings(serialised)) == ["It is a truth", "café"]


def test_a_document_is_cut_at_paragraph_ends(reader):
    paragraphs = ["a" * 4000, "b" * 4000, "c" * 10]
    assert list(reader.pieces(paragraphs)) == ["a" * 4000 + "\n\n" + "b" * 4000, "c" * 10]


def test_a_stage_out_of_order_is_one_clear_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        ["make_tiny_base.py", "train", "--device", "cpu", "--work_dir", str(tmp_path), "--out_dir", str(tmp_path)],
    )
    assert script.main() == 2
    complaint = capsys.readouterr().err
    assert "train_tokens.npy is missing: run the stages in order" in complaint
    assert len(complaint.strip().splitlines()) == 1


def test_windows_cover_an_epoch_once_and_follow_the_seed(script, monkeypatch):
    monkeypatch.setattr(script, "CONTEXT_TOKENS", 8)
    tokens = torch.arange(8 * 12 + 8)
    batches = script.shuffled_windows(tokens, 4, seed=1)
    epoch = torch.cat([next(batches) for _ in range(3)])
    assert len(epoch.unique()) == epoch.numel()  # nothing twice
    again = script.shuffled_windows(tokens, 4, seed=1)
    assert torch.equal(epoch, torch.cat([next(again) for _ in range(3)]))
    other = script.shuffled_windows(tokens, 4, seed=2)
    assert not torch.equal(epoch, torch.cat([next(other) for _ in range(3)]))


def test_unigram_loss_is_the_add_one_estimate(script, monkeypatch):
    monkeypatch.setattr(script, "CONTEXT_TOKENS", 3)
    tokens = torch.tensor([0, 1, 1, 2, 0, 1])  # scored: 1, 1, 0, 1
    probabilities = {0: 4 / 9, 1: 3 / 9}  # counts 3, 2, 1 and one each
    expected = -(3 * math.log(probabilities[1]) + math.log(probabilities[0])) / 4
    assert script.unigram_loss([3, 2, 1], tokens) == pytest.approx(expected)


def test_learning_rate_rises_then_falls_to_its_floor(script):
    factors = [script.learning_rate_factor(step / 100) for step in range(101)]
    assert factors[0] == 0 and max(factors) == pytest.approx(1.0) and factors[-1] == pytest.approx(0.02)
    assert factors.index(max(factors)) == 2
    assert all(later <= earlier for earlier, later in zip(factors[2:], factors[3:]))


def test_training_is_repeatable_and_learns(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "CONTEXT_TOKENS", 16)
    monkeypatch.setattr(
        script,
        "model_config",
        lambda: script.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
    )
    pattern = (torch.arange(64 * 16 + 16) % 40 + 4).numpy().astype("uint16")
    for side in ("train", "heldout"):
        script.np.save(tmp_path / f"{side}_tokens.npy", pattern)
    weights = []
    for attempt in ("first", "second"):
        out = tmp_path / attempt
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "make_tiny_base.py",
                "train",
                "--work_dir",
                str(tmp_path),
                "--out_dir",
                str(out),
                "--device",
                "cpu",
                "--precision",
                "fp32",
                "--no-compile",
                "--tokens",
                "5000",
                "--batch_size",
                "8",
                "--log_every",
                "20",
                "--learning_rate",
                "1e-2",
            ],
        )
        assert script.main() == 0
        weights.append((out / "model.safetensors").read_bytes())
    log = json.loads((tmp_path / "first" / "figures.json").read_text())["training"]["log"]
    assert log[-1]["validation_loss"] < 0.8 * log[0]["validation_loss"]
    assert weights[0] == weights[1]
