"""Admission, fair rounds and the grid's choice, worked out by hand."""

import itertools

import pytest

from jobs.overview import choices, sparkline, summary
from jobs.scheduler import JobQueue, Limits, MemoryNeed, split_round, waiting_order

SMALL, LARGE = MemoryNeed(100, 10), MemoryNeed(600, 40)


def test_the_highest_priority_waits_least_and_equals_keep_the_order_of_the_file():
    assert waiting_order([0, 2, 0, 2, -1]) == [1, 3, 0, 2, 4]


def test_slots_are_given_in_order_and_again_as_they_free_up():
    queue = JobQueue(Limits(max_rows=8, max_jobs=2), [("a", SMALL), ("b", LARGE), ("c", SMALL)])
    assert queue.admit([]) == [("a", SMALL), ("b", LARGE)]
    assert queue.admit([SMALL, LARGE]) == []
    assert queue.admit([LARGE]) == [("c", SMALL)]
    assert queue.admit([]) == []


def test_memory_bounds_the_jobs_and_the_head_of_the_queue_is_not_overtaken():
    limits = Limits(max_rows=8, max_jobs=9, free_bytes=1000, token_bytes=5)
    assert limits.max_tokens([SMALL, SMALL]) == 160
    assert limits.fit([LARGE, SMALL]) and not limits.fit(
        [LARGE, SMALL, SMALL, SMALL]
    )  # 900 of adapters leave 20 tokens
    queue = JobQueue(limits, [("large", LARGE), ("huge", MemoryNeed(900, 10)), ("small", SMALL)])
    assert queue.admit([]) == [("large", LARGE)]
    assert [name for name, _ in queue.waiting] == ["huge", "small"]
    assert queue.admit([]) == [("huge", MemoryNeed(900, 10))]


def test_rows_of_like_length_share_a_pass():
    sizes = [(2, 10), (2, 90), (2, 12), (2, 80)]
    assert split_round(sizes, max_rows=4) == [[1, 3], [2, 0]]
    assert split_round(sizes, max_rows=3) == [[1], [3], [2], [0]]


def test_a_pass_more_is_made_where_padding_would_cost_more():
    assert split_round([(2, 10), (2, 42)], max_rows=9, pass_tokens=64) == [[1, 0]]  # 2 x 32 tokens of padding
    assert split_round([(2, 10), (2, 43)], max_rows=9, pass_tokens=64) == [[1], [0]]
    assert split_round([(1, 10), (2, 43)], max_rows=9, pass_tokens=64) == [[1, 0]]


def test_the_cut_is_the_cheapest_of_all():
    """Against every cut of eight micro-batches, tried one by one."""
    sizes, limit, price = [(2, 30), (1, 70), (3, 64), (1, 12), (2, 66), (4, 20), (1, 15), (2, 50)], 6, 25
    order = sorted(range(8), key=lambda index: -sizes[index][1])

    def cost(passes):
        return sum(
            price + sum(sizes[index][0] for index in part) * max(sizes[index][1] for index in part) for part in passes
        )

    every = []
    for cuts in itertools.product((False, True), repeat=7):
        passes = [[order[0]]]
        for cut, index in zip(cuts, order[1:]):
            passes.append([index]) if cut else passes[-1].append(index)
        if all(sum(sizes[index][0] for index in part) <= limit for part in passes):
            every.append(cost(passes))
    assert cost(split_round(sizes, limit, pass_tokens=price)) == min(every) < max(every)


def test_tokens_are_bounded_with_their_padding():
    assert split_round([(2, 10), (2, 40)], max_rows=9, max_tokens=160, pass_tokens=64) == [[1, 0]]
    assert split_round([(2, 10), (2, 40)], max_rows=9, max_tokens=159, pass_tokens=64) == [[1], [0]]


@pytest.mark.parametrize("max_rows", (1, 3, 5, 100))
def test_every_micro_batch_has_one_turn_a_round(max_rows):
    sizes = [(1 + index % 3, 5 * index) for index in range(1, 12)]
    assert sorted(sum(split_round(sizes, max_rows), [])) == list(range(11))


# ------------------------------------------------------------------------------------- the overview


def result(name, outcome="stopped_early", group="g", kept=None, last=None, turning=5, batch=4):
    heldout, settings = {"kept": kept, "last": last}, {"batch_size": batch, "accumulation": 2}
    return {"name": name, "group": group, "outcome": outcome, "heldout": heldout, "settings": settings} | {
        "keep_step": turning,
        "total_steps": 100,
        "last_step": 20,
        "seconds": 10.0,
    }


def test_held_out_loss_of_the_kept_weights_chooses():
    members = [result("a", kept=2.0, last=0.5), result("b", kept=1.5, last=9.0), result("c", "diverged", kept=0.1)]
    assert choices(members) == {"g": {"name": "b", "reason": "the lowest held-out loss of 2, 1.5000"}}


def test_a_full_run_without_a_turning_point_counts_with_its_last_weights():
    members = [result("a", kept=2.0), result("b", "no_turning_point", last=1.0, turning=None)]
    assert choices(members)["g"]["name"] == "b"


def test_without_held_out_examples_the_verdicts_choose_and_say_so():
    members = [result("a", turning=6), result("b", turning=7, batch=2), result("c", "no_turning_point", turning=None)]
    chosen = choices([*members, result("alone", group=None)])
    assert list(chosen) == ["g"] and chosen["g"]["name"] == "a"
    assert "48 examples; held-out examples would tell more" in chosen["g"]["reason"]


def test_nothing_is_chosen_where_nothing_was_trained_to_its_end():
    members = [result("a", "diverged"), result("b", "no_turning_point", turning=None)]
    assert choices(members)["g"]["name"] is None and "train longer" in choices(members)["g"]["reason"]


def test_the_summary_counts_what_the_stops_saved():
    text = summary([result("a"), result("b", "budget_reached"), {"name": "c", "outcome": "refused"}], 12.0)
    assert text == (
        "3 jobs: 1 stopped early, 1 trained to its budget, 1 not trained, in 12 seconds. The "
        "early stops saved 80 of 200 steps."
    )


def test_a_sparkline_needs_two_values_and_marks_the_turning_point():
    assert sparkline([1e-9], None) == ""
    drawn = sparkline([1e-9, 0.0, 1e-7, 1e-8], mark=2)
    assert 'points="2.0,29.0 106.0,3.0 158.0,16.0"' in drawn and 'cx="106.0" cy="3.0"' in drawn
