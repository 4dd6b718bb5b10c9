"""Models that put the examples, or the rows of all, into another order where a batch holds something short."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_dp.engine.hooks
from lora_dp import DPLinear, IsolationError
from tests.models import assert_refuses
from tests.support import training_forwards

WIDTH, WORDS = 8, 50


class Sorting(nn.Module):
    """Sorts texts by length for an LSTM, as tutorials do, with a private layer in between, and puts them back."""

    def __init__(self, inside: bool):
        super().__init__()
        torch.manual_seed(0)
        self.inside = inside
        self.words = nn.Embedding(WORDS, 6).requires_grad_(False)
        self.inner, self.head = DPLinear(6, 6), DPLinear(8, 3)
        self.reads = nn.LSTM(6, 8, batch_first=True).requires_grad_(False)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        lengths = (ids > 0).sum(1).clamp(min=1)
        order = lengths.argsort(descending=True, stable=True)
        hidden = self.words(ids[order] if self.inside else ids)
        hidden = self.inner(hidden).tanh()
        hidden = hidden if self.inside else hidden[order]
        packed = nn.utils.rnn.pack_padded_sequence(hidden, lengths[order], batch_first=True)
        return self.head(self.reads(packed)[1][0][0][order.argsort()])


def texts(n: int, *short: int) -> Tensor:
    ids = torch.randint(1, WORDS, (n, WIDTH), generator=torch.Generator().manual_seed(n))
    for row, length in enumerate(short):
        ids[n - 1 - row, length:] = 0
    return ids


@pytest.fixture(autouse=True)
def no_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_dp.engine.hooks, "drawn_for_test", lambda: False)


@pytest.mark.parametrize("short", [3, 1])
@pytest.mark.parametrize("shown", ["nowhere", "additive", "of attention"])
def test_a_layer_between_sorting_and_putting_back_is_refused_once_a_text_is_short(shown: str, short: int) -> None:
    """In batches of full texts the order is as it was."""

    def batch(ids: Tensor) -> tuple[Tensor, ...]:
        mask = torch.where(ids > 0, 0.0, -1e9)
        return {"nowhere": (ids,), "additive": (ids, mask), "of attention": (ids, mask[:, None, None])}[shown]

    call = training_forwards(Sorting(inside=True))
    for n in (9, 14, 8):
        call(*batch(texts(n)))
    ids = texts(12, short).flip(0)
    assert_refuses(IsolationError, "attributed to", lambda: call(*batch(ids)))


def test_layers_outside_of_the_sorting_are_taken() -> None:
    call = training_forwards(Sorting(inside=False))
    for ids in (texts(9), texts(12, 3).flip(0), texts(10, 3, 5, 1)):
        call(ids)


class Clips(nn.Module):
    """A mean over the clips of each recording, which an index names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = DPLinear(6, 8), DPLinear(8, 3)

    def forward(self, labels: Tensor, clips: Tensor, of: Tensor) -> Tensor:
        hidden = self.inner(clips).tanh()
        return self.head(torch.zeros(len(labels), 8).index_add(0, of, hidden) / 4)


def recordings(n: int, order: Any) -> tuple[Tensor, Tensor, Tensor]:
    of = torch.arange(n).repeat_interleave(4)[order]
    return torch.arange(n), torch.randn(4 * n, 6), of


def test_rows_that_stand_in_another_order_in_a_later_batch_are_refused() -> None:
    """As many of each example as before; a short clip comes last."""
    call = training_forwards(Clips())
    for n in (6, 9):
        call(*recordings(n, torch.arange(4 * n)))
    order = [*itertools.chain(range(5), range(6, 32)), 5]
    assert_refuses(IsolationError, "attributed to", lambda: call(*recordings(8, torch.tensor(order))))


def test_rows_in_order_are_taken_in_every_batch() -> None:
    call = training_forwards(Clips())
    for n in (6, 9, 8):
        call(*recordings(n, torch.arange(4 * n)))
