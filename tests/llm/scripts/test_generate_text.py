"""Asking adapters: prompts, files, a chat, comparisons, and that every answer comes from the
adapter it is said to be of."""

import io
import json
import shutil

import generate_text
import pytest
import torch
from generate_text import main, side_by_side
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.folders import base_of, load_frozen_base, open_adapter
from text.collator import encode_source

PROMPT = "how long do beans soak?"
SHORT = ["--max_new_tokens", "6"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if "
    "add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def run(random_base, tmp_path_factory):
    """A run's folder that stopped early: adapter (turning point) and adapter-last, both random; and
    a second run."""
    folder = tmp_path_factory.mktemp("runs") / "early"
    for seed, name in enumerate(("adapter", "adapter-last")):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        config.task_type = "CAUSAL_LM"
        get_peft_model(AutoModelForCausalLM.from_pretrained(random_base), config).save_pretrained(folder / name)
    full = folder.with_name("full")
    shutil.copytree(folder / "adapter", full / "adapter-turning-point")
    shutil.copytree(folder / "adapter-last", full / "adapter")
    return folder


@pytest.fixture(scope="module")
def expected(run, random_base):
    """{name: greedy answer of 6 tokens}, by PEFT's own loading."""
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    ids = torch.tensor([encode_source(tokenizer, PROMPT)])
    models = {name: AutoPeftModelForCausalLM.from_pretrained(run / name) for name in ("adapter", "adapter-last")}
    models["base"] = AutoModelForCausalLM.from_pretrained(random_base)
    answers = {}
    for name, model in models.items():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        answers[name] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert len(set(answers.values())) == 3
    return answers


def answers_in(file):
    return [(row["adapter"], row["answer"]) for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())]


@pytest.mark.parametrize("place", ["", "adapter"])
def test_a_prompt_is_answered_by_the_kept_adapter(run, expected, capsys, place):
    assert main(["--adapter", str(run / place), "--prompt", PROMPT, *SHORT]) == 0
    assert expected["adapter"] in capsys.readouterr().out


def test_the_base_answers_without_an_adapter(random_base, expected, capsys):
    assert main(["--base", str(random_base), "--prompt", PROMPT, *SHORT]) == 0
    assert expected["base"] in capsys.readouterr().out


def test_adapters_take_turns_on_one_base_by_request(run, expected, tmp_path):
    requests = [{"input": PROMPT, "adapter": name} for name in ("adapter-last", "base", "adapter", "adapter-last")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*requests, {"input": PROMPT}]))
    flags = ["--adapter", str(run / "adapter"), str(run / "adapter-last"), "--prompts", str(tmp_path / "prompts.jsonl")]
    assert main([*flags, *SHORT, "--output", str(tmp_path / "answers.jsonl")]) == 0
    order = ["adapter-last", "base", "adapter", "adapter-last", "adapter", "adapter-last"]
    assert answers_in(tmp_path / "answers.jsonl") == [(name, expected[name]) for name in order]


def test_adapters_of_one_name_are_told_apart_by_their_runs(run):
    names = generate_text.named_adapters([str(run), str(run.with_name("full"))])
    assert list(names) == ["early/adapter", "full/adapter"]


@pytest.mark.parametrize("kind", ["early", "full"])
def test_compare_shows_base_turning_point_and_last(run, expected, tmp_path, capsys, kind):
    folder = run.with_name(kind)
    assert (
        main(["--adapter", str(folder), "--compare", "--prompt", PROMPT, *SHORT, "--output", str(tmp_path / "a.jsonl")])
        == 0
    )
    named = [("base", expected["base"]), ("turning point", expected["adapter"]), ("last", expected["adapter-last"])]
    assert answers_in(tmp_path / "a.jsonl") == named
    heads = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("base") and "turning point" in line
    ]
    assert len(heads) == 1 and [cell.strip() for cell in heads[0].split("|")] == ["base", "turning point", "last"]


def test_sampling_repeats_by_its_seed_whatever_was_asked_before(run, tmp_path):
    def sampled(prompts, seed):
        (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n")
        flags = ["--adapter", str(run), "--prompts", str(tmp_path / "p.txt"), "--do_sample", "--temperature", "1.5"]
        assert main([*flags, *SHORT, "--seed", seed, "--output", str(tmp_path / "out.jsonl")]) == 0
        return answers_in(tmp_path / "out.jsonl")[-1]

    assert sampled([PROMPT], "1") == sampled(["something else", PROMPT], "1") != sampled([PROMPT], "2")


def test_beam_search_answers_without_a_stream(run, capsys):
    assert main(["--adapter", str(run), "--prompt", PROMPT, "--num_beams", "2", *SHORT]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("bits", ["4", "8", "16"])
def test_the_bits_of_the_base_are_what_was_asked_for(run, monkeypatch, bits):
    seen = []

    def answer(speaker, source, name, stream):
        layer = speaker.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
        seen.append((type(layer).__name__, layer.weight.dtype))
        return ""

    monkeypatch.setattr(generate_text.Speaker, "answer", answer)
    assert main(["--adapter", str(run), "--prompt", PROMPT, "--bits", bits]) == 0
    kinds = {"4": ("Linear4bit", torch.uint8), "8": ("Linear8bitLt", torch.int8), "16": ("Linear", torch.bfloat16)}
    assert seen == [kinds[bits]]


def test_without_bits_the_base_is_as_in_training(run, tmp_path):
    """The trainer writes them into the adapter; without that the base is as stored."""
    folder = tmp_path / "adapter"
    shutil.copytree(run / "adapter", folder)
    file = str(folder / "adapter_model.safetensors")
    facts = {"base": {"bits": 4, "quant_type": "fp4", "double_quant": False}}
    save_file(load_file(file), file, metadata={"format": "pt", "es_lora": json.dumps(facts)})
    told, untold = open_adapter(str(folder)), open_adapter(str(run))
    model, bits = load_frozen_base(base_of([told], None), None, [told])
    assert bits == 4 and model.model.layers[0].self_attn.q_proj.weight.quant_type == "fp4"
    assert load_frozen_base(base_of([untold], None), None, [untold])[1] == 32


def talk(monkeypatch, lines, flags):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    return main([*flags, "--chat", *SHORT])


def test_a_chat_without_a_template_takes_prompts_and_swaps_adapters(run, expected, monkeypatch, capsys):
    flags = ["--adapter", str(run / "adapter"), str(run / "adapter-last")]
    lines = [PROMPT, "/use adapter-last", PROMPT, "/use nobody", "/use base", PROMPT]  # and the end of the input
    assert talk(monkeypatch, lines, flags) == 0
    out = capsys.readouterr().out
    places = [out.index(expected[name]) for name in ("adapter", "adapter-last", "base")]
    assert places == sorted(places)
    assert "no chat template" in out and "There is no 'nobody'" in out


def test_a_chat_with_a_template_carries_the_talk(run, random_base, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.chat_template = TEMPLATE
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    heard = []

    def answer(speaker, source, name, stream):
        heard.append(speaker.tokenizer.decode(source))
        return "yes"

    monkeypatch.setattr(generate_text.Speaker, "answer", answer)
    lines = ["rice", "beans", "/new", "peas", "/quit", "never asked"]
    assert talk(monkeypatch, lines, ["--adapter", str(tmp_path / "adapter")]) == 0
    turns = ["<user>rice<assistant>", "<user>rice<assistant>yes<user>beans<assistant>", "<user>peas<assistant>"]
    assert [text.replace(" ", "") for text in heard] == turns


def test_answers_stream_while_they_are_made(run, monkeypatch):
    """Not one text at the end: the words come in many pieces."""
    pieces = []

    class Screen(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return len(text)

    monkeypatch.setattr("sys.stdout", Screen())
    assert main(["--adapter", str(run), "--prompt", PROMPT, "--max_new_tokens", "40", "--min_new_tokens", "40"]) == 0
    assert len([text for text in pieces if text.strip()]) > 3


def test_columns_keep_to_the_width():
    shown = side_by_side(["base", "last"], ["one two three four five six seven", "short"], 43).splitlines()
    assert shown[0].split("|")[1].strip() == "last" and "short" in shown[2]
    assert max(map(len, shown)) <= 43 and len(shown) == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt", "x"], "give --adapter FOLDER"),
        (["--adapter", "RUN"], "one of the arguments --prompt --prompts --chat is required"),
        (["--adapter", "RUN", "--prompt", "x", "--temprature", "1"], "did you mean --temperature?"),
        (["--adapter", "RUN", "--prompt", "x", "--max_new_tokens", "0"], "--max_new_tokens 0: must be at least 1"),
        (
            ["--adapter", "RUN", "--prompt", "x", "--do_sample", "--temperature", "nan"],
            "argument --temperature: 'nan' is not a number",
        ),
        (["--adapter", "RUN", "--prompt", "x", "--penalty_alpha", "0.6"], "transformers has dropped"),
        (["--adapter", "/no/run", "--prompt", "x"], "/no/run holds no adapter_config.json"),
        (["--base", "/no/base", "--prompt", "x"], "the base model /no/base cannot be found"),
        (["--adapter", "RUN", "--prompts", "/no/file.txt"], "there is no such file"),
        (["--adapter", "RUN", "--prompts", "EMPTY"], "holds no prompt"),
        (["--adapter", "RUN", "--prompts", "TORN"], "broken JSON at line 2"),
        (["--adapter", "RUN", "--prompts", "OTHER"], "adapter nobody was not given; there are base, adapter"),
        (["--base", "/no/base", "--compare", "--prompt", "x"], "--compare needs --adapter"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(run, tmp_path, capsys, flags, said):
    files = {"EMPTY": "\n", "TORN": '{"input": "whole"}\n{"inp', "OTHER": '{"input": "x", "adapter": "nobody"}\n'}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    places = {"RUN": str(run), **{name: str(tmp_path / f"{name}.jsonl") for name in files}}
    try:
        code = main([places.get(flag, flag) for flag in flags])
    except SystemExit as stop:
        code = stop.code
    error = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line and line.strip()]
    assert code == 2 and len(error) == 1 and said in error[0], error


@pytest.mark.parametrize(
    "facts, flags, through_template",
    [
        ({"prompt_template": "chat"}, [], True),
        ({"prompt_template": None}, [], False),
        ({"rule": "an earlier version, which did not say"}, [], False),
        ({}, [], True),  # another trainer's
        ({"prompt_template": "chat"}, ["--prompt_as", "plain"], False),
        ({"prompt_template": None}, ["--prompt_as", "chat"], True),
    ],
)
def test_a_prompt_goes_in_as_in_training(run, random_base, tmp_path, monkeypatch, facts, flags, through_template):
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapter", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors, adapter / "adapter_model.safetensors", {"es_lora": json.dumps(facts)} if facts else None)
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(adapter)
    asked = []
    monkeypatch.setattr(generate_text.Speaker, "answer", lambda self, source, name, stream: asked.append(source) or "")
    assert main(["--adapter", str(adapter), "--prompt", PROMPT, *SHORT, *flags]) == 0
    text = f"<user>{PROMPT}<assistant>" if through_template else PROMPT
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert asked == [ids if through_template else encode_source(tokenizer, PROMPT)]


def test_a_chat_template_that_is_not_there_is_not_asked_for(run, capsys):
    assert main(["--adapter", str(run), "--prompt", PROMPT, "--prompt_as", "chat"]) == 2
    assert "no chat template" in capsys.readouterr().err
