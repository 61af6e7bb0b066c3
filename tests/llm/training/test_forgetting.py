"""--forgetting_data: the loss on general text before, at the turning point and at the end, and what
is said of it."""

import json
import math
from pathlib import Path

import pytest
import torch
from es_lora_llm import main
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.forgetting import GeneralText, forgetting_sentence, forgetting_table, read_general_text

SHIPPED = Path(__file__).resolve().parents[3] / "lora-llm" / "tiny_base" / "general_text.jsonl"


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    """Seven short passages of the shipped text."""
    file = tmp_path_factory.mktemp("general") / "general.jsonl"
    rows = [json.loads(line)["text"][:60] for line in SHIPPED.read_text(encoding="utf-8").splitlines()[:7]]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return file


def run(base, files, output, *more):
    flags = [
        "--model_name_or_path",
        str(base),
        "--dataset",
        str(files["train"]),
        "--output_dir",
        str(output),
        "--bits",
        "32",
    ]
    flags += ["--lora_r", "4", "--learning_rate", "2e-2", "--per_device_train_batch_size", "4", "--lora_dropout", "0.1"]
    flags += ["--gradient_accumulation_steps", "1", "--gradient_checkpointing", "False", "--num_train_epochs", "6"]
    flags += ["--stop_rule", "second-valley", "--cs_interval", "1", "--window_size", "2"]
    flags += ["--save_strategy", "no", "--use_cpu", *more]
    assert main(flags) == 0
    return json.loads((output / "result.json").read_text())


@pytest.mark.parametrize("stop", ["True", "False"])
def test_the_losses_are_those_of_the_base_and_of_the_saved_adapters(random_base, text_files, general, tmp_path, stop):
    """Recomputed one passage at a time from what was saved."""
    from peft import AutoPeftModelForCausalLM

    result = run(random_base, text_files, tmp_path / "run", "--early_stop", stop, "--forgetting_data", str(general))
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    passages = [json.loads(line)["text"].strip() for line in general.read_text(encoding="utf-8").splitlines()]
    names = {"kept": "adapter", "last": "adapter-last"}
    if stop == "False":
        names = {"kept": "adapter-turning-point", "last": "adapter"}
    models = {"before": AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32)}
    for name, folder in names.items():
        models[name] = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / folder, dtype=torch.float32)
    for name, model in models.items():
        total, count = 0.0, 0
        for passage in passages:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(passage, add_special_tokens=False)["input_ids"]]])
            with torch.no_grad():
                total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert result["forgetting"]["loss"][name] == pytest.approx(total / count, rel=1e-4)
        assert result["forgetting"]["tokens"] == count
    losses = result["forgetting"]["loss"]
    assert len({round(loss, 5) for loss in losses.values()}) == 3
    assert result["forgetting"]["perplexity_ratio"]["last"] == pytest.approx(
        math.exp(losses["last"] - losses["before"])
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert "what the LoRA has forgotten" in page and result["forgetting"]["sentence"].split(";")[0] in page
    for loss in losses.values():
        assert f"{loss:.4f}" in page


def test_scoring_leaves_the_training_as_it_was(random_base, text_files, general, tmp_path):
    plain = run(random_base, text_files, tmp_path / "plain")
    run(random_base, text_files, tmp_path / "scored", "--forgetting_data", str(general))
    histories = [(tmp_path / name / "cs_history.jsonl").read_text().splitlines() for name in ("plain", "scored")]
    losses = [[json.loads(line).get("loss") for line in lines] for lines in histories]
    assert losses[0] == losses[1] and len([loss for loss in losses[0] if loss]) == 24
    assert plain["forgetting"] is None


def test_scoring_leaves_the_mode_and_skips_the_padding(random_base, general):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(random_base), AutoTokenizer.from_pretrained(random_base)
    model.train()
    one_by_one, together = (GeneralText(str(general), tokenizer, 7, size) for size in (1, 7))
    assert one_by_one.loss(model) == pytest.approx(together.loss(model), rel=1e-5)
    assert model.training


def test_passages_are_taken_evenly_and_cut(random_base, tmp_path):
    file = tmp_path / "many.txt"
    file.write_text("\n\n".join(f"passage {number} " + "word " * 400 for number in range(10)))
    assert [text.split()[1] for text in read_general_text(str(file), 4)] == ["0", "3", "6", "9"]
    assert len(read_general_text(str(file), 32)) == 10
    text = GeneralText(str(file), AutoTokenizer.from_pretrained(random_base), 4, 2)
    assert text.tokens == 4 * 127


def test_a_lora_that_has_forgotten_is_called_so():
    base = math.log(20)
    said = forgetting_sentence({"before": base, "kept": base + math.log(1.03), "last": base + math.log(3.5)})
    assert "the LoRA of the turning point has not forgotten: perplexity 1.03 times" in said
    assert "the LoRA of the last step has forgotten: perplexity 3.50 times" in said
    assert forgetting_sentence({"before": base}) == ""
    double = base + math.log(2)
    rows = forgetting_table({"before": base, "last": double})[2]
    assert rows == [
        ["before training", f"{base:.4f}", "20.00", "1.00"],
        ["last step", f"{double:.4f}", "40.00", "2.00"],
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.jsonl", None, "there is no such file"),
        ("empty.txt", "\n\n \n", "holds no text"),
        ("torn.jsonl", '{"text": "a whole line"}\n{"text": "a to', "broken JSON at line 2"),
        ("other.jsonl", '{"words": "nothing under text"}\n', "line 1 needs a text column"),
        ("image.txt", b"\xff\xd8\xff", "is not UTF-8"),
    ],
)
def test_a_bad_file_ends_before_anything_is_written(random_base, text_files, tmp_path, capsys, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = ["--model_name_or_path", str(random_base), "--dataset", str(text_files["train"])]
    flags += ["--output_dir", str(tmp_path / "run"), "--bits", "32", "--use_cpu"]
    assert main([*flags, "--forgetting_data", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert said in error and name in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
