"""Predictions that are broadcast to all targets pair each example with all others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_dp import DPLinear, IsolationError
from tests.isolation.loss_checks.outside_losses import N
from tests.models import assert_refuses
from tests.support import make_private

PAIRS = {
    "mse": lambda p, y: F.mse_loss(p, y),
    "smooth": lambda p, y: F.smooth_l1_loss(p, y),
    "by hand": lambda p, y: (p - y).square().mean(),
    "vector": lambda p, y: (p - y).square().mean(1),
    "at rest": lambda p, y: (p - y - 1e3).relu().mean(1),
    "vector of sums": lambda p, y: F.mse_loss(p, y, reduction="none").sum(1),
}


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, N])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shapes", ["(N, 1) and (N,)", "(N,) and (N, 1)", "alike"])
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_predictions_that_are_broadcast_to_all_targets_are_refused(name, shapes, n):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4).requires_grad_(False), DPLinear(4, 1)).train()
    if shapes == "(N,) and (N, 1)":
        model.append(nn.Flatten(0))
    optimizer = make_private(model, batch_size=N)

    def step() -> None:
        p, y = model(torch.randn(n, 6)), torch.randn(n)
        loss = PAIRS[name](p, y.view(-1, 1) if shapes != "(N, 1) and (N,)" else y)
        loss.backward() if loss.dim() == 0 else optimizer.backward(loss)

    if shapes == "alike":
        step()
    else:
        assert_refuses(IsolationError, "", step)


def test_predictions_that_are_broadcast_after_a_batch_of_one_are_refused():
    """Of one example there is nobody to be paired with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4).requires_grad_(False), DPLinear(4, 1)).train()
    optimizer = make_private(model, batch_size=N)

    def backward(n: int) -> None:
        optimizer.backward((model(torch.randn(n, 6)) - torch.randn(n)).square().sum(1))
        optimizer.zero_grad()

    backward(1)
    assert_refuses(IsolationError, "pair each example with all others", lambda: backward(N))


def test_a_dimension_that_is_as_large_as_one_batch_by_chance_is_taken():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4).requires_grad_(False), DPLinear(4, 1)).train()
    optimizer = make_private(model, batch_size=N)
    for n in (4, N, 5):
        optimizer.batch.expect(n)
        optimizer.backward((model(torch.randn(n, 6)) - torch.linspace(0, 1, N)).square().sum(1))
        optimizer.step()
    assert optimizer.ledger.steps == 3
