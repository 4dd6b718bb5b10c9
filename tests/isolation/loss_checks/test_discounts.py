"""Discounts over an episode's steps: one series, however many steps there are."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.loss_checks.graph import MixingLoss
from lora_dp.isolation.loss_checks.own_scales import OwnLosses
from tests.isolation.loss_checks.own_losses import N, batch, rows
from tests.models import assert_refuses
from tests.support import make_private


class Rollout(nn.Module):
    """(N, T, 4) → the mean of discounted losses of its T steps."""

    def __init__(self, weigh: Callable[[Tensor], Tensor]):
        super().__init__()
        self.inner, self.weigh = DPLinear(4, 3), weigh

    def forward(self, x: Tensor) -> Tensor:
        return self.weigh(self.inner(x).square().sum(2) / 2).mean()


def discounted(losses: Sequence[Tensor]) -> Tensor:
    return sum((0.8**t * loss for t, loss in enumerate(losses)), torch.zeros(()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "weigh",
    [
        lambda losses: discounted(losses.unbind(1)),
        lambda losses: discounted(losses.t()),
        lambda losses: discounted([losses[:, t] for t in range(losses.shape[1])]),
        lambda losses: torch.stack([0.8**t * losses[:, t] for t in range(losses.shape[1])]).sum(0),
        lambda losses: discounted(losses.unbind(1)) * 0.5 + 0.1 * losses[:, 0],
    ],
)
def test_discounts_over_another_number_of_steps_are_the_same_series(weigh):
    model = Rollout(weigh)
    optimizer = make_private(model.train(), batch_size=N)
    for n, width in ((N, 4), (5, 3), (9, 6), (N, 5), (5, 2)):
        model(batch(n, width)).backward()
        optimizer.batch.expect(n)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.ledger.steps == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "weigh",
    [
        # The first step weighs less where there are more.
        lambda losses: discounted(losses.unbind(1)[::-1]),
        lambda losses: discounted(losses.flip(1).unbind(1)),
        lambda losses: discounted([losses[:, -t - 1] for t in range(losses.shape[1])]),
        lambda losses: discounted([losses[:, t] + losses[:, 0] for t in range(losses.shape[1])]),
        lambda losses: discounted(losses.unbind(1)) * 0.8 ** losses.shape[1],
        lambda losses: discounted(losses.unbind(1)) / losses.shape[1],
        lambda losses: discounted([loss / (t + 1) for t, loss in enumerate(losses.unbind(1))]),
    ],
)
def test_weights_of_steps_that_may_follow_the_width_are_refused(weigh):
    model = Rollout(weigh)
    optimizer = make_private(model.train(), batch_size=N)
    model(batch(N, 4)).backward()
    optimizer.zero_grad()
    assert_refuses(IsolationError, "multiplies the losses", lambda: model(batch(N, 5)).backward())


@pytest.mark.parametrize(
    ("then", "now", "taken"),
    [
        ([1, 0.8, 0.64], [1, 0.8, 0.64, 0.512], True),
        ([1, 0.8], [1, 0.8, 0.64], True),
        ([1], [1, 0.8], False),
        ([], [1 / 8], False),
        ([1, 0.8, 0.64], [1, 0.8, 0.64, 0.5], False),
        ([1, 0.8, 3], [1, 0.8, 0.64, 3], True),
        ([1, 0.8, 3], [1, 0.8, 3, 0.64], False),
        ([1, 0.8, 3], [1, 0.8, 0.64, 4], False),
        ([1, 0.8, 0.64], [0.8, 0.64, 0.512], False),
        ([3, 4], [4, 3], True),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_longer_series_begins_with_the_shorter_one(then, now, taken, turned):
    def losses(shares: list[float]) -> Tensor:
        out = rows().repeat(1, 2)
        return torch.stack([out[:, 5].exp(), *(out[:, t] * share for t, share in enumerate(shares))])

    first, second = map(losses, (now, then) if turned else (then, now))
    known = OwnLosses()
    known.check_numbers(0, first, N)
    known.check_numbers(1, second, N)
    if taken:
        known.check_numbers(0, second, N)
        known.check_numbers(0, first, N)
    else:
        assert_refuses(MixingLoss, "multiplies the losses", lambda: known.check_numbers(0, second, N))
