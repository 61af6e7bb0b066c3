"""Packed samples are learnt as single ones are: the same losses, and nothing goes from one to
another."""

import json

import pytest
import torch
import transformers
from datasets import Dataset
from es_lora_llm import main
from transformers import AutoModelForCausalLM, AutoTokenizer

from es_lora.history import read_history
from settings.parsing import parse_arguments
from text.collator import IGNORE_INDEX, CausalCollator
from text.packing import PackedCollator, block_mask, check_base_keeps_samples_apart, encode_sample, pack

LENGTH = 256
SHAPES = {
    "llama": dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
    "opt": dict(hidden_size=64, word_embed_proj_dim=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2),
    "gpt2": dict(n_embd=64, n_layer=2, n_head=2),
    "gpt_neox": dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
    "bloom": dict(hidden_size=64, n_layer=2, n_head=2),
}


def model_of(kind, **options):
    """A random model whose attention matters: larger weights than a fresh one has."""
    config = transformers.AutoConfig.for_model(kind, vocab_size=4096, initializer_range=0.2, **SHAPES[kind])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **options).eval()


@pytest.fixture(scope="module")
def collator(random_base):
    return CausalCollator(AutoTokenizer.from_pretrained(random_base), 64, 32)


@pytest.fixture(scope="module")
def rows(text_files):
    return Dataset.from_list([json.loads(line) for line in text_files["train"].read_text().splitlines()])


def packed_batch(rows, collator, packing="samples"):
    packed = pack(rows, collator, packing, LENGTH)
    return PackedCollator(collator, packing, LENGTH)([packed[index] for index in range(len(packed))])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("on_source", [False, True], ids=["answers", "all tokens"])
def test_packed_and_single_samples_have_the_same_loss(kind, on_source, rows, random_base):
    collator = CausalCollator(AutoTokenizer.from_pretrained(random_base), 64, 32, on_source)
    model, single, packed = model_of(kind), collator([*rows]), packed_batch(rows, collator)
    loss = model(**single).loss.item()
    assert packed["input_ids"].shape[0] < len(rows) / 3
    assert model(**packed).loss.item() == pytest.approx(loss, abs=1e-5)
    seeing = {**packed, "attention_mask": torch.ones_like(packed["input_ids"])}
    assert abs(model(**seeing).loss.item() - loss) > 1e-3  # with attention across samples it would show


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gpt_neox"])
def test_bases_that_keep_samples_apart_are_taken(kind):
    check_base_keeps_samples_apart(model_of(kind))


@pytest.mark.parametrize(("kind", "options"), [("bloom", {}), ("llama", {"attn_implementation": "eager"})])
def test_bases_that_do_not_are_refused_by_name(kind, options):
    with pytest.raises(
        ValueError, match=f"--packing: a {kind} base does not keep packed samples apart .*--packing wrapped"
    ):
        check_base_keeps_samples_apart(model_of(kind, **options))


def test_a_sample_ends_with_end_of_text_and_its_first_token_is_not_learnt(collator):
    row, end = {"input": "a b", "output": "c d"}, collator.tokenizer.eos_token_id
    source, target = collator.encode(row)
    encoded = encode_sample(collator, row)
    assert encoded["input_ids"] == source + target and target[-1] == end
    assert encoded["labels"] == [IGNORE_INDEX] * len(source) + target
    cut = encode_sample(CausalCollator(collator.tokenizer, 64, 1, True), row)
    assert cut["input_ids"] == [*source, target[0], end]
    assert cut["labels"] == [IGNORE_INDEX, *source[1:], target[0], IGNORE_INDEX]


def test_every_sequence_has_one_length_and_every_sample_is_there_once(rows, collator):
    batch = packed_batch(rows, collator)
    assert batch["input_ids"].shape[1] == LENGTH and batch["attention_mask"].shape[1:] == (1, LENGTH, LENGTH)
    found = []
    for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist()):
        starts = [place for place, position in enumerate(positions) if position == 0] + [LENGTH]
        found += [tuple(ids[start:end]) for start, end in zip(starts, starts[1:])]
    expected = {tuple(encode_sample(collator, row)["input_ids"]) for row in rows}
    padding = [sample for sample in found if sample not in expected]
    assert expected <= set(found) and len(padding) <= len(batch["input_ids"])
    assert all(set(sample) == {collator.tokenizer.eos_token_id} for sample in padding)


def test_a_token_sees_itself_and_what_comes_before_it_in_its_sample():
    mask = block_mask([[2, 1], [1, 2]])
    assert mask.int().tolist() == [[[[1, 0, 0], [1, 1, 0], [0, 0, 1]]], [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]]


def test_wrapped_sequences_are_the_samples_one_after_the_other(rows, collator):
    packed = pack(rows, collator, "wrapped", LENGTH)
    stream = [token for row in packed for token in row["input_ids"]]
    assert stream == [token for row in rows for token in encode_sample(collator, row)["input_ids"]]
    assert {len(row["input_ids"]) for row in packed.select(range(len(packed) - 1))} == {LENGTH}
    batch = packed_batch(rows, collator, "wrapped")
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(packed), LENGTH)
    assert int(batch["attention_mask"].sum()) == len(stream)


def test_flash_attention_gets_one_row_without_padding_and_the_lengths(rows, collator):
    packed = pack(rows, collator, "samples", LENGTH)
    batch = PackedCollator(collator, "samples", LENGTH, varlen=True)([packed[0], packed[1]])
    lengths = packed[0]["seq_lengths"] + packed[1]["seq_lengths"]
    assert batch["input_ids"].tolist() == [packed[0]["input_ids"] + packed[1]["input_ids"]]
    assert batch["cu_seq_lens_q"].diff().tolist() == lengths and batch["max_length_q"] == max(lengths)
    assert "attention_mask" not in batch and int((batch["position_ids"] == 0).sum()) == len(lengths)


# --------------------------------------------------------------------------------------------- runs


def flags(base, files, output, *more):
    return [
        *(
            "--model_name_or_path",
            str(base),
            "--dataset",
            str(files["train"]),
            "--output_dir",
            str(output),
            "--bits",
            "32",
        ),
        *("--lora_r", "4", "--learning_rate", "5e-3", "--per_device_train_batch_size", "1", "--use_cpu"),
        *("--gradient_accumulation_steps", "1", "--gradient_checkpointing", "False", "--save_strategy", "no", *more),
    ]


def result_of(output):
    return json.loads((output / "result.json").read_text())


@pytest.mark.parametrize("packing", [["--packing"], ["--packing", "wrapped"]], ids=" ".join)
def test_a_packed_run_counts_its_own_steps_and_stops_early(packing, random_base, text_files, tmp_path, capsys):
    more = ["--early_stop", "--stop_rule", "second-valley", "--cs_interval", "1", "--window_size", "2"]
    more += ["--num_train_epochs", "12", *packing]
    more += ["--seq_length", str(LENGTH), "--do_eval", "--eval_dataset", str(text_files["heldout"])]
    assert main(flags(random_base, text_files, tmp_path / "run", *more)) == 0
    result, history = result_of(tmp_path / "run"), read_history(tmp_path / "run")
    said = capsys.readouterr().out
    sequences = int(said.split("samples in ")[1].split(" sequences")[0])
    assert "Packed: 16 samples in" in said and 1 < sequences < 8
    assert history.header["steps_per_epoch"] == sequences and result["total_steps"] == 12 * sequences
    assert (
        result["outcome"] == "stopped_early"
        and result["files"]["kept"]["step"] < result["last_step"] < result["total_steps"]
    )
    single = ["--max_steps", "1", "--group_by_length", "False", *more[-3:]]  # the same batches of evaluation
    assert main(flags(random_base, text_files, tmp_path / "single", *single)) == 0
    assert (
        result_of(tmp_path / "single")["heldout"]["before"] == result["heldout"]["before"]
    )  # evaluation is not packed


BAD = {
    "word": ("--packing tight", "--packing tight: choose one of samples, wrapped"),
    "length": ("--packing --seq_length 1", "--seq_length 1: must be at least 2"),
    "grouping": ("--packing --group_by_length True", "--group_by_length needs single samples"),
    "repeat": ("--packing --packing_repeat", "--packing_repeat starts a stream again: it needs --streaming"),
    "shadows": (
        "--packing --streaming --max_steps 9 --early_stop --shadows 2 --cs_interval 1 --window_size 2",
        "--shadows hold samples out of a known set",
    ),
    "two formats": ("--prompt_template summarise --dataset_format alpaca", "give one of them"),
    "mmlu": ("--dataset mmlu --prompt_template rate", "--dataset mmlu has its own format"),
    "epochs": (
        "--streaming --num_train_epochs 2 --calculate_cs False",
        "a stream has no known length, so give --max_steps",
    ),
    "window": (
        "--streaming --max_steps 9",
        "the length of an epoch is not known, so give --cs_interval and --window_size",
    ),
    "fraction": ("--streaming --do_eval --eval_dataset_size 0.1 --calculate_cs False", "hold out a number of rows"),
    "by epoch": (
        "--streaming --save_strategy epoch --calculate_cs False",
        "--save_strategy epoch: a stream has no known epochs",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_go_together_is_refused_by_name(case, tmp_path):
    words, message = BAD[case]
    with pytest.raises(ValueError) as caught:
        parse_arguments(["--output_dir", str(tmp_path / "run"), *words.split()])
    assert message in str(caught.value)


def test_a_wrapped_sequence_must_fit_the_positions_of_the_base(random_base, text_files, tmp_path, capsys):
    more = ["--packing", "wrapped", "--seq_length", "512", "--num_train_epochs", "1"]
    assert main(flags(random_base, text_files, tmp_path / "run", *more)) == 2
    assert "--seq_length 512: the base has 256 positions" in capsys.readouterr().err
