"""Rows of which nothing is learnt are left out, cuts are counted, thoughts are opened."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from text.collator import CausalCollator
from text.conversations import Chat, without_open_thought
from text.packing import pack
from text.usable import Cuts, usable_rows
from training.losses import mean_loss

LONG, SHORT = {"input": "word " * 50, "output": "answer"}, {"input": "w", "output": "answer"}


@pytest.fixture(scope="module")
def tokenizer(random_base):
    return AutoTokenizer.from_pretrained(random_base)


def test_rows_whose_answer_lies_behind_the_cut_are_left_out_and_counted(tokenizer):
    cuts = Cuts(CausalCollator(tokenizer, 200, 20), sequence_tokens=16)
    rows, sizes, notices = usable_rows(Dataset.from_list([LONG, SHORT, LONG, SHORT]), cuts, "training")
    assert rows["input"] == ["w", "w"] and len(sizes) == 2
    assert any(line.startswith("Left out: 2 of 4 training examples") and "--seq_length" in line for line in notices)


def test_a_set_without_a_learnt_token_is_refused(tokenizer):
    cuts = Cuts(CausalCollator(tokenizer, 200, 20), sequence_tokens=16)
    with pytest.raises(ValueError, match="no token of the 3 held-out examples is learnt.*raise --seq_length"):
        usable_rows(Dataset.from_list([LONG] * 3), cuts, "held-out")


def test_prompts_and_answers_that_are_cut_are_counted_with_the_longest_and_the_flag(tokenizer):
    rows = Dataset.from_list([LONG, SHORT, {"input": "w", "output": "answer " * 40}])
    collator = CausalCollator(tokenizer, 30, 20)
    longest = [max(size[at] for size in collator.sizes(rows)) for at in (0, 1)]
    _, _, notices = usable_rows(rows, Cuts(collator), "training")
    assert notices == [
        f"Cut off: 1 of 3 training prompts after 30 tokens. The longest has {longest[0]}; "
        "raise --source_max_len to keep them whole.",
        f"Cut off: 1 of 3 training answers after 20 tokens. The longest has {longest[1]}; "
        "raise --target_max_len to keep them whole.",
    ]
    assert usable_rows(Dataset.from_list([SHORT]), Cuts(collator), "training")[2] == []


@pytest.mark.parametrize("packing", ["samples", "wrapped"])
def test_every_packed_sequence_has_a_learnt_token(tokenizer, packing):
    collator = CausalCollator(tokenizer, 200, 20)
    packed = pack(Dataset.from_list([LONG] * 3 + [SHORT] * 3), collator, packing, 16)
    assert len(packed) and all(any(label != -100 for label in labels[1:]) for labels in packed["labels"])


def test_the_mean_loss_of_no_token_is_zero(random_base):
    from transformers import AutoModelForCausalLM

    ids = torch.ones(1, 4, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": torch.full_like(ids, -100)}
    assert mean_loss(AutoModelForCausalLM.from_pretrained(random_base), [batch]) == 0


THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last and {last} %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{opened}{% endif %}"
)


@pytest.mark.parametrize(
    ("last", "opened"), [("false", "<think>\n"), ("true", ""), ("true", "<think>\n\n</think>\n\n")]
)
def test_a_template_that_opens_a_thought_is_learnt_from(tokenizer, last, opened):
    """DeepSeek opens one in the prompt, Qwen writes an empty one into the last turn alone."""
    tokenizer.chat_template = THINKING.replace("{last}", last).replace("{opened}", opened)
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "first"}]
    text, spans = Chat(tokenizer).marked([*asked, {"role": "user", "content": "r"}, {**asked[1], "content": "second"}])
    learnt = [text[start:end].replace("<think>\n\n</think>\n\n", "") for start, end in spans]
    assert learnt == ["first<end>", "second<end>"]


def test_only_a_thought_at_the_end_of_a_prompt_is_taken_off():
    assert without_open_thought("a<think>b</think>c<think>\n") == "a<think>b</think>c"
    assert without_open_thought("a<think>\n\n</think>\n\n") == "a"
    assert without_open_thought("a<think>b") == "a<think>b"
