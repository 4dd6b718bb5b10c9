"""A loss's divisor from batch to batch: one that follows the batch is refused, however slowly."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from tests.isolation.loss_checks.outside_losses import MEANS, SUMS, N, OutsideLoss, step
from tests.support import make_private


def test_a_divisor_that_follows_the_batch_is_refused_in_the_next_one():
    """Of one batch alone it might be a constant."""
    counts = iter((12, 13))
    model, optimizer = step(loss := lambda out, y: F.cross_entropy(out, y) * 6 / next(counts))
    before = optimizer.ledger.steps
    with pytest.raises(IsolationError, match="weighs an example by 0.461538, that of an earlier one by 0.5"):
        step(loss, model=model, optimizer=optimizer, n=5)
    assert optimizer.ledger.steps == before


def test_a_divisor_that_follows_large_batches_is_refused_too():
    """One token more or less of thousands is still a count."""
    counts = iter((2000, 2001))
    model, optimizer = step(loss := lambda out, y: F.cross_entropy(out, y) * 6 / next(counts))
    with pytest.raises(IsolationError, match="weighs an example"):
        step(loss, model=model, optimizer=optimizer)


@pytest.mark.parametrize("n", [2, N])
def test_a_divisor_that_creeps_is_held_to_the_first_one(n):
    weights = iter(0.5 * (1 + 8e-6 * i) for i in range(3))
    model, optimizer = step(loss := lambda out, y: next(weights) * F.cross_entropy(out, y), n=n)
    step(loss, model=model, optimizer=optimizer, n=n)
    with pytest.raises(IsolationError, match="weighs an example"):
        step(loss, model=model, optimizer=optimizer, n=n)


def test_a_batch_of_one_is_held_to_the_weight_of_earlier_ones():
    weights = iter((0.5, 0.5, 0.4))
    model, optimizer = step(loss := lambda out, y: next(weights) * F.cross_entropy(out, y), n=1)
    step(loss, model=model, optimizer=optimizer, n=2)
    with pytest.raises(IsolationError, match="by 0.4, that of an earlier one by 0.5"):
        step(loss, model=model, optimizer=optimizer, n=1)


@pytest.mark.parametrize("first", [2, N])
def test_batches_of_one_that_creep_are_held_to_the_first_batch_of_several(first):
    weights = iter(0.5 * (1 + 8e-6 * i) for i in range(3))
    model, optimizer = step(loss := lambda out, y: next(weights) * F.cross_entropy(out, y), n=first)
    step(loss, model=model, optimizer=optimizer, n=1)
    with pytest.raises(IsolationError, match="weighs an example by 0.500008, that of an earlier one by 0.5"):
        step(loss, model=model, optimizer=optimizer, n=1)


def in_a_loop(lengths: list[int], share: float) -> OutsideLoss:
    """Another graph for other lengths; ``share`` of the mean over the examples."""

    def loss(out: Tensor, y: Tensor) -> Tensor:
        each = [sum((out[i : i + 1].square().sum(1) for _ in range(k)), torch.zeros(1)) for i, k in enumerate(lengths)]
        return share * torch.cat(each).mean()

    return loss


@pytest.mark.parametrize("n", [2, N])
def test_a_divisor_outside_a_loop_whose_graph_is_another_in_every_batch_is_refused(n):
    """Before that it is compared with those of other graphs, it looks like a constant."""
    model, optimizer = step(in_a_loop([2] * n, 0.5), n=n)
    step(in_a_loop([1] * (n - 1) + [3], 0.5), model=model, optimizer=optimizer, n=n)
    with pytest.raises(IsolationError, match="weighs an example by 0.4, that of an earlier one by 0.5"):
        step(in_a_loop([2] * (n - 1) + [3], 0.4), model=model, optimizer=optimizer, n=n)


def test_one_examples_own_divisor_is_no_measure_for_others():
    """A mean over its own tokens, in a loop, where micro-batches have one example each."""
    model, optimizer = step(in_a_loop([4], 1 / 4), n=1)
    for lengths, share in (([5], 1 / 5), ([2, 3], 1.0), ([7], 1 / 7), ([3, 3], 1.0)):
        step(in_a_loop(lengths, share), model=model, optimizer=optimizer, n=len(lengths))
    assert optimizer.ledger.steps == 5


def test_each_loss_is_compared_with_its_like():
    """Two losses by turns are right, each with a weight of its own; that one of them changes is seen."""
    losses = (lambda out, y: F.cross_entropy(out, y), lambda out, y: 0.5 * out.square().mean())
    model, optimizer = step(losses[0])
    for loss in (losses[1], losses[0], losses[1]):
        step(loss, model=model, optimizer=optimizer)
    with pytest.raises(IsolationError, match="weighs an example by 0.1, that of an earlier one by 0.166667"):
        step(lambda out, y: 0.3 * out.square().mean(), model=model, optimizer=optimizer)


def test_a_count_inside_the_mean_is_refused_at_once():
    with pytest.raises(IsolationError, match="multiplied by 0.0131579, which looks like a count"):
        step(lambda out, y: (F.cross_entropy(out, y, reduction="none") / 76).mean())
    step(lambda out, y: (F.cross_entropy(out, y, reduction="none") / 20).mean())


def test_the_order_in_which_terms_are_added_is_nothing():
    model, optimizer = step(lambda out, y: 0.3 * out[:, :1].square().mean() + 0.7 * out[:, 1:].square().mean())
    step(
        lambda out, y: 0.7 * out[:, 1:].square().mean() + 0.3 * out[:, :1].square().mean(),
        model=model,
        optimizer=optimizer,
    )
    assert optimizer.ledger.steps == 2


def test_a_sum_is_refused_even_after_a_batch_of_one():
    """Of one example mean and sum are the same."""
    model, optimizer = step(SUMS["cross entropy"], n=1)
    with pytest.raises(IsolationError, match="weighs an example by 2, that of an earlier one by 1"):
        step(SUMS["cross entropy"], model=model, optimizer=optimizer, n=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEANS)
def test_means_are_taken_in_batches_of_any_size(name):
    model, optimizer = step(MEANS[name])
    for n in (5, 1, 7, 2):
        step(MEANS[name], model=model, optimizer=optimizer, n=n)
    assert optimizer.ledger.steps == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", SUMS)
def test_sums_are_taken_in_batches_of_any_size(name):
    model, optimizer = step(SUMS[name], reduction="sum")
    for n in (5, 1, 7, 2):
        step(SUMS[name], reduction="sum", model=model, optimizer=optimizer, n=n)
    assert optimizer.ledger.steps == 5


def test_a_public_constant_may_stay():
    model, optimizer = step(loss := lambda out, y: 0.3 * F.cross_entropy(out, y))
    step(loss, model=model, optimizer=optimizer, n=5)
    assert optimizer.ledger.steps == 2


def test_a_mean_over_tokens_of_a_batch_of_another_width_is_refused():
    model = nn.Sequential(DPLinear(6, 3)).train()
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    model(torch.randn(4, 5, 6)).square().mean().backward()
    optimizer.step()
    with pytest.raises(IsolationError, match="weighs an example"):
        model(torch.randn(4, 7, 6)).square().mean().backward()
