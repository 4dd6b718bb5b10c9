"""Losses that a model computes itself: by what they are divided before they are joined, and what they choose of many."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from lora_dp.loss_graph import own_scales
from tests.models import assert_refuses
from tests.support import make_private

N = 6


class Tokens(nn.Module):
    """(N, T, 4) and labels (N, T), −100 for none → the losses of tokens, divided by an attribute and joined."""

    def __init__(self, way: str):
        super().__init__()
        self.inner, self.way, self.count = DPLinear(4, 3), way, 1.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(self.inner(x).transpose(1, 2), y, reduction="none", ignore_index=-100)
        divided, used = losses / self.count, (y >= 0).float()
        return {
            "tokens": lambda: divided.sum(), "rows": lambda: (losses.sum(1) / self.count).sum(),
            "rows of tokens": lambda: divided.sum(1).sum(), "before a mask": lambda: (divided * used).sum(),
            "times": lambda: (losses * (1 / self.count)).sum(), "a tensor": lambda: (
                losses / torch.tensor(self.count)).sum(), "a mean of rows": lambda: divided.sum(1).mean(),
            "a vector": lambda: divided.sum(1), "a vector before a mask": lambda: (divided * used).sum(1),
        }[self.way]()


WAYS = {"tokens": "sum", "rows": "sum", "rows of tokens": "sum", "before a mask": "sum", "times": "sum",
        "a tensor": "sum", "a mean of rows": "mean", "a vector": "mean", "a vector before a mask": "mean"}


def tokens(*lengths: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    labels = torch.randint(3, (len(lengths), 8), generator=generator)
    return (torch.randn(len(lengths), 8, 4, generator=generator),
            labels.where(torch.arange(8) < torch.tensor(lengths).unsqueeze(1), -100))


@pytest.mark.parametrize("way", WAYS)
def test_a_count_by_which_a_models_own_losses_are_divided_before_they_are_joined_is_refused(way):
    model = Tokens(way).train()
    optimizer = make_private(model, batch_size=N, loss_reduction=WAYS[way])

    def step(batch: tuple[Tensor, Tensor], count: float) -> None:
        model.count = count
        loss = model(*batch)
        if loss.dim():
            optimizer.backward(loss)
        else:
            loss.backward()
        optimizer.expect_batch(len(batch[0]))
        optimizer.step()
        optimizer.zero_grad()

    first, second = tokens(5, 5, 5, 5, 5, 5), tokens(2, 8, 5, 6, 3)
    for batch in (first, second, first):  # a constant, in batches of other sizes
        step(batch, 40.0)
    assert_refuses(IsolationError, "by 0.0416667 in this batch, by 0.025 in an earlier one",
                   lambda: step(second, float((second[1] >= 0).sum())))


def rows(n: int = N) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(0)).requires_grad_() * torch.ones(n, 3)


@pytest.mark.parametrize(("loss", "scales"), [
    (lambda out: (out.square() / 8).sum(1).mean(), [1 / 8]), (lambda out: out.square().sum(1).mean() / 8, []),
    (lambda out: (3 * (out.square() / 8)).sum(), [1 / 8, 3]), (lambda out: (out / 8).exp().sum(1), [1 / 8]),
    (lambda out: (out * 2).sum(1) / torch.arange(1.0, N + 1), [2]),
    (lambda out: F.linear(out / 8, torch.ones(2, 3)).square().mean(), []),  # the network's own
    (lambda out: torch.stack([row.sum() / (i + 2) for i, row in enumerate(out)]), []),  # each example's own
    (lambda out: torch.stack([out.sum(1) / 3, out.mean(1) / 5]).mean(), [1 / 5, 1 / 3]),
    (lambda out: out.detach().sum(), [])])
def test_by_what_losses_of_the_models_own_are_multiplied_before_they_are_joined(loss, scales):
    assert own_scales(loss(rows()), N) == pytest.approx(scales, rel=1e-5)
