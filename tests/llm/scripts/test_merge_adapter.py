"""Merging adapters into their base: the weights, the logits, and that nothing wrong is ever
written."""

import json
import shutil

import merge_adapter
import pytest
import torch
from merge_adapter import main
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from es_lora.weights import keep_as_loaded

TARGETS = ["q_proj", "v_proj", "down_proj"]
WEIGHT = "model.layers.1.mlp.down_proj.weight"
TEXT = "how long do beans soak, and in how much water?"


@pytest.fixture(scope="module")
def bases(random_base, tmp_path_factory):
    """{dtype: folder}: the random base as it is and stored in 16 bits."""
    folders = {torch.float32: random_base}
    for dtype in (torch.bfloat16, torch.float16):
        folders[dtype] = tmp_path_factory.mktemp("stored") / str(dtype)
        AutoModelForCausalLM.from_pretrained(random_base, dtype=dtype).save_pretrained(folders[dtype])
        AutoTokenizer.from_pretrained(random_base).save_pretrained(folders[dtype])
    return folders


def make_adapter(base, folder, seed, **more):
    """An adapter that changes the output a good deal: both of its matrices are random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", **more
    )
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(random_base, tmp_path_factory):
    return [make_adapter(random_base, tmp_path_factory.mktemp("adapters") / f"run-{seed}.5", seed) for seed in (1, 2)]


@torch.no_grad()
def logits_of(model, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    return model.eval()(**tokenizer(TEXT, return_tensors="pt")).logits.float()


def update(folder):
    """(alpha / r) B A of one layer, from the file alone."""
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    name = f"base_model.model.{WEIGHT.removesuffix('.weight')}"
    return 8 / 4 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_sum_is_made_in_float32_and_cast_once(bases, adapters, tmp_path, dtype):
    base, merged = bases[dtype], tmp_path / "merged"
    assert main(["--adapter", str(adapters[0]), "--base", str(base), "--output", str(merged)]) == 0
    before, after = (load_file(str(folder / "model.safetensors")) for folder in (base, merged))
    assert before.keys() == after.keys() and all(tensor.dtype == dtype for tensor in after.values())
    expected = (before[WEIGHT].float() + update(adapters[0])).to(dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(after[WEIGHT], expected, rtol=0, atol=1e-6)
    else:  # a sum at the edge of a rounding may fall either way; one that was rounded twice differs in many places
        assert (after[WEIGHT] != expected).float().mean() < 0.002
    untouched = [name for name in before if not any(target in name for target in TARGETS)]
    assert untouched and all(torch.equal(before[name], after[name]) for name in untouched)


@pytest.mark.parametrize(
    ("bits", "dtype", "tolerance"),
    [
        ("32", "float32", 1e-5),
        ("16", "float16", 1e-2),
        ("16", "bfloat16", 6e-2),
        ("8", "float32", 4e-2),
        ("4", "float32", 1e-4),
    ],
)
def test_merged_logits_are_those_of_base_and_adapter(bases, adapters, tmp_path, capsys, bits, dtype, tolerance):
    """Apart from the tool's own check: PEFT on a base loaded here, against the folder as anyone
    would load it."""
    base, merged = bases[getattr(torch, dtype)], tmp_path / "merged"
    assert main(["--adapter", str(adapters[0]), "--base", str(base), "--output", str(merged), "--bits", bits]) == 0
    said = capsys.readouterr().out
    assert "largest difference" in said and "tolerance" in said
    assert ("dequantised weights" in said) == (bits in "48")
    quantisation = {
        "4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "8": BitsAndBytesConfig(load_in_8bit=True),
    }.get(bits)
    apart = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), quantization_config=quantisation)
    keep_as_loaded(apart)  # bitsandbytes would round the 4-bit scales to bf16 on some processors
    plain = logits_of(apart, base)
    expected = logits_of(PeftModel.from_pretrained(apart, str(adapters[0])), base)
    got = logits_of(AutoModelForCausalLM.from_pretrained(merged), base)
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    assert (plain - expected).abs().max() > 5 * (got - expected).abs().max()
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    facts = json.loads((merged / "merge.json").read_text())
    assert facts["bits"] == int(bits) and facts["logits"]["largest_difference"] <= facts["logits"]["tolerance"]


def test_several_adapters_add_up_by_their_weights(random_base, adapters, tmp_path):
    merged = tmp_path / "merged"
    assert main(["--adapter", f"{adapters[0]}:0.7", f"{adapters[1]}:-0.3", "--output", str(merged)]) == 0
    before, after = (load_file(str(folder / "model.safetensors"))[WEIGHT] for folder in (random_base, merged))
    expected = before + 0.7 * update(adapters[0]) - 0.3 * update(adapters[1])
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)
    assert [entry["weight"] for entry in json.loads((merged / "merge.json").read_text())["adapters"]] == [0.7, -0.3]


@pytest.mark.parametrize("more", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}], ids=str)
def test_other_kinds_of_lora_merge_alone(random_base, tmp_path, more, capsys):
    adapter = make_adapter(random_base, tmp_path / "adapter", 3, **more)
    assert main(["--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    expected = logits_of(AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32), random_base)
    got = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), random_base)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    if "use_rslora" not in more:
        assert main(["--adapter", f"{adapter}:0.5", "--output", str(tmp_path / "half")]) == 2
        assert "alone and with weight 1" in capsys.readouterr().err


def test_the_tokenizer_comes_along(adapters, random_base, tmp_path):
    assert main(["--adapter", str(adapters[0]), "--output", str(tmp_path / "merged")]) == 0
    ids = [AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] for folder in (random_base, tmp_path / "merged")]
    assert ids[0] == ids[1]


def test_logits_that_differ_leave_nothing(adapters, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        merge_adapter, "merge_layers", lambda model, names, dtype: model.unload()
    )  # forgets the adapter
    assert main(["--adapter", str(adapters[0]), "--output", str(tmp_path / "merged")]) == 2
    assert "the merged model differs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_written_over(adapters, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert main(["--adapter", str(adapters[0]), "--output", str(tmp_path / "mine")]) == 2
    assert "exists; choose another name" in capsys.readouterr().err
    assert list((tmp_path / "mine").iterdir()) == []


def damaged(adapters, tmp_path, how):
    folder = tmp_path / how
    shutil.copytree(adapters[0], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    if how == "torn":
        content = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    elif how == "baseless":
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/no/such/base"}))
    elif how == "other":
        (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    elif how == "infinite":
        from safetensors.torch import save_file

        tensors = load_file(str(folder / "adapter_model.safetensors"))
        save_file(
            {name: tensor * float("inf") for name, tensor in tensors.items()}, str(folder / "adapter_model.safetensors")
        )
    elif how == "wide":
        (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    return str(folder)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("torn", "is damaged"),
        ("baseless", "the base model /no/such/base cannot be found"),
        ("other", "only LORA is supported"),
        ("infinite", "merge_adapter: "),
        ("wide", "its configuration says rank 8, and its matrices have rank 4"),
    ],
)
def test_damaged_adapters_get_one_message(adapters, tmp_path, capsys, how, said):
    assert main(["--adapter", damaged(adapters, tmp_path, how), "--output", str(tmp_path / "merged")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("merge_adapter: ")]
    assert len(error) == 1 and said in error[0]
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--adapter", "/no/such/folder"], "/no/such/folder holds no adapter_config.json"),
        (["--adapter", "ADAPTER:0"], "a finite number other than 0"),
        (["--adapter", "ADAPTER:nan"], "a finite number other than 0"),
        (["--adaptor", "ADAPTER"], "--adaptor is unknown; did you mean --adapter?"),
        (["--adapter", "ADAPTER", "--bits", "5"], "invalid choice: 5"),
    ],
)
def test_mistakes_on_the_command_line_get_one_line(adapters, tmp_path, capsys, flags, said):
    flags = [flag.replace("ADAPTER", str(adapters[0])) for flag in flags]
    try:
        code = main([*flags, "--output", str(tmp_path / "merged")])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and len(error.strip().splitlines()) == 1
