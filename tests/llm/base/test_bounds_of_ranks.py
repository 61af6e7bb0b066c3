"""Ranks and answers that make no sense, or do not fit: refused, with the number that would do."""

import pytest

import base.layers as layers
from adapters.weights import attach_lora
from base.layers import answer_tokens, check_rank, lora_target_names
from base.loading import load_base
from base.spec import BaseSpec


@pytest.fixture
def small(random_base):
    return load_base(BaseSpec(str(random_base), 32))  # all its layers have 64 rows and columns


def test_a_rank_above_the_smaller_side_of_every_layer_is_refused_with_that_side(small):
    with pytest.raises(ValueError, match="--lora_r 65: the layers have 64 rows or columns at most.*give 64 or less"):
        attach_lora(small, rank=65, alpha=16)
    attach_lora(small, rank=64, alpha=16)


def test_a_rank_that_the_memory_cannot_hold_is_refused_with_one_that_fits(small, monkeypatch):
    names = lora_target_names(small, "all")
    a_rank = 16 * len(names) * (64 + 64)  # bytes: weight, gradient and two moments in float32
    monkeypatch.setattr(layers, "free_bytes", lambda device: 10 * a_rank + 5)
    with pytest.raises(ValueError, match="rank 11: training it takes .* GB are free; give 10 or less"):
        check_rank(small, names, 11, "rank")
    check_rank(small, names, 10, "rank")


def test_answers_many_times_as_long_as_the_base_has_positions_are_refused(small):
    assert answer_tokens(small, 4, 8 * 256) == 8 * 256
    with pytest.raises(ValueError, match="--max_new_tokens 2049: the base was trained on 256 positions; give 2048"):
        answer_tokens(small, 4, 8 * 256 + 1)
