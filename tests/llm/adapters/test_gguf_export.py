"""GGUF files and Modelfiles, read back with gguf and with transformers, against PEFT's weights."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from small_gguf_models import KINDS, LINEAR, TEXT, make_adapter, make_base, run, sentencepiece_like
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from adapters.gguf_export import TYPES, layout_of, permute_rows, rope_factors
from adapters.modelfile import go_template, modelfile, turns_of_template
from base.gguf_files import load_gguf, load_gguf_tokenizer
from base.gguf_vocabulary import (
    PRE_TOKENIZERS,
    SOURCE_NAME,
    copied_vocabulary,
    derived_vocabulary,
    fitted_vocabulary,
    pre_tokenizer_name,
    set_pre_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer(random_base):
    return AutoTokenizer.from_pretrained(random_base)


@pytest.fixture(scope="module")
def bases(tokenizer, tmp_path_factory):
    return {kind: make_base(kind, tokenizer, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory):
    return {kind: make_adapter(base, tmp_path_factory.mktemp("lora")) for kind, base in bases.items()}


@torch.no_grad()
def logits_of(model, tokenizer):
    return model.float().eval()(**tokenizer(TEXT, return_tensors="pt")).logits


# ---------------------------------------------------------------------------- the merged model


def rounded(folder, stored):
    """The model of a folder with its matrices rounded as the type rounds them, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kind = TYPES[stored][0]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.from_numpy(dequantize(quantize(parameter.numpy(), kind), kind)))
    return model


@pytest.mark.parametrize(("kind", "stored"), [(kind, "f16") for kind in KINDS] + [("llama", "q8_0")])
def test_a_merged_gguf_is_the_merged_model_rounded_to_its_type(bases, adapters, tokenizer, tmp_path, kind, stored):
    """Read by transformers' own GGUF loader."""
    file, merged = tmp_path / "model.gguf", tmp_path / "merged"
    words = ("--adapter", adapters[kind], "--gguf", file, "--gguf_type", stored)
    assert run(*words, "--output", merged) == 0
    got = logits_of(load_gguf(file, torch.float32), load_gguf_tokenizer(file))
    torch.testing.assert_close(got, logits_of(rounded(merged, stored), tokenizer), rtol=0, atol=1e-5)
    apart = AutoPeftModelForCausalLM.from_pretrained(adapters[kind], dtype=torch.float32)
    expected = logits_of(apart, tokenizer)
    with apart.disable_adapter():
        moved = (logits_of(apart, tokenizer) - expected).abs().max()
    assert (got - expected).abs().max() < moved / 10
    file.unlink()
    assert run(*words) == 0 and {path.name for path in tmp_path.iterdir()} == {"model.gguf", "merged"}  # no scratch


def test_matrices_are_of_the_type_asked_for_and_vectors_in_float32(bases, adapters, tmp_path):
    file = tmp_path / "model.gguf"
    assert run("--adapter", adapters["llama"], "--gguf", file, "--gguf_type", "q8_0", "--output", tmp_path / "m") == 0
    reader = GGUFReader(str(file))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down.weight"] == "Q8_0" and "output.weight" not in kinds
    assert kinds["output_norm.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for key, name in {
        "block_count": "num_hidden_layers",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "context_length": "max_position_embeddings",
    }.items():
        assert reader.get_field(f"llama.{key}").contents() == pytest.approx(config[name])


def test_biases_of_q_and_k_are_permuted_as_their_rows_are(tokenizer, tmp_path):
    """The GGUF loader of transformers leaves the biases of a Llama out: they are read by gguf."""
    base = make_base("llama", tokenizer, tmp_path / "base", attention_bias=True)
    adapter = make_adapter(base, tmp_path / "adapter")
    assert run("--adapter", adapter, "--gguf", tmp_path / "model.gguf") == 0
    written = tensors_of(tmp_path / "model.gguf")
    stored = load_file(str(base / "model.safetensors"))
    for name, short, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        bias = stored[f"model.layers.1.self_attn.{name}.bias"]
        assert torch.equal(written[f"blk.1.{short}.bias"].reshape(heads, -1, 2).transpose(1, 2).reshape(-1), bias)


def test_rope_factors_of_llama_3_are_those_of_transformers(tokenizer, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, max_position_embeddings=512, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** -(torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(plain / rope_factors(config), scaled, rtol=1e-5, atol=0)
    base = make_base("llama", tokenizer, tmp_path / "base", rope_parameters=rope)
    adapter = make_adapter(base, tmp_path / "adapter")
    assert run("--adapter", adapter, "--gguf", tmp_path / "model.gguf") == 0
    assert "rope_freqs.weight" in {tensor.name for tensor in GGUFReader(str(tmp_path / "model.gguf")).tensors}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "gemma2"}, "type gemma2 cannot be written as GGUF here; those that can: llama, mistral"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type yarn cannot be written"),
        ({"hidden_act": "gelu"}, "hidden_act gelu cannot be written"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(changed, said):
    config = {**vars(LlamaConfig()), "model_type": "llama", **changed}
    with pytest.raises(ValueError, match=said):
        layout_of(SimpleNamespace(**config))


# -------------------------------------------------------------------------- the adapter alone


def tensors_of(file):
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(str(file)).tensors}


def test_a_lora_gguf_holds_pefts_matrices_with_rows_of_q_and_k_permuted(adapters, tmp_path):
    file = tmp_path / "lora.gguf"
    assert run("--adapter", adapters["llama"], "--lora_gguf", file) == 0
    written, peft = tensors_of(file), load_file(str(adapters["llama"] / "adapter_model.safetensors"))
    assert len(written) == len(peft) == 2 * 2 * len(LINEAR)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"}
    heads = {"attn_q": 4, "attn_k": 2}
    for name, short in names.items():
        a, b = (peft[f"base_model.model.model.layers.1.{name}.lora_{letter}.weight"] for letter in "AB")
        back = written[f"blk.1.{short}.weight.lora_b"]
        if short in heads:
            assert not torch.equal(back, b)
            back = back.reshape(heads[short], -1, 2, b.shape[1]).transpose(1, 2).reshape(b.shape)
        assert torch.equal(written[f"blk.1.{short}.weight.lora_a"], a) and torch.equal(back, b)
    fields = GGUFReader(str(file))
    keys = ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
    assert [fields.get_field(key).contents() for key in keys] == ["adapter", "llama", "lora", 8.0]


def test_llama_cpps_scale_gives_pefts_update_for_every_kind_of_scale(bases, adapters, tmp_path):
    """llama.cpp: alpha / rank, for all layers the same alpha."""
    base = bases["qwen3"]
    other = make_adapter(base, tmp_path / "a", 2, r=2, lora_alpha=3, alpha_pattern={"v_proj": 7})
    root = make_adapter(base, tmp_path / "b", 3, use_rslora=True)
    file = tmp_path / "lora.gguf"
    assert run("--adapter", f"{adapters['qwen3']}:0.7", f"{other}:-0.5", root, "--lora_gguf", file) == 0
    written = tensors_of(file)
    alpha = GGUFReader(str(file)).get_field("adapter.lora.alpha").contents()
    for name, short, alpha_of_other in (("v_proj", "attn_v", 7), ("o_proj", "attn_output", 3)):
        expected = 0
        parts = ((adapters["qwen3"], 0.7 * 8 / 4), (other, -0.5 * alpha_of_other / 2), (root, 8 / 2))
        for folder, scale in parts:
            tensors = load_file(str(folder / "adapter_model.safetensors"))
            key = f"base_model.model.model.layers.0.self_attn.{name}.lora_{{}}.weight"
            expected = expected + scale * tensors[key.format("B")] @ tensors[key.format("A")]
        a, b = (written[f"blk.0.{short}.weight.lora_{letter}"] for letter in "ab")
        torch.testing.assert_close(alpha / a.shape[0] * b @ a, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"use_dora": True}, "use_dora, which llama.cpp has no LoRA for; write the merged model by --gguf"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "trained biases"),
        ({"targets": ["embed_tokens"]}, "no LoRA of a linear layer"),
        ({"targets": ["lm_head"]}, "lm_head is the embeddings here"),
    ],
    ids=str,
)
def test_what_is_more_than_a_lora_is_refused_alone_with_the_fix(bases, tmp_path, capsys, more, said):
    adapter = make_adapter(bases["llama"], tmp_path / "adapter", **more)
    assert run("--adapter", adapter, "--lora_gguf", tmp_path / "lora.gguf") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "lora.gguf").exists()


# ------------------------------------------------------------------------------- the tokenizer


def entries_of(entries):
    return {entry.key.removeprefix("tokenizer.ggml."): entry.value for entry in entries}


def test_a_byte_level_tokenizer_is_described_and_read_back(adapters, tokenizer, tmp_path):
    described = entries_of(derived_vocabulary(tokenizer))
    assert (described["model"], described["pre"], described["add_bos_token"]) == ("gpt2", "smollm", True)
    assert described["tokens"][tokenizer.eos_token_id] == tokenizer.eos_token
    assert run("--adapter", adapters["llama"], "--gguf", tmp_path / "model.gguf") == 0
    again = load_gguf_tokenizer(tmp_path / "model.gguf")
    for text in (TEXT, "in 1969  12 kg, it's\n\n  3", "漢字 é"):
        assert (
            again(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        )


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_name_of_llama_cpp_is_found_again(name):
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    set_pre_tokenizer(backend, name)
    assert pre_tokenizer_name(json.loads(backend.to_str())) == name


def test_an_unknown_way_to_split_words_is_refused_with_the_fix(bases, adapters, tokenizer, tmp_path, capsys):
    base = make_base("llama", tokenizer, tmp_path / "base")
    described = json.loads((base / "tokenizer.json").read_text())
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}
    (base / "tokenizer.json").write_text(json.dumps(described))
    words = ("--adapter", adapters["llama"], "--base", base)
    assert run(*words, "--gguf", tmp_path / "x.gguf") == 2
    said = capsys.readouterr().err
    assert "how this tokenizer splits words is not known; give a GGUF file of the same base by --gguf_vocab" in said
    assert run(*words, "--lora_gguf", tmp_path / "lora.gguf") == 0  # needs no tokenizer
    assert run("--adapter", adapters["llama"], "--gguf", tmp_path / "other.gguf") == 0
    assert run(*words, "--gguf", tmp_path / "x.gguf", "--gguf_vocab", tmp_path / "other.gguf") == 0


def test_the_gguf_that_a_base_was_made_of_describes_its_tokenizer(bases, adapters, tokenizer, tmp_path):
    base = make_base("llama", tokenizer, tmp_path / "base")
    writer = GGUFWriter(str(base / SOURCE_NAME), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("of-another-world")
    writer.add_token_list([f"t{number}" for number in range(len(tokenizer) - 2)])
    writer.add_token_types([1] * (len(tokenizer) - 2))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    file = tmp_path / "model.gguf"
    assert run("--adapter", adapters["llama"], "--base", base, "--gguf", file) == 0
    copied = entries_of(copied_vocabulary(file))
    assert copied["pre"] == "of-another-world" and copied["tokens"][0] == "t0"
    assert len(copied["tokens"]) == len(copied["token_type"]) == len(tokenizer)  # filled up to the embeddings


def test_a_sentencepiece_bpe_is_described_by_scores():
    described = entries_of(derived_vocabulary(sentencepiece_like()))
    scores = dict(zip(described["tokens"], described["scores"]))
    assert described["model"] == "llama" and described["add_space_prefix"] is True
    assert scores["▁h"] > scores["el"] > scores["▁hel"] > scores["h"]
    kinds = dict(zip(described["tokens"], described["token_type"]))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x41>"], kinds["el"]) == (2, 3, 6, 1)


def test_more_tokens_than_embeddings_are_refused(tokenizer):
    with pytest.raises(ValueError, match="tokens and the model 10 embeddings"):
        fitted_vocabulary(derived_vocabulary(tokenizer), 10, tokenizer)


# ------------------------------------------------------------------------------- the Modelfile

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>",
        "<|im_end|>",
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
        "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
    ),
}


def with_template(name):
    template, bos, eos = TEMPLATES[name]
    special = list(dict.fromkeys([bos, eos, *re.findall(r"<\|\w+\|>", template)]))
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(special)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def run_go_template(template, messages):
    """The few actions that are written here, as Go's text/template runs them."""
    opening, _, body = template.partition("{{ range .Messages }}")
    written = opening
    for message in messages:
        text, branches = body.removesuffix("{{ end }}"), {}
        for role, branch in re.findall(
            r'\{\{ (?:else )?if eq .Role "(\w+)" \}\}(.*?)(?=\{\{ (?:else|end))', text, re.S
        ):
            branches[role] = branch
        written += branches[message["role"]].replace("{{ .Content }}", message["content"])
    return written


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [False, True])
def test_the_go_template_writes_what_the_chat_template_writes(name, system):
    tokenizer = with_template(name)
    turns = turns_of_template(tokenizer)
    messages = [{"role": ("user", "assistant")[n % 2], "content": f"text {n}"} for n in range(5)]
    if system and turns.system is None:
        return  # Mistral's refuses one
    given = [{"role": "system", "content": "Be brief."}] * system + messages
    default = [{"role": "system", "content": turns.default_system}] if turns.default_system and not system else []
    expected = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
    assert run_go_template(go_template(turns), default + given) == expected


def test_a_template_with_other_rules_is_refused():
    tokenizer = with_template("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] | upper")
    with pytest.raises(ValueError, match="leaves out what a turn says"):
        turns_of_template(tokenizer)
    tokenizer.chat_template = TEMPLATES["chatml"][0].replace("{{ m['content'] }}", "{{ loop.index }}{{ m['content'] }}")
    with pytest.raises(ValueError, match="chat template"):
        turns_of_template(tokenizer)


def parsed(text):
    """[(instruction, argument)] by Ollama's documented syntax: an instruction and its arguments a
    line, # for comments, three quotes around what has several lines."""
    instructions, rest = [], text
    while rest.strip():
        line, _, after = rest.partition("\n")
        if not line.strip() or line.startswith("#"):
            rest = after
            continue
        word, _, argument = rest.partition(" ")
        assert word in ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE"), word
        if argument.startswith('"""'):
            value, closed, rest = argument[3:].partition('"""')
            assert closed and rest.startswith("\n")
        else:
            value, _, rest = argument.partition("\n")
        instructions.append((word, value))
    return instructions


PARAMETERS = {"stop", "num_ctx", "temperature", "repeat_penalty"}  # of those that the documentation lists


@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_a_modelfile_has_the_documented_instructions(prompt):
    tokenizer = with_template("llama3")
    text = modelfile(
        tokenizer, prompt, source="./b.gguf", adapter="./a b.gguf", adds_bos=True, context=256, licence="free\n\nof all"
    )
    read = parsed(text)
    words = [word for word, _ in read]
    assert words[0] == "FROM" and words.count("FROM") == words.count("ADAPTER") == words.count("TEMPLATE") == 1
    values = dict(read)
    assert values["ADAPTER"] == '"./a b.gguf"' and values["LICENSE"] == "free\n\nof all"
    assert not values["TEMPLATE"].startswith("<|begin_of_text|>")  # llama.cpp writes it
    parameters = [value.split(" ", 1) for word, value in read if word == "PARAMETER"]
    assert {name for name, _ in parameters} == PARAMETERS
    stops = [value for name, value in parameters if name == "stop"]
    assert stops[0] == '"<|eot_id|>"' and (len(stops) == 3) == (prompt == "chat")
    assert ["num_ctx", "256"] in parameters
    if prompt == "plain":
        assert values["TEMPLATE"] == "{{ .Prompt }}"


def test_modelfiles_name_the_merged_model_or_the_adapter_over_the_bases_gguf(bases, adapters, tmp_path, capsys):
    words = ("--adapter", adapters["llama"])
    merged = (*words, "--gguf", tmp_path / "m.gguf", "--modelfile", tmp_path / "of-merged")
    assert run(*merged) == 0 and "ollama create NAME -f" in capsys.readouterr().out
    read = dict(parsed((tmp_path / "of-merged").read_text()))
    assert read["FROM"] == "./m.gguf" and "ADAPTER" not in read and read["TEMPLATE"] == "{{ .Prompt }}"
    alone = (*words, "--lora_gguf", tmp_path / "l.gguf", "--modelfile", tmp_path / "of-adapter")
    assert run(*alone) == 2 and "--modelfile_from" in capsys.readouterr().err
    assert not (tmp_path / "l.gguf").exists()
    assert run(*alone, "--modelfile_from", "smollm2:135m") == 0
    read = dict(parsed((tmp_path / "of-adapter").read_text()))
    assert (read["FROM"], read["ADAPTER"]) == ("smollm2:135m", "./l.gguf")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give --output FOLDER, --gguf FILE or --lora_gguf FILE"),
        (("--output", "{new}", "--modelfile", "{new}2"), "--modelfile needs --gguf or --lora_gguf"),
        (("--gguf", "{taken}"), "exists; choose another name"),
        (("--gguf", "{new}", "--gguf_vocab", "{new}3"), "there is no such file"),
        (("--gguf", "{new}", "--gguf_vocab", "{taken}"), "is no readable GGUF file"),
    ],
)
def test_bad_requests_are_one_message(adapters, tmp_path, capsys, words, said):
    (tmp_path / "taken").write_text("mine")
    words = [word.format(new=tmp_path / "new", taken=tmp_path / "taken") for word in words]
    assert run("--adapter", adapters["llama"], *words) == 2
    assert said in capsys.readouterr().err and (tmp_path / "taken").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_permuted_rows_turn_halves_into_neighbours():
    rows = torch.arange(8.0)
    assert permute_rows(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(("bits", "expected"), [(16, "float16"), (32, "float32")])
def test_a_bf16_base_is_not_rounded_twice(tokenizer, tmp_path, bits, expected, capsys):
    base = make_base("llama", tokenizer, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter")
    assert run("--adapter", adapter, "--bits", bits, "--gguf", tmp_path / "model.gguf") == 0
    assert f"written as torch.{expected}" in capsys.readouterr().out
    assert run("--adapter", adapter, "--bits", bits, "--gguf", tmp_path / "m", "--output", tmp_path / "merged") == 0
    assert "written as torch.bfloat16" in capsys.readouterr().out
