"""llama.cpp itself on what is written here: its tokens are ours, its logits differ by rounding."""

import llama_cpp_runner
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from small_gguf_models import KINDS, TEXT, make_adapter, make_base, run, sentencepiece_like
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from adapters.gguf_export import write_merged_gguf
from base.bases_folder import BASES_FOLDER
from base.gguf_vocabulary import SOURCE_NAME, derived_vocabulary
from base.packaged import PACKAGED_BASES

pytestmark = pytest.mark.skipif(llama_cpp_runner.interpreter() is None, reason=llama_cpp_runner.ABSENT)

# Largest difference of two next-token logits, as a share of the largest logit; about twice what was
# measured. On the small models below: F16 0.0014 (llama.cpp rounds the activations of a product to
# f16 too), Q8_0 0.029. On SmolLM2's original Q4_1 file, where activations are rounded to 8 bits:
# 0.023 (tests/benchmarks/gguf_export.md has a trained adapter).
TOLERANCE = {"f16": 3e-3, "q8_0": 6e-2}
TOLERANCE_Q4_1 = 5e-2
TEXTS = [TEXT, "in 1969  12 kg, it's\n\n  3", "漢字 é", " a", "helo hel el"]


@pytest.fixture(scope="module")
def tokenizer(random_base):
    return AutoTokenizer.from_pretrained(random_base)


def prompts_of(tokenizer):
    return [tokenizer(text)["input_ids"] for text in (TEXT, "salt", "in 1969 it rained for a week.")]


@torch.no_grad()
def next_logits(model, prompts):
    return torch.stack([model.float().eval()(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])


def share(told, expected):
    """The largest difference as a share of the largest logit."""
    return ((torch.from_numpy(told["logits"]) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_and_merged_model_compute_the_same_in_llama_cpp(tokenizer, tmp_path, kind):
    more = {"attention_bias": True} if kind == "llama" else {}
    base = make_base(kind, tokenizer, tmp_path / "base", **more)
    adapter, prompts = make_adapter(base, tmp_path / "adapter"), prompts_of(tokenizer)
    of_base, lora = tmp_path / "base.gguf", tmp_path / "lora.gguf"
    write_merged_gguf(base, AutoConfig.from_pretrained(base), derived_vocabulary(tokenizer), "f16", of_base)
    assert run("--adapter", adapter, "--lora_gguf", lora) == 0
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    expected = next_logits(model, prompts)
    told = llama_cpp_runner.ask(of_base, lora, prompts=prompts, texts=TEXTS)
    assert share(told, expected) < TOLERANCE["f16"]
    assert told["tokens"] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    for stored, tolerance in TOLERANCE.items():
        merged = tmp_path / f"{stored}.gguf"
        assert run("--adapter", adapter, "--gguf", merged, "--gguf_type", stored) == 0
        assert share(llama_cpp_runner.ask(merged, prompts=prompts), expected) < tolerance
    assert share(llama_cpp_runner.ask(of_base, prompts=prompts), expected) > 10 * TOLERANCE["f16"]  # the adapter counts


def test_a_scaled_rope_is_the_same_in_llama_cpp(tokenizer, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    prompts = [tokenizer(" ".join([TEXT] * 6))["input_ids"]]
    for name, parameters in (("llama3", rope), ("linear", {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})):
        base = make_base("llama", tokenizer, tmp_path / name, rope_parameters=parameters)
        file = tmp_path / f"{name}.gguf"
        write_merged_gguf(base, AutoConfig.from_pretrained(base), derived_vocabulary(tokenizer), "f16", file)
        expected = next_logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), prompts)
        assert share(llama_cpp_runner.ask(file, prompts=prompts), expected) < TOLERANCE["f16"]


def test_a_sentencepiece_bpe_splits_a_text_the_same_in_llama_cpp(tmp_path):
    pieces = sentencepiece_like()
    base = make_base("llama", pieces, tmp_path / "base")
    file = tmp_path / "model.gguf"
    write_merged_gguf(base, AutoConfig.from_pretrained(base), derived_vocabulary(pieces), "f16", file)
    assert llama_cpp_runner.ask(file, texts=TEXTS)["tokens"] == [pieces(text)["input_ids"] for text in TEXTS]


def test_an_adapter_over_the_original_4_bit_file_of_smollm2(tmp_path):
    """With a random adapter that moves the logits more than llama.cpp's rounding does."""
    base = BASES_FOLDER / PACKAGED_BASES["smollm2"].folder
    if not (base / SOURCE_NAME).is_file():
        pytest.skip(f"{base} is not there: it is made by the first run with --model_name_or_path smollm2")
    adapter = make_adapter(base, tmp_path / "adapter", lora_alpha=4)
    lora = tmp_path / "lora.gguf"
    assert run("--adapter", adapter, "--lora_gguf", lora) == 0
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    prompts = prompts_of(tokenizer)
    expected = next_logits(model, prompts)
    told = llama_cpp_runner.ask(base / SOURCE_NAME, lora, prompts=prompts, texts=TEXTS)
    assert share(told, expected) < TOLERANCE_Q4_1
    assert told["tokens"] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    with model.disable_adapter():
        plain = next_logits(model, prompts)
    moved = (plain - expected).abs().max() / expected.abs().max()
    assert moved > 3 * share(told, expected)
