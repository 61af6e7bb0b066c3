"""Masks, limits and padding of a batch, told from token ids written out by hand."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from text.collator import CausalCollator

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"]
BOS, EOS, A, B, C, D, E = 1, 2, 4, 5, 6, 7, 8


def word_tokenizer(**special):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


ROWS = [{"input": "a b", "output": "c"}, {"input": "a", "output": "b c d e"}]


def test_source_and_padding_are_masked():
    batch = CausalCollator(word_tokenizer(), 10, 10)(ROWS)
    assert batch["input_ids"].tolist() == [[BOS, A, B, C, EOS, 0, 0], [BOS, A, B, C, D, E, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7]
    assert batch["labels"].tolist() == [[-100] * 3 + [C, EOS, -100, -100], [-100] * 2 + [B, C, D, E, EOS]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_train_on_source_labels_all_but_padding():
    batch = CausalCollator(word_tokenizer(), 10, 10, train_on_source=True)(ROWS)
    assert batch["labels"].tolist() == [[BOS, A, B, C, EOS, -100, -100], [BOS, A, B, C, D, E, EOS]]


def test_each_part_is_cut_to_its_own_limit_and_a_cut_target_has_no_eos():
    batch = CausalCollator(word_tokenizer(), 2, 3)([{"input": "a b c", "output": "b c d e"}, *ROWS[:1]])
    assert batch["input_ids"].tolist() == [[BOS, A, B, C, D], [BOS, A, C, EOS, 0]]
    assert batch["labels"].tolist() == [[-100, -100, B, C, D], [-100, -100, C, EOS, -100]]


def test_empty_source():
    batch = CausalCollator(word_tokenizer(), 4, 4)([{"input": "", "output": "a"}])
    assert batch["input_ids"].tolist() == [[BOS, A, EOS]]
    assert batch["labels"].tolist() == [[-100, A, EOS]]


def test_tokenizer_without_bos():
    batch = CausalCollator(word_tokenizer(bos_token=None), 4, 4)(ROWS[:1])
    assert batch["input_ids"].tolist() == [[A, B, C, EOS]]


@pytest.mark.parametrize("pad_token", ["</s>", None])
def test_eos_stays_a_label_where_it_also_pads(pad_token):
    batch = CausalCollator(word_tokenizer(pad_token=pad_token), 10, 10)(ROWS)
    assert batch["input_ids"][0].tolist() == [BOS, A, B, C, EOS, EOS, EOS]
    assert batch["labels"][0].tolist() == [-100] * 3 + [C, EOS, -100, -100]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_generation_gets_the_source_alone_padded_on_the_left():
    batch = CausalCollator(word_tokenizer(), 10, 10, predict_with_generate=True)(ROWS)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[BOS, A, B], [0, BOS, A]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]


def test_lengths_are_those_of_the_batch():
    collator = CausalCollator(word_tokenizer(), 2, 3)
    rows = [*ROWS, {"input": "a b c d", "output": "a b c d"}]
    assert collator.lengths(rows) == [4, 5, 5]
    assert collator.lengths(rows) == [int(collator([row])["attention_mask"].sum()) for row in rows]


def test_a_text_beyond_the_tokenizers_length_is_cut_without_a_warning(capfd):
    tokenizer = word_tokenizer(model_max_length=3)
    CausalCollator(tokenizer, 4, 4)([{"input": "a b c d e f", "output": "a b c d e f"}])
    assert capfd.readouterr() == ("", "")


def test_bad_settings_are_told_together():
    with pytest.raises(ValueError, match="--source_max_len is 0.*--target_max_len is -1.*no eos token"):
        CausalCollator(word_tokenizer(eos_token=None), 0, -1)
