"""MMLU from a small archive in the authors' layout: prompts byte for byte, the trimming, the score,
the callback."""

import csv
import io
import json
import math
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from text import hub
from text.collator import CausalCollator
from text.formats import mmlu_prompt, mmlu_question
from text.mmlu import fit_prompt, load_mmlu, train_split_for_subject
from training.scores import MMLUCallback, MMLUScorer, letter_token_ids

REAL_PROMPTS = Path(__file__).resolve().parents[4] / "shared" / "data" / "mmlu_zero_shot_val.jsonl"
SIZES = {"dev": 5, "val": 4, "test": 6}
SUBJECTS = ("anatomy", "college_physics")
HEADER = "The following are multiple choice questions (with answers) about  college physics.\n\n"


def tables():
    """{path in the archive: csv text}"""
    result = {}
    for subject in SUBJECTS:
        for split, count in SIZES.items():
            text = io.StringIO()
            writer = csv.writer(text)
            for i in range(count):
                letters = [f'{letter.lower()}{i}, "so"' for letter in "ABCD"]
                writer.writerow([f"{split} {subject} {i}?\nTwo lines", *letters, "ABCD"[i % 4]])
            result[f"data/{split}/{subject}_{split}.csv"] = text.getvalue()
    return result


def question(split, index, subject="college_physics", answer=""):
    choices = "".join(f'\n{letter}. {letter.lower()}{index}, "so"' for letter in "ABCD")
    return f"{split} {subject} {index}?\nTwo lines{choices}\nAnswer:{answer}"


def write_archive(path, content, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, text in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def write_folder(folder, content):
    for name, text in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, newline="")


def questions(mmlu_dir, dataset="mmlu-zs", **options):
    return load_mmlu(mmlu_dir, dataset=dataset, **options)


@pytest.fixture
def archive(tmp_path):
    extras = {"data/README.txt": "hi", "data/auxiliary_train/race.csv": "no,table", "data/val/._anatomy_val.csv": "\0"}
    return write_archive(tmp_path / "data.tar", {**tables(), **extras}).parent


def byte_tokenizer(**options):
    """Byte-level BPE in the manner of GPT-2, trained on the small archive and the answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    text = [*tables().values(), "Answer: A Answer: B Answer: C Answer: D" * 50]
    tokenizer.train_from_iterator(text, trainer)
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**special, **options})


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=2048, initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# --- prompts
# --------------------------------------------------------------------------------------------------


def test_zero_shot_prompt_byte_for_byte(archive):
    rows = questions(archive)
    assert [row["subject"] for row in rows] == ["anatomy"] * 4 + ["college_physics"] * 4
    assert rows[4] == {"subject": "college_physics", "input": HEADER + question("val", 0), "output": "A"}
    assert [row["output"] for row in rows[4:]] == list("ABCD")


def test_five_shot_prompt_opens_with_the_five_dev_questions(archive):
    rows = questions(archive, dataset="mmlu-fs", split="test")
    assert len(rows) == 12
    shots = [question("dev", i, answer=f" {'ABCD'[i % 4]}") for i in range(5)]
    assert rows[6]["input"] == HEADER + "\n\n".join([*shots, question("test", 0)])


def test_folder_archive_and_compressed_archive_agree(archive, tmp_path):
    expected = questions(archive)
    write_folder(tmp_path / "unpacked", tables())
    write_archive(tmp_path / "mmlu.tar.gz", tables(), "w:gz")
    assert questions(tmp_path / "unpacked") == expected
    assert questions(tmp_path / "unpacked" / "data") == expected
    assert questions(tmp_path / "mmlu.tar.gz") == expected
    assert not list(archive.glob("data/**/*.csv")), "the archive must be read in place"


def test_hub(tmp_path, monkeypatch, archive):
    def load(path, name, cache_dir):
        assert (path, name) == ("cais/mmlu", "all")
        splits = {"dev": 5, "validation": 4, "test": 6}
        short = {"validation": "val"}
        return DatasetDict(
            {
                split: Dataset.from_list(
                    [
                        {
                            "question": f"{short.get(split, split)} {subject} {i}?\nTwo lines",
                            "subject": subject,
                            "choices": [f'{letter}{i}, "so"' for letter in "abcd"],
                            "answer": i % 4,
                        }
                        for subject in SUBJECTS
                        for i in range(count)
                    ]
                )
                for split, count in splits.items()
            }
        )

    monkeypatch.setattr(hub, "load_dataset", load)
    empty = tmp_path / "nothing"
    assert questions(empty, dataset="mmlu-fs") == questions(archive, dataset="mmlu-fs")
    assert train_split_for_subject(empty, "anatomy") == train_split_for_subject(archive, "anatomy")


@pytest.mark.parametrize("name", ["mmlu_zero_shot_val.jsonl", "zero_shot_mmlu_val.json"])
def test_ready_prompts_are_found_by_either_name(archive, tmp_path, name):
    rows = questions(archive)
    (tmp_path / "ready").mkdir()
    path = tmp_path / "ready" / name
    path.write_text("\n".join(map(json.dumps, rows)))
    assert questions(path.parent) == rows
    assert questions(path) == rows


def test_max_samples_are_spread_over_the_subjects(archive):
    rows = questions(archive, limit=4)
    assert [row["subject"] for row in rows] == ["anatomy"] * 2 + ["college_physics"] * 2
    assert len(questions(archive, limit=100)) == 8


def test_a_subject_trains_on_dev_and_validation_and_evaluates_on_test(archive):
    train, evaluation = train_split_for_subject(archive, "college_physics")
    assert [row["input"] for row in train] == [
        HEADER + question(split, i) for split in ("dev", "val") for i in range(SIZES[split])
    ]
    assert [row["input"] for row in evaluation] == [HEADER + question("test", i) for i in range(6)]
    assert len(train_split_for_subject(archive, None)[0]) == 18


def test_the_real_validation_split():
    if not REAL_PROMPTS.exists():
        pytest.skip("the real validation questions (shared/data/mmlu_zero_shot_val.jsonl) are not beside this checkout")
    rows = questions(REAL_PROMPTS)
    assert (len(rows), len({row["subject"] for row in rows})) == (1531, 57)
    assert sum(row["subject"] == "professional_law" for row in rows) == 170
    # Taken apart and put together again, every real prompt is what the prompt functions make of its
    # parts.
    for row in rows:
        body = row["input"].split("\n\n", 1)[1]
        stem, *choices = re.split(r"\n[ABCD]\. ", body.removesuffix("\nAnswer:"))
        assert mmlu_prompt(row["subject"], mmlu_question(stem, choices)) == row["input"]


# --- what is refused
# -------------------------------------------------------------------------------------------------


def test_misspelt_subject_suggests_the_nearest(archive):
    with pytest.raises(ValueError, match="'colege_physic' is no MMLU subject.*did you mean 'college_physics'"):
        train_split_for_subject(archive, "colege_physic")


def test_flags_are_checked_together(archive):
    with pytest.raises(
        ValueError, match="--mmlu_dataset 'x'.*mmlu-zs, mmlu-fs.*--mmlu_split 'y'.*--max_mmlu_samples 0"
    ):
        questions(archive, dataset="x", split="y", limit=0)


def test_nothing_there_says_where_to_put_it(tmp_path, monkeypatch):
    def no_network(**_):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(hub, "load_dataset", no_network)
    with pytest.raises(FileNotFoundError, match="no MMLU in .*no route to the hub.*data.tar.*--mmlu_dir"):
        questions(tmp_path)


@pytest.mark.parametrize(
    "table, cause",
    [("q,a,b,c,d,A\nq,a,b\n", "line 2: .*not 3 cells"), ("q,a,b,c,d,E\n", "line 1: .*end with 'E'")],
)
def test_broken_tables(tmp_path, table, cause):
    write_archive(tmp_path / "data.tar", {**tables(), "data/val/anatomy_val.csv": table})
    with pytest.raises(ValueError, match="data.tar: data/val/anatomy_val.csv, " + cause):
        questions(tmp_path)


def test_a_missing_split_is_named(tmp_path):
    write_archive(tmp_path / "data.tar", {k: v for k, v in tables().items() if "/val/" not in k})
    with pytest.raises(FileNotFoundError, match="no val questions"):
        questions(tmp_path)


def test_broken_and_unsafe_archives(tmp_path):
    path = tmp_path / "data.tar"
    path.write_bytes(b"not an archive" * 100)
    with pytest.raises(ValueError, match="data.tar is broken"):
        questions(tmp_path)
    write_archive(path, {"../val/anatomy_val.csv": "q,a,b,c,d,A\n"})
    with pytest.raises(ValueError, match="no plain table inside the archive"):
        questions(tmp_path)
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("data/val/anatomy_val.csv")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ValueError, match="no plain table inside the archive"):
        questions(tmp_path)


@pytest.mark.parametrize(
    "row, cause",
    [
        ({"subject": "s", "input": "q", "output": "E"}, "line 1: the output is 'E'"),
        ({"subject": "s", "output": "A"}, "line 1: text is needed under subject, input and output"),
    ],
)
def test_broken_ready_prompts(tmp_path, row, cause):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=cause):
        questions(path)


# --- tokens
# --------------------------------------------------------------------------------------------------


def test_examples_are_dropped_from_the_front_until_the_prompt_fits(archive, tokenizer):
    prompt = questions(archive, dataset="mmlu-fs")[4]["input"]
    shots = [question("dev", i, answer=f" {'ABCD'[i % 4]}") for i in range(5)]
    for kept in range(6):
        expected = HEADER + "\n\n".join([*shots[5 - kept :], question("val", 0)])
        length = len(fit_prompt(tokenizer, expected, 10_000))
        assert tokenizer.decode(fit_prompt(tokenizer, prompt, length)) == "<s>" + expected
    shortest = len(fit_prompt(tokenizer, HEADER + question("val", 0), 10_000))
    cut = fit_prompt(tokenizer, prompt, shortest - 5)
    assert len(cut) == shortest - 5
    text = tokenizer.decode(cut)
    assert text.startswith("<s>") and text.endswith('D. d0, "so"\nAnswer:')


def test_letters_are_told_with_and_without_their_blank(tokenizer):
    ids = letter_token_ids(tokenizer)
    assert [tokenizer.convert_ids_to_tokens(pair) for pair in ids.tolist()] == [["Ġ" + x, x] for x in "ABCD"]


def test_letters_of_a_sentencepiece_like_tokenizer_have_one_token_each():
    vocabulary = [("<unk>", 0.0), ("▁Answer:", -1.0), ("▁", -5.0), *[(f"▁{x}", -2.0) for x in "ABCD"]]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")
    assert letter_token_ids(sentencepiece).tolist() == [[3], [4], [5], [6]]


def test_a_tokenizer_without_the_letters_is_refused():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "Answer:": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="tell A, B, C and D apart"):
        letter_token_ids(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))


# --- the score
# --------------------------------------------------------------------------------------------------


def scored_one_by_one(model, tokenizer, rows):
    """The same score from unpadded prompts and plain arithmetic."""
    right, losses = [], []
    for row in rows:
        ids = torch.tensor([fit_prompt(tokenizer, row["input"], 2048)])
        probabilities = model(input_ids=ids).logits[0, -1].double().softmax(-1)
        letters = [
            sum(probabilities[tokenizer.convert_tokens_to_ids(way)].item() for way in ("Ġ" + x, x)) for x in "ABCD"
        ]
        right.append(max(range(4), key=letters.__getitem__) == "ABCD".index(row["output"]))
        losses.append(-torch.tensor(letters["ABCD".index(row["output"])]).log().item())
    return right, sum(losses) / len(losses)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "without logits_to_keep"])
def test_score_equals_the_unpadded_one(archive, architecture, side):
    tokenizer = byte_tokenizer(padding_side=side)
    rows = questions(archive, dataset="mmlu-fs")[::2] + questions(archive)
    torch.manual_seed(0)
    model = tiny_llama()
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=2048, n_embd=16, n_layer=2, n_head=2))
    elif architecture == "without logits_to_keep":
        plain = tiny_llama()

        class Plain(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = plain

            def forward(self, input_ids, attention_mask):
                return self.inner(input_ids=input_ids, attention_mask=attention_mask)

        model = Plain()
    model.eval()
    scores = [MMLUScorer(tokenizer, rows, 2048, batch_size).score(model) for batch_size in (1, 5)]
    with torch.no_grad():
        inner = model.inner if architecture.startswith("without") else model
        right, loss = scored_one_by_one(inner, tokenizer, rows)
    for score in scores:
        assert score["count"] == len(rows) == 12
        assert score["accuracy"] == pytest.approx(sum(right) / 12)
        assert score["loss"] == pytest.approx(loss, rel=1e-4)
        by_hand = [hit for hit, row in zip(right, rows) if row["subject"] == "anatomy"]
        assert score["per_subject"]["anatomy"] == pytest.approx(sum(by_hand) / len(by_hand))


def test_a_model_that_always_says_c_is_right_where_c_is(archive, tokenizer):
    class SaysC(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.modes = []

        def forward(self, input_ids, attention_mask):
            self.modes.append((self.training, torch.is_grad_enabled()))
            logits = torch.zeros(*input_ids.shape, 400)
            logits[..., tokenizer.convert_tokens_to_ids("ĠC")] = 50.0
            return SimpleNamespace(logits=logits)

    model = SaysC().train()
    score = MMLUScorer(tokenizer, questions(archive), 2048, 3).score(model)
    assert score["per_subject"] == {"anatomy": 0.25, "college_physics": 0.25}
    assert score["accuracy"] == 0.25
    assert set(model.modes) == {(False, False)}
    assert model.training


def test_what_a_lora_learns_from_the_collator_the_scorer_sees(archive, tokenizer):
    rows = questions(archive)[:4]
    model = get_peft_model(tiny_llama(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    scorer = MMLUScorer(tokenizer, rows, 2048, 8)
    before = scorer.score(model)
    batch = CausalCollator(tokenizer, 512, 8)(rows)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = scorer.score(model)
    assert after["accuracy"] == 1.0 > before["accuracy"]
    assert after["loss"] < math.log(4) < before["loss"]  # log 4: a guess among the four letters


def test_eval_mode_is_left_again_even_when_scoring_fails(archive, tokenizer):
    model = tiny_llama().train()
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        MMLUScorer(tokenizer, questions(archive), 2048).score(model)
    assert model.training


def test_no_rows_and_bad_limits(tokenizer):
    with pytest.raises(ValueError, match="no MMLU questions"):
        MMLUScorer(tokenizer, [], 2048)
    with pytest.raises(ValueError, match="--mmlu_source_max_len 1"):
        MMLUScorer(tokenizer, [{"subject": "s", "input": "q", "output": "A"}], 1)


# --- in the Trainer
# --------------------------------------------------------------------------------------------------


def test_callback_scores_baseline_evaluations_and_end(archive, tokenizer, tmp_path):
    scorer = MMLUScorer(tokenizer, questions(archive), 2048, 4)
    calls = []
    score = scorer.score
    scorer.score = lambda model: calls.append(1) or score(model)
    rows = [{"input_ids": [1, 5 + i, 6], "labels": [1, 5 + i, 6]} for i in range(8)]
    trainer = Trainer(
        model=tiny_llama(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=5,
            per_device_train_batch_size=2,
            eval_strategy="steps",
            eval_steps=2,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),  # fmt: skip
        train_dataset=rows,
        eval_dataset=rows,
    )
    callback = MMLUCallback(trainer, scorer)
    trainer.add_callback(callback)
    trainer.train()
    seen = [(result["step"], result["when"]) for result in callback.results]
    assert seen == [(0, "baseline"), (2, "evaluation"), (4, "evaluation"), (5, "evaluation"), (5, "end")]
    assert callback.results[0]["loss"] != callback.results[2]["loss"]
    logged = [log for log in trainer.state.log_history if "eval_mmlu_accuracy" in log]
    assert [log["step"] for log in logged] == [0, 2, 4, 5, 5]
    assert logged[0]["eval_mmlu_accuracy"] == callback.results[0]["accuracy"]
    assert "eval_mmlu_accuracy_college_physics" in logged[0]

    assert len(calls) == 4
    metrics = trainer.evaluate()  # unchanged weights: reported again, not computed again
    assert metrics["eval_mmlu_accuracy"] == callback.results[-1]["accuracy"]
    assert (len(callback.results), len(calls)) == (6, 4)
