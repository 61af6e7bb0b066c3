"""Folds of shadows, and their optimizer steps against a plain AdamW."""

import pytest
import torch

from es_lora.shadows import SCORE_SHARE, ShadowTraining, auto_interval, make_folds, rate_is_adams


def sizes(count, shadows, seed=0):
    folds = make_folds(range(count), shadows, seed)
    assert set(folds) <= set(range(count))
    return [list(folds.values()).count(shadow) for shadow in range(shadows)]


@pytest.mark.parametrize(
    "count, shadows, each",
    [(100, 1, 20), (100, 2, 20), (100, 5, 20), (100, 10, 10), (3, 1, 1), (3, 3, 1), (8, 5, 1), (9, 2, 2), (130, 3, 26)],
)
def test_each_fold_has_a_fifth_or_its_share_and_at_least_one(count, shadows, each):
    assert sizes(count, shadows) == [each] * shadows


def test_folds_depend_on_the_examples_and_the_seed_alone():
    names = [f"cat/{number}.png" for number in range(20)]
    folds = make_folds(names, 3, 1)
    assert make_folds(reversed(names * 2), 3, 1) == folds != make_folds(names, 3, 2)


@pytest.mark.parametrize("count, shadows, needed", [(2, 1, 3), (4, 5, 5)])
def test_too_few_examples_are_refused_with_the_fix(count, shadows, needed):
    with pytest.raises(
        ValueError, match=f"needs at least {needed} different training examples, and there are {count}: give"
    ):
        make_folds([*range(count)] * 2, shadows, 0)


def test_whose_learning_rate_is_that_of_adamw():
    alike = ["AdamW", "AdamW8bit", "PagedAdamW32bit", "paged_adamw_32bit", "adamw_torch", "torch.optim.Adam"]
    others = ["Lion", "Prodigy", "DAdaptAdam", "AdamWScheduleFree", "schedule_free_adamw", "SGDNesterov", "adafactor"]
    assert all(map(rate_is_adams, alike)) and not any(map(rate_is_adams, others))


def shadows(count=2, folds=None, **settings):
    """ShadowTraining over one vector of 3 values a shadow, and the vectors."""
    torch.manual_seed(0)
    vectors = [torch.nn.Parameter(torch.randn(3)) for _ in range(count)]
    settings = {"max_norm": None, "interval": 1, "seed": 0, **settings}
    return ShadowTraining(folds or {}, [[{"params": [vector]}] for vector in vectors], **settings), vectors


def main_optimizer(**settings):
    return torch.optim.AdamW([torch.zeros(1)], **settings)


def test_rows_of_a_fold_are_left_out_of_their_shadow_only():
    training, _ = shadows(folds={"a": 0, "b": 1, "c": 1})
    assert training.trained_rows(["a", "b", "d", "a"]) == [[1, 2], [0, 2, 3]]


def test_steps_are_those_of_adamw_on_the_mean_loss_at_the_main_rate():
    """Two micro-batches of 2 and 4 losses; the second shadow sees nothing and stays as it is."""
    training, (own, idle) = shadows(max_norm=0.3)
    plain, untouched = torch.nn.Parameter(own.detach().clone()), idle.detach().clone()
    settings = dict(betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    main, twin = main_optimizer(lr=1.0, **settings), torch.optim.AdamW([plain], lr=1.0, **settings)
    data = torch.randn(6, 3)
    for rate in (0.5, 0.1):
        main.param_groups[0]["lr"] = twin.param_groups[0]["lr"] = rate
        for part in (data[:2], data[2:]):
            training.backward((part @ own).square().sum(), [len(part), 0])
        training.step(main)
        (data @ plain).square().mean().backward()
        torch.nn.utils.clip_grad_norm_([plain], 0.3)
        twin.step()
        twin.zero_grad()
    assert torch.allclose(own, plain, rtol=1e-5) and torch.equal(idle, untouched)


def test_a_stride_steps_seldom_at_as_much_more_of_the_rate():
    training, (own, _) = shadows(stride=2, average=0.25)
    plain, main = torch.nn.Parameter(own.detach().clone()), main_optimizer(lr=0.1)
    twin, data = torch.optim.AdamW([plain], lr=0.2), torch.randn(4, 3)
    for step in range(4):
        assert training.trains_now() == (step % 2 == 0)
        if training.trains_now():
            training.backward((data @ own).square().sum(), [len(data), 0])
            (data @ plain).square().mean().backward()
            twin.step()
            twin.zero_grad()
        training.step(main)
        training.average()
    assert torch.allclose(own, plain, rtol=1e-5) and training.averages[0].steps == 2


def test_a_score_is_that_of_the_averages_and_a_resumed_run_has_the_same():
    training, (own, _) = shadows(folds={"a": 0, "b": 1}, average=0.5)
    seen, main = [], main_optimizer(lr=0.1)
    for _ in range(3):
        training.backward(own.square().sum(), [1, 0])
        training.step(main)
        training.average()
        seen.append(own.detach().clone())
    with training.weights_to_score():
        assert torch.allclose(own, torch.stack(seen).mean(0), atol=1e-6)
    assert torch.equal(own, seen[-1])
    again, (other, _) = shadows(folds={"a": 0, "b": 1}, average=0.5)
    again.load_state_tensors(training.state_tensors())
    with training.weights_to_score(), again.weights_to_score():
        assert torch.equal(own, other)
    single, _ = shadows(folds={"a": 0, "b": 1})
    with pytest.raises(ValueError, match="hold no averages: go on with --average 0, or start anew"):
        again.load_state_tensors(single.state_tensors())


def test_a_gradient_that_is_not_finite_is_no_step():
    training, (own, _) = shadows()
    before = own.detach().clone()
    training.backward(own.sum() * float("inf"), [1, 0])
    training.step(main_optimizer())
    assert torch.equal(own, before)


def test_processes_sum_gradients_and_counts():
    """Another process with the same gradient on three times as many losses."""
    training, (own, idle) = shadows(sum_over_processes=lambda flat: torch.cat([flat[:2] * 4, flat[2:] * 2]))
    alone, (twin, _) = shadows()
    training.backward(own.square().sum(), [2, 0])
    alone.backward(2 * twin.square().sum(), [8, 0])
    training.step(main_optimizer(lr=0.1))
    alone.step(main_optimizer(lr=0.1))
    assert torch.equal(own, twin)


def test_scores_are_due_at_every_nth_measurement_from_the_first():
    training, _ = shadows(interval=3)
    assert [training.score_is_due() for _ in range(7)] == [True, False, False, True, False, False, True]


def test_automatic_scores_cost_no_more_than_their_share():
    for score_rows, trained_rows in ((26, 16), (16, 20), (1, 100), (500, 1)):
        interval = auto_interval(score_rows, trained_rows, epoch_rows=1e6)
        assert score_rows <= SCORE_SHARE * 3 * trained_rows * interval
        assert interval == 1 or score_rows > SCORE_SHARE * 3 * trained_rows * (interval - 1)


def test_automatic_scores_come_once_an_epoch_at_least():
    assert auto_interval(score_rows=80, trained_rows=10, epoch_rows=105) == 10 < auto_interval(80, 10, 1000)
    assert auto_interval(score_rows=80, trained_rows=10, epoch_rows=5) == 1


def train(training, vectors, steps):
    for _ in range(steps):
        training.backward(sum(vector.pow(4).sum() for vector in vectors), [1, 2])
        training.step(main_optimizer(lr=0.1))
        training.score_is_due()


def test_saved_and_loaded_shadows_go_on_alike():
    folds = {"a": 0, "b": 1}
    whole, whole_vectors = shadows(folds=folds, interval=2)
    train(whole, whole_vectors, 3)
    resumed, resumed_vectors = shadows(folds=folds, interval=2)
    resumed.load_state_tensors(whole.state_tensors())
    for training, vectors in ((whole, whole_vectors), (resumed, resumed_vectors)):
        train(training, vectors, 2)
    assert all(map(torch.equal, whole_vectors, resumed_vectors))
    assert whole.score_is_due() is resumed.score_is_due() is False and whole.pass_seed() == resumed.pass_seed()


@pytest.mark.parametrize("changes", [dict(count=1), dict(folds={"a": 1, "b": 0})], ids=["fewer", "other folds"])
def test_a_state_of_other_shadows_is_refused(changes):
    saved, _ = shadows(folds={"a": 0, "b": 1})
    other, _ = shadows(**{"folds": {"a": 0, "b": 1}, **changes})
    with pytest.raises(ValueError, match="go on with the same data, seed, --shadows and --shadow_rank, or start anew"):
        other.load_state_tensors(saved.state_tensors())


def test_random_numbers_of_the_main_run_stay_as_they_are():
    training, _ = shadows()
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    with training.apart():
        drawn = torch.rand(1)
    assert torch.equal(torch.rand(1), first) and training.seconds > 0
    with training.apart():
        assert torch.equal(torch.rand(1), drawn)  # the same pass
