"""Losses over the padded width: refused once it varies, unless each is of its example's own tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from lora_dp.losses import causal_lm_loss
from tests.models import texts
from tests.support import make_private


class Wide(nn.Module):
    """One score for each token, of it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DPLinear(4, 1)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(x)[..., 0]


WIDTH_LOSSES = {
    "mean over the width": lambda out, mask: (out.square() * mask).mean(1),
    "softmax over the width": lambda out, mask: F.cross_entropy(
        out, torch.zeros(len(out), dtype=torch.long), reduction="none"
    ),
    "padding counts": lambda out, mask: out.square().sum(1),
}
OWN_LOSSES = {
    "sum": lambda out, mask: (out.square() * mask).sum(1),
    "mean over its own": lambda out, mask: (out.square() * mask).sum(1) / mask.sum(1),
    "softmax over its own": lambda out, mask: F.cross_entropy(
        out.masked_fill(mask == 0, -1e9), torch.zeros(len(out), dtype=torch.long), reduction="none"
    ),
    "a loop": lambda out, mask: torch.stack([out[i, : int(mask[i].sum())].square().mean() for i in range(len(out))]),
}


def of_widths(loss, *widths: int) -> None:
    model = Wide().train()
    optimizer = make_private(model, batch_size=4)
    x, mask = texts(8, 4, 2, 3)
    for width in widths:
        x = F.pad(x[:, :8], (0, 0, 0, width - 8))
        mask = F.pad(mask[:, :8], (0, width - 8))
        optimizer.batch.expect(4)
        optimizer.backward(loss(model(x, mask), mask))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", WIDTH_LOSSES)
def test_losses_that_look_at_the_padded_width_are_refused_once_it_varies(name):
    of_widths(WIDTH_LOSSES[name], 8, 8)
    with pytest.raises(IsolationError, match="at padding|weighs an example by"):
        of_widths(WIDTH_LOSSES[name], 8, 9, 10)


@pytest.mark.parametrize("name", OWN_LOSSES)
def test_losses_over_an_examples_own_tokens_are_taken_at_any_width(name):
    of_widths(OWN_LOSSES[name], 8, 9, 12)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (1, 4)])
def test_token_losses_of_a_single_example_are_divided_by_its_own_count(sizes):
    """(1,) holds that example's own count of tokens, no number of the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6).requires_grad_(False), DPLinear(6, 9)).train()
    optimizer = make_private(model, batch_size=4)
    for n, length in zip(sizes, (13, 7), strict=True):
        ids = torch.randint(9, (n, 16))
        labels = ids.clone()
        labels[:, length:] = -100
        optimizer.batch.expect(n)
        optimizer.backward(causal_lm_loss(model(ids), labels, reduction="mean"))
        optimizer.step()
    assert optimizer.ledger.steps == 2
