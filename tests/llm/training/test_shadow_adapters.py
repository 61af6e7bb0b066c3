"""Shadows beside a language model's LoRA: they change nothing, never see their fold, decide, and
resume."""

import json
import random

import pytest
import torch
from es_lora_llm import main
from safetensors.torch import load_file
from transformers import AutoTokenizer

from es_lora.history import read_history
from es_lora.shadows import auto_interval, make_folds


def flags(base, files, output, *more):
    """A run of 3 epochs of 4 steps that measures after every step, M = 2."""
    return [
        *("--model_name_or_path", str(base), "--dataset", str(files["train"]), "--output_dir", str(output)),
        *("--bits", "32", "--lora_r", "4", "--learning_rate", "5e-3", "--per_device_train_batch_size", "4"),
        *("--gradient_accumulation_steps", "1", "--gradient_checkpointing", "False", "--num_train_epochs", "3"),
        *("--cs_interval", "1", "--window_size", "2", "--save_strategy", "no", "--use_cpu", *more),
    ]


def adapter_of(folder):
    return load_file(str(folder / "adapter_model.safetensors"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shadows_of(checkpoint):
    return load_file(str(checkpoint / "shadows.safetensors"))


@pytest.fixture
def rising_rule(monkeypatch):
    """A rule that stops when the shadows' loss is above its lowest value."""
    from es_lora.rules import RULES, Decision, StopRule

    class Rising(StopRule):
        name, needs, lowest = "rising", ("shadow_loss",), float("inf")

        def update(self, record):
            loss, step = record["shadow_loss"], record["step"]
            if loss is not None and loss > self.lowest:
                return Decision(step, step, (step, step), "The shadows' loss rises.")
            self.lowest = min(self.lowest, loss if loss is not None else float("inf"))
            return None

    monkeypatch.setitem(RULES, "rising", Rising)
    return "rising"


BESIDE = ["--shadows", "2", "--shadow_rank", "2"]


def records_of(output, column=None):
    records = read_history(output).records
    return [record[column] for record in records] if column else records


def other_words(text, tokenizer):
    """The words of a text in another order that has as many tokens."""
    draw, words = random.Random(0), text.split(" ")
    for _ in range(500):
        draw.shuffle(words)
        other = " ".join(words)
        if other != text and len(tokenizer(other).input_ids) == len(tokenizer(text).input_ids):
            return other
    raise AssertionError(text)


PACKED = ["--group_by_length", "False", "--seq_length", "64", "--packing"]


@pytest.mark.parametrize(
    "more",
    [
        ["--lora_dropout", "0.1", "--gradient_accumulation_steps", "3", "--per_device_train_batch_size", "2"],
        ["--bits", "4", "--gradient_checkpointing", "True", "--lr_scheduler_type", "cosine", "--max_steps", "6"],
        [*PACKED, "samples", "--num_train_epochs", "8"],
        [*PACKED, "wrapped", "--num_train_epochs", "8"],
    ],
    ids=["accumulated", "4 bits", "packed", "wrapped"],
)
def test_the_main_run_is_bit_for_bit_that_without_shadows(random_base, text_files, tmp_path, more):
    assert main(flags(random_base, text_files, tmp_path / "alone", *more)) == 0
    assert main(flags(random_base, text_files, tmp_path / "beside", *more, *BESIDE)) == 0
    assert same(adapter_of(tmp_path / "alone" / "adapter"), adapter_of(tmp_path / "beside" / "adapter"))
    beside = records_of(tmp_path / "beside")
    scores = [record.pop("shadow_loss") for record in beside]
    assert records_of(tmp_path / "alone") == beside
    assert len(set(scores)) == len(scores) > 5 and scores[5] < scores[0]


@pytest.mark.parametrize(
    "packing", [[], [*PACKED, "samples"], [*PACKED, "wrapped"]], ids=["apart", "samples", "wrapped"]
)
def test_a_shadow_without_a_fold_is_a_second_main_adapter(random_base, text_files, tmp_path, monkeypatch, packing):
    """Same rank, same first weights, nothing left out: the shadow's passes and steps must end where
    the main ones do."""
    from training import shadows

    class TheSameStart(shadows.ShadowAdapters):
        def __init__(self, settings, model, *words):
            super().__init__(settings, model, *words)
            self._fold_of.fill_(shadows.NO_EXAMPLE)
            live = dict(model.named_parameters())
            (adapter,) = self.adapters
            for name, down in adapter.down.items():
                down.data.copy_(live[f"base_model.model.{name}.lora_A.default.weight"])

        def score(self):
            return None

    monkeypatch.setattr("es_lora_llm.ShadowAdapters", TheSameStart)
    monkeypatch.setattr(shadows, "make_folds", lambda *words: {0: 0})
    more = ["--lr_scheduler_type", "linear", "--weight_decay", "0.1", "--max_grad_norm", "0.05", "--adam_beta2", "0.99"]
    more += ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2", "--optim", "adamw_torch"]
    more += ["--shadows", "1", "--shadow_rank", "4", "--save_strategy", "steps", "--save_steps", "12", *packing]
    assert main(flags(random_base, text_files, tmp_path, *more, "--max_steps", "12")) == 0
    main_weights, shadow = adapter_of(tmp_path / "adapter"), shadows_of(tmp_path / "checkpoint-12")
    trained = [tensor for name, tensor in shadow.items() if name.endswith(".weight")]
    wanted = sorted(tensor.double().norm().item() for tensor in main_weights.values())
    assert sorted(tensor.double().norm().item() for tensor in trained) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("packing", [[], [*PACKED, "samples", "--max_steps", "12"]], ids=["apart", "samples"])
def test_a_shadow_never_learns_from_its_fold_and_is_scored_on_it(random_base, text_files, tmp_path, packing):
    """With other answers (of the same length) in a fold, its shadow ends with the same weights and
    another score."""
    lines = text_files["train"].read_text().splitlines()
    left_out = {example for example, fold in make_folds(range(len(lines)), 2, 42).items() if fold == 0}
    rows = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    for number in left_out:
        rows[number]["output"] = other_words(rows[number]["output"], tokenizer)
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [*BESIDE, "--group_by_length", "False", "--save_strategy", "steps", "--save_steps", "12", *packing]
    assert main(flags(random_base, text_files, tmp_path / "a", *more)) == 0
    assert main(flags(random_base, {"train": changed}, tmp_path / "b", *more)) == 0
    one, other = shadows_of(tmp_path / "a" / "checkpoint-12"), shadows_of(tmp_path / "b" / "checkpoint-12")
    own = [name for name in one if name.startswith("0.") and name.endswith(".weight")]
    assert own and all(torch.allclose(one[name], other[name], atol=1e-5) for name in own)
    assert all(
        any(one[key].any() for key in one if key.startswith(f"{n}.") and key.endswith(".exp_avg")) for n in (0, 1)
    )
    others = [name for name in one if name.startswith("1.") and name.endswith(".weight")]
    assert not all(torch.allclose(one[name], other[name], atol=1e-3) for name in others)
    assert records_of(tmp_path / "a", "shadow_loss") != records_of(tmp_path / "b", "shadow_loss")


def test_conversations_that_are_left_out_belong_to_no_fold(random_base, conversation_files, tmp_path, capsys):
    """With some of which nothing is learnt between the others, the run is the same."""
    turns = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "yes"}]
    late, mixed = json.dumps({"messages": turns}) + "\n", tmp_path / "mixed.jsonl"
    lines = conversation_files["train"].read_text().splitlines(keepends=True)
    mixed.write_text(late + "".join(line + late for line in lines))
    more = [*BESIDE, "--source_max_len", "60", "--target_max_len", "60", "--group_by_length", "False"]
    assert main(flags(random_base, conversation_files, tmp_path / "a", *more)) == 0
    assert main(flags(random_base, {"train": mixed}, tmp_path / "b", *more)) == 0
    assert f"Left out: {len(lines) + 1} of {2 * len(lines) + 1} training examples" in capsys.readouterr().out
    assert records_of(tmp_path / "a", "shadow_loss") == records_of(tmp_path / "b", "shadow_loss")
    assert same(adapter_of(tmp_path / "a" / "adapter"), adapter_of(tmp_path / "b" / "adapter"))


def test_the_score_is_the_token_weighted_loss_of_the_folds(random_base, text_files, tmp_path):
    """Recomputed from the saved shadow by another route: PEFT's own layers and the model's own
    loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from es_lora.hugging_face.peft_models import load_tensors
    from text.collator import CausalCollator

    more = ["--shadows", "1", "--shadow_rank", "2", "--save_strategy", "steps", "--save_steps", "12"]
    assert main(flags(random_base, text_files, tmp_path, *more)) == 0
    base = AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32)
    names = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=16, target_modules=names))
    saved = [tensor for name, tensor in shadows_of(tmp_path / "checkpoint-12").items() if name.endswith(".weight")]
    keys = [f"base_model.model.{name}.lora_{part}.default.weight" for name in names for part in "AB"]
    order = sorted(range(len(keys)), key=lambda index: f"0.{index}.weight")  # safetensors sorts its names
    load_tensors(model, dict(zip([keys[index] for index in order], saved)))
    rows = [json.loads(line) for line in text_files["train"].read_text().splitlines()]
    fold = [rows[example] for example in make_folds(range(len(rows)), 1, 42)]
    batch = CausalCollator(AutoTokenizer.from_pretrained(random_base), 1024, 256)(fold)
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert records_of(tmp_path, "shadow_loss")[-1] == pytest.approx(loss, rel=1e-4)


def test_a_rule_on_the_shadows_switches_them_on_and_stops(random_base, text_files, tmp_path, rising_rule, capsys):
    more = ["--early_stop", "--stop_rule", rising_rule, "--num_train_epochs", "20", "--learning_rate", "2e-2"]
    assert main(flags(random_base, text_files, tmp_path, *more)) == 0
    result, scores = json.loads((tmp_path / "result.json").read_text()), records_of(tmp_path, "shadow_loss")
    assert result["outcome"] == "stopped_early" and result["reason"] == "The shadows' loss rises."
    assert result["files"]["kept"]["step"] == result["last_step"] < result["total_steps"] and scores[-1] > min(scores)
    assert result["settings"]["shadows"] == 1 and result["shadows"]["cost_factor"] > 1
    assert result["shadows"]["sentence"] in capsys.readouterr().out


def test_copies_of_an_example_share_its_fold():
    from datasets import Dataset

    from training.shadows import EXAMPLE, with_examples

    rows = Dataset.from_list([{"input": text, "output": "x"} for text in ("a", "b", "a", "c", "b")])
    assert with_examples(rows, 1, 42)[EXAMPLE] == [0, 1, 0, 3, 1]


def test_a_resumed_run_equals_an_uninterrupted_one(random_base, text_files, tmp_path):
    more = [*BESIDE, "--shadow_interval", "2", "--lora_dropout", "0.1", "--save_strategy", "steps", "--save_steps", "5"]
    more += [
        "--lr_scheduler_type",
        "cosine",
        "--gradient_accumulation_steps",
        "2",
        "--per_device_train_batch_size",
        "2",
    ]
    assert main(flags(random_base, text_files, tmp_path / "whole", *more)) == 0
    resumed = [*more, "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-5")]
    assert main(flags(random_base, text_files, tmp_path / "resumed", *resumed)) == 0
    assert records_of(tmp_path / "resumed") == records_of(tmp_path / "whole")
    assert [score is not None for score in records_of(tmp_path / "whole", "shadow_loss")] == [True, False] * 6
    assert same(*(shadows_of(tmp_path / name / "checkpoint-10") for name in ("whole", "resumed")))


def test_automatic_scores_follow_from_the_examples_of_a_fold(random_base, text_files, tmp_path):
    """3 of 16 examples in a fold, 4 trained on between two measurements."""
    assert main(flags(random_base, text_files, tmp_path, *BESIDE, "--shadow_interval", "auto", "--max_steps", "4")) == 0
    assert json.loads((tmp_path / "result.json").read_text())["shadows"]["interval"] == auto_interval(3, 4, 16) == 3
    assert [score is not None for score in records_of(tmp_path, "shadow_loss")] == [True, False, False, True]


def test_a_checkpoint_of_other_shadows_is_refused(random_base, text_files, tmp_path, capsys):
    short = ["--max_steps", "3", "--save_strategy", "steps", "--save_steps", "3"]
    assert main(flags(random_base, text_files, tmp_path / "with", *BESIDE, *short)) == 0
    assert main(flags(random_base, text_files, tmp_path / "without", *short)) == 0
    for name, changes, message in (
        ("with", ["--shadow_rank", "3"], "the saved shadows belong to other data or other settings"),
        ("with", ["--shadows", "1"], "the saved shadows belong to other data or other settings"),
        ("without", [], "that run had no shadows"),
    ):
        resume = ["--resume_from_checkpoint", str(tmp_path / name / "checkpoint-3")]
        assert main(flags(random_base, text_files, tmp_path / "next", *BESIDE, *changes, *resume)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--shadows", "2", "--calculate_cs", "False"], "--shadows are scored when CS is measured"),
        (["--shadows", "2", "--optim", "paged_lion_32bit"], "that of --optim paged_lion_32bit means something else"),
        (
            ["--shadows", "2", "--optim", "schedule_free_adamw"],
            "that of --optim schedule_free_adamw means something else",
        ),
        (["--shadows", "2", "--lora_bias", "all"], "use --lora_bias none"),
        (["--shadows", "-1"], "--shadows -1: must be at least 0"),
        (["--shadows", "1", "--shadow_interval", "0"], "--shadow_interval 0: give a number of 1 or more, or auto"),
        (["--shadows", "17"], "--shadows 17 needs at least 17 different training examples, and there are 16"),
        (["--shadows", "0", "--stop_rule", "rising"], "--stop_rule rising decides on shadows: leave out --shadows 0"),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(
    random_base, text_files, tmp_path, capsys, rising_rule, more, message
):
    assert main(flags(random_base, text_files, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
