"""Input that cannot be used: one message that says the fix, exit code 2, no traceback, nothing
written over, whatever the tool."""

import json
import shutil

import pytest
import torch
from cs_replay import main as replay
from es_lora_llm import main as train
from generate_text import main as generate
from judge_checkpoints import main as judge
from merge_adapter import main as merge
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from es_lora.command_line import reported

LONG = {"input": "word " * 90, "output": "answer " * 20}


@pytest.fixture(scope="module")
def adapter(random_base, tmp_path_factory):
    """A random LoRA over the random base, as PEFT saves it."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(random_base), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def broken(adapter, random_base, tmp_path_factory):
    """{"adapter", "base", "run"}: with a NaN in a tensor each; the run has two checkpoints."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(adapter, folder / "adapter")
    shutil.copytree(random_base, folder / "base")
    for file in (folder / "adapter" / "adapter_model.safetensors", folder / "base" / "model.safetensors"):
        tensors = load_file(file)
        name = sorted(tensors)[-1] if "adapter" in file.name else next(key for key in tensors if "q_proj" in key)
        tensors[name].view(-1)[3] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
    for step in (10, 20):
        shutil.copytree(folder / "adapter", folder / "run" / f"checkpoint-{step}")
    return {name: folder / name for name in ("adapter", "base", "run")}


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(base, data, output, *more):
    words = ["--model_name_or_path", str(base), "--dataset", str(data), "--output_dir", str(output), "--use_cpu"]
    words += ["--bits", "32", "--lora_r", "4", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    words += ["--gradient_accumulation_steps", "1", "--gradient_checkpointing", "False", "--save_strategy", "no"]
    return train([*words, *map(str, more)])


def one_message(capsys, program):
    """The only line on the error stream besides progress."""
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "it/s" not in line]
    lines = [line for line in lines if line.strip() and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"{program}: "), lines
    return lines[0]


# --------------------------------------------------------------------------------- weights with NaN


@pytest.mark.parametrize("tool", ["merge_adapter", "generate_text", "judge_checkpoints"])
def test_an_adapter_with_nan_is_refused_by_the_tensors_name(tool, broken, random_base, tmp_path, capsys):
    given = ["--adapter", str(broken["adapter"]), "--base", str(random_base), "--bits", "32"]
    code = {
        "merge_adapter": lambda: merge([*given, "--output", str(tmp_path / "merged")]),
        "generate_text": lambda: generate([*given, "--prompt", "x"]),
        "judge_checkpoints": lambda: judge([str(broken["run"]), "--base", str(random_base), "--steps_per_epoch", "10"]),
    }[tool]()
    said = one_message(capsys, tool)
    assert code == 2 and "q_proj" in said and "holds NaN or infinity" in said
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("tool", ["es_lora_llm", "merge_adapter", "generate_text", "judge_checkpoints"])
def test_a_base_with_nan_is_refused_by_the_tensors_name(tool, broken, adapter, text_files, tmp_path, capsys):
    given = ["--adapter", str(adapter), "--base", str(broken["base"]), "--bits", "32"]
    for step in (10, 20):
        shutil.copytree(adapter, tmp_path / "run" / f"checkpoint-{step}")
    code = {
        "es_lora_llm": lambda: run(broken["base"], text_files["train"], tmp_path / "out"),
        "merge_adapter": lambda: merge([*given, "--output", str(tmp_path / "merged")]),
        "generate_text": lambda: generate([*given, "--prompt", "x"]),
        "judge_checkpoints": lambda: judge(
            [str(tmp_path / "run"), "--base", str(broken["base"]), "--steps_per_epoch", "10"]
        ),
    }[tool]()
    said = one_message(capsys, tool)
    assert code == 2 and "q_proj" in said and "holds NaN or infinity" in said


def test_a_quantised_base_does_not_hide_a_nan(broken, text_files, tmp_path, capsys):
    assert run(broken["base"], text_files["train"], tmp_path / "out", "--bits", "4") == 2
    assert "holds NaN or infinity" in one_message(capsys, "es_lora_llm")


@pytest.mark.parametrize("given", ["the run", "its checkpoint"])
def test_a_checkpoint_with_nan_is_not_gone_on_with(random_base, text_files, tmp_path, capsys, given):
    out = tmp_path / "out"
    saves = ["--save_strategy", "steps", "--save_steps", "1"]
    assert run(random_base, text_files["train"], out, *saves) == 0
    file = out / "checkpoint-2" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    capsys.readouterr()
    checkpoint = out if given == "the run" else file.parent
    more = [*saves, "--max_steps", "4", "--resume_from_checkpoint", checkpoint]
    assert run(random_base, text_files["train"], out, *more) == 2
    said = one_message(capsys, "es_lora_llm")
    assert f"--resume_from_checkpoint {file.parent}" in said and f"the tensor {name} holds NaN" in said
    assert (out / "result.json").is_file() and file.is_file() and not (out / "checkpoint-4").exists()


def test_a_base_of_the_hubs_cache_in_4_bits_does_not_hide_a_nan(broken, text_files, tmp_path, capsys, monkeypatch):
    """Its name is no folder: the files are found as transformers finds them."""
    import base.loading

    usual = base.loading.cached_file
    monkeypatch.setattr(base.loading, "cached_file", lambda name, file, **more: usual(broken["base"], file, **more))
    for loader in (base.loading.AutoConfig, base.loading.AutoTokenizer, base.loading.AutoModelForCausalLM):
        load = loader.from_pretrained
        given = staticmethod(lambda _name, load=load, **options: load(broken["base"], **options))
        monkeypatch.setattr(loader, "from_pretrained", given)
    assert run("owner/name", text_files["train"], tmp_path / "out", "--bits", "4") == 2
    assert "--model_name_or_path owner/name: the tensor " in one_message(capsys, "es_lora_llm")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("nested", [False, True])
def test_the_scales_of_a_quantised_weight_are_looked_at(bits, nested):
    from types import SimpleNamespace

    from es_lora.weights import quantisation_scales, refuse_nonfinite

    model = torch.nn.Linear(2, 2)
    bad = torch.tensor([1.0, float("inf")])
    whole = torch.ones(2)
    if bits == 8:
        model.weight.SCB = bad
    else:
        state = SimpleNamespace(absmax=whole if nested else bad, offset=whole, state2=SimpleNamespace(absmax=bad))
        model.weight.quant_state = state
    with pytest.raises(ValueError, match="base: the tensor weight holds NaN or infinity"):
        refuse_nonfinite(quantisation_scales(model), "base")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("tool", ["es_lora_llm", "generate_text"])
def test_a_torn_file_of_a_base_is_one_message_that_names_the_base(
    random_base, text_files, tmp_path, capsys, tool, file
):
    base = shutil.copytree(random_base, tmp_path / "base")
    (base / file).write_bytes((base / file).read_bytes()[:60])
    if tool == "es_lora_llm":
        assert run(base, text_files["train"], tmp_path / "out") == 2
    else:
        assert generate(["--base", str(base), "--bits", "32", "--prompt", "x"]) == 2
    assert str(base) in one_message(capsys, tool)


def test_a_base_that_needs_a_package_says_which(random_base, text_files, tmp_path, capsys, monkeypatch):
    def fail(*_args, **_options):
        raise ModuleNotFoundError("No module named 'words'", name="words")

    monkeypatch.setattr("base.loading.AutoTokenizer.from_pretrained", fail)
    assert run(random_base, text_files["train"], tmp_path / "out") == 2
    assert "its tokenizer needs a package that is not here" in (said := one_message(capsys, "es_lora_llm"))
    assert said.endswith("pip install words")


# ---------------------------------------------------------------------------------------- adapters


def test_qloras_checkpoints_are_judged_merged_and_asked(adapter, random_base, tmp_path, capsys):
    for step in (10, 20, 30):
        shutil.copytree(adapter, tmp_path / "run" / f"checkpoint-{step}" / "adapter_model")
    newest = ["--adapter", str(tmp_path / "run" / "checkpoint-30"), "--base", str(random_base), "--bits", "32"]
    assert judge([str(tmp_path / "run"), "--base", str(random_base), "--steps_per_epoch", "10"]) == 0
    assert merge([*newest, "--output", str(tmp_path / "merged")]) == 0
    assert generate([*newest, "--prompt", "x", "--max_new_tokens", "2"]) == 0


def test_pickled_adapters_are_told_how_to_be_converted(adapter, random_base, tmp_path, capsys):
    for place in (tmp_path / "run" / "checkpoint-10", tmp_path / "run" / "checkpoint-20" / "adapter_model"):
        shutil.copytree(adapter, place)
        torch.save(load_file(place / "adapter_model.safetensors"), place / "adapter_model.bin")
        (place / "adapter_model.safetensors").unlink()
        given = ["--adapter", str(place), "--base", str(random_base)]
        assert merge([*given, "--output", str(tmp_path / "merged")]) == 2
        assert "adapter_model.bin is a pickle file" in one_message(capsys, "merge_adapter")
        assert generate([*given, "--prompt", "x"]) == 2
        assert "convert it: python -c" in one_message(capsys, "generate_text")
    assert judge([str(tmp_path / "run"), "--base", str(random_base)]) == 2
    assert "save_file" in one_message(capsys, "judge_checkpoints")


def test_the_advice_to_convert_a_pickle_works(adapter, tmp_path):
    from es_lora.weights import pickle_advice

    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    exec(pickle_advice(tmp_path / "adapter_model.bin").partition('python -c "')[2].rstrip('"'))
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == tensors.keys()


def test_a_lora_on_tied_embeddings_is_merged_with_a_head_of_its_own(base_with_a_table, tmp_path):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(base_with_a_table)
    config = LoraConfig(r=4, target_modules=["wte", "c_attn"], init_lora_weights=False, task_type="CAUSAL_LM")
    apart = get_peft_model(base, config)
    apart.save_pretrained(tmp_path / "adapter")
    given = ["--adapter", str(tmp_path / "adapter"), "--base", str(base_with_a_table), "--bits", "32"]
    assert merge([*given, "--output", str(tmp_path / "merged")]) == 0
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), torch.arange(3, 20)[None]
    assert torch.allclose(merged.eval()(ids).logits, apart.eval()(ids).logits, atol=1e-3)


# --------------------------------------------------------------------------------------- positions


def test_texts_beyond_a_table_of_positions_are_refused(base_with_a_table, tmp_path, capsys):
    data = rows_file(tmp_path / "long.jsonl", [LONG] * 3)
    assert run(base_with_a_table, data, tmp_path / "out") == 2
    assert "the base has 64 positions: lower --source_max_len and --target_max_len" in one_message(
        capsys, "es_lora_llm"
    )
    assert run(base_with_a_table, data, tmp_path / "out", "--source_max_len", 40, "--target_max_len", 24) == 0


def test_a_stream_beyond_a_table_of_positions_is_refused_at_the_row(base_with_a_table, tmp_path, capsys):
    data = rows_file(tmp_path / "long.jsonl", [LONG] * 8)
    flags = ["--streaming", "--calculate_cs", "False"]
    assert run(base_with_a_table, data, tmp_path / "out", *flags) == 2
    said = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert any(line.startswith("es_lora_llm: ") and "the base has 64 positions" in line for line in said)


def test_an_answer_ends_where_the_positions_end_and_a_longer_prompt_is_refused(base_with_a_table, capsys):
    given = ["--base", str(base_with_a_table), "--bits", "32", "--max_new_tokens", "100", "--prompt"]
    assert generate([*given, "hello"]) == 0
    assert "the base has 64 positions" in capsys.readouterr().out
    assert generate([*given, "word " * 100]) == 2
    assert "shorten the prompt" in one_message(capsys, "generate_text")


def test_evaluation_predictions_and_general_text_stay_within_the_positions(base_with_a_table, text_files, tmp_path):
    flags = ["--source_max_len", 40, "--target_max_len", 24, "--do_eval", "--eval_dataset", text_files["heldout"]]
    flags += ["--do_predict", "--predict_with_generate", "--max_new_tokens", 100]
    general = tmp_path / "general.txt"
    general.write_text("word " * 200)
    flags += ["--forgetting_data", general]
    assert run(base_with_a_table, text_files["train"], tmp_path / "out", *flags) == 0


def test_mmlu_prompts_are_cut_to_the_positions(base_with_a_table, text_files, tmp_path, capsys):
    row = {"subject": "physics", "input": "word " * 100 + "\nAnswer:", "output": "A"}
    questions = rows_file(tmp_path / "mmlu.jsonl", [row] * 3)
    flags = ["--source_max_len", 40, "--target_max_len", 24, "--do_mmlu_eval", "--mmlu_dir", questions]
    assert run(base_with_a_table, text_files["train"], tmp_path / "out", *flags) == 0
    assert len(json.loads((tmp_path / "out" / "result.json").read_text())["mmlu"]) >= 1


def test_rotary_positions_that_are_exceeded_are_told(random_base, tmp_path, capsys):
    data = rows_file(tmp_path / "long.jsonl", [{"input": "word " * 300, "output": "answer"}] * 3)
    assert run(random_base, data, tmp_path / "out") == 0
    assert "Beyond its positions" in capsys.readouterr().out


# ---------------------------------------------------------------- nothing to learn, nothing trained


@pytest.mark.parametrize("packing", ["samples", "wrapped"])
def test_packed_prompts_without_an_answer_are_no_divergence(random_base, tmp_path, capsys, packing):
    rows = [{"input": "word " * 200, "output": "answer"}] * 4 + [{"input": "w", "output": "answer"}] * 4
    data = rows_file(tmp_path / "rows.jsonl", rows)
    assert run(random_base, data, tmp_path / "out", "--packing", packing, "--seq_length", 32) == 0
    assert "diverged" not in capsys.readouterr().out


def test_a_set_of_which_nothing_is_learnt_is_refused_before_anything_is_deleted(random_base, tmp_path, capsys):
    data = rows_file(tmp_path / "rows.jsonl", [{"input": "word " * 200, "output": "answer"}] * 4)
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    flags = ["--packing", "--seq_length", 32, "--overwrite_output_dir"]
    assert run(random_base, data, tmp_path / "out", *flags) == 2
    assert "no token of the 4 training examples is learnt" in one_message(capsys, "es_lora_llm")
    assert (tmp_path / "out" / "adapter").is_dir()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--per_device_train_batch_size", "64", "--dataloader_drop_last", "True"], "fewer than a batch of 64"),
        (["--packing", "--per_device_train_batch_size", "64", "--dataloader_drop_last", "True"], "sequences are fewer"),
        (["--max_steps", "0"], "--max_steps 0: nothing would be trained"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0: must be above 0"),
    ],
)
def test_a_run_that_would_train_nothing_is_refused(random_base, text_files, tmp_path, capsys, flags, said):
    assert run(random_base, text_files["train"], tmp_path / "out", *flags) == 2
    assert said in one_message(capsys, "es_lora_llm")
    assert not (tmp_path / "out" / "result.json").exists()


# --------------------------------------------------------------------------- templates, histories


@pytest.mark.parametrize("fault", ["raise_exception('System role not supported')", "1 / 0", "messages.nothing.at_all"])
def test_a_template_that_fails_is_one_message_in_training_and_in_asking(random_base, tmp_path, capsys, fault):
    shutil.copytree(random_base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.chat_template = "{{ " + fault + " }}"
    tokenizer.save_pretrained(tmp_path / "base")
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert run(tmp_path / "base", rows_file(tmp_path / "two.jsonl", [row] * 2), tmp_path / "out") == 2
    assert "two.jsonl, line 1: the chat template" in one_message(capsys, "es_lora_llm")
    assert generate(["--base", str(tmp_path / "base"), "--bits", "32", "--prompt", "x"]) == 2
    assert "refuses the conversation" in one_message(capsys, "generate_text")


@pytest.mark.parametrize("field", ["cs_interval", "window", "steps_per_epoch", "decided_on"])
def test_a_history_whose_header_lacks_a_field_is_one_message(tmp_path, capsys, field):
    header = {"format": "cs-history/1", "cs_interval": 1, "window": 2, "steps_per_epoch": 4, "decided_on": "lm"}
    header.pop(field)
    rows_file(tmp_path / "cs_history.jsonl", [header, {"step": 1, "cs": {"lm": 0.1}}])
    assert replay([str(tmp_path), "--rule", "second-valley"]) == 2
    assert f"its header lacks {field}" in one_message(capsys, "cs_replay")


@pytest.mark.parametrize("line", ["[1]", "3", '{"cs": {"lm": 0.1}}'])
def test_a_history_with_a_line_that_is_no_measurement_is_one_message(tmp_path, capsys, line):
    header = {"format": "cs-history/1", "cs_interval": 1, "window": 2, "steps_per_epoch": 4, "decided_on": "lm"}
    header["reduction"] = "row"
    (tmp_path / "cs_history.jsonl").write_text(json.dumps(header) + f"\n{line}\n")
    assert replay([str(tmp_path), "--rule", "second-valley"]) == 2
    assert "the file is damaged" in one_message(capsys, "cs_replay")


# ------------------------------------------------------------------------------ whose fault it is


def test_a_fault_of_ours_keeps_its_traceback_and_says_so(capsys):
    def fail():
        raise KeyError("ours")

    assert reported("tool", fail) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "tool: this is a fault of ES-LoRA" in error


@pytest.mark.parametrize(
    "error", [ValueError("bad \x1b[31mred\x1b[0m"), PermissionError("bad red"), Exception("bad red")]
)
def test_what_input_is_at_fault_is_one_line_without_colour_codes(capsys, error):
    def fail():
        raise error

    assert reported("tool", fail) == 2
    assert one_message(capsys, "tool").endswith("bad red")
