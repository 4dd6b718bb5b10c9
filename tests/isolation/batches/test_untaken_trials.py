"""Trials that a model does not take: refused once what they would try varies."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from tests.isolation.text_models import run, texts
from tests.support import make_private

WORDS = 40


class Exact(nn.Module):
    """Refuses what does not fit the plain numbers that it is given beside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.inner, self.head = nn.Embedding(WORDS, 8).requires_grad_(False), DPLinear(8, 8), DPLinear(8, 3)

    def forward(self, input_ids: Tensor, places: list[str]) -> Tensor:
        if len(places) != input_ids.shape[1]:
            raise ValueError("another width")
        return self.head(self.inner(self.words(input_ids)).tanh().mean(1))


def test_padding_that_varies_and_cannot_be_tried_is_refused():
    def exact(*lengths: int, width: int | None = None) -> dict[str, Any]:
        ids = texts(*lengths, width=width)["input_ids"]
        return {"input_ids": ids, "places": ["a place"] * ids.shape[1]}

    with pytest.raises(IsolationError, match="takes none of the same examples with less padding.*to one public width"):
        run(Exact(), exact(9, 4, 3, 6), exact(8, 4, 3, 6))
    run(Exact(), exact(9, 4, 3, 6), exact(8, 4, 3, 6, width=9), exact(4, 4, 3, 2, width=9))


def test_padding_that_the_loader_told_of_is_refused_once_it_varies():
    """Until then it may be of what the model is not given."""
    model = Exact().train()
    optimizer = make_private(model, batch_size=4)
    optimizer.recorder.expect_padding()
    ids = texts(9, 4, 3, 6)["input_ids"]
    for _ in range(2):
        model(ids, ["a place"] * 9)
        optimizer.recorder.discard()
    with pytest.raises(IsolationError, match="takes none of the same examples with less padding"):
        model(ids[:, :8], ["a place"] * 8)


class Short(Exact):
    """Takes texts of five words and more, as a convolution does."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        if input_ids.shape[1] < 5:
            raise ValueError("too short")
        return super().forward(input_ids, [""] * input_ids.shape[1])


def test_one_token_less_is_tried_where_a_model_needs_some():
    with pytest.raises(IsolationError, match="changes with the padding of the batch"):
        run(Short(), *[{"input_ids": texts(*lengths)["input_ids"]} for lengths in ((7, 3, 2, 7), (6, 3, 2, 3))])


class Blocks(Exact):
    """Takes texts in blocks of four words."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,  # type: ignore[override]
        labels: Tensor,
    ) -> Tensor:
        if input_ids.shape[1] % 4:
            raise ValueError("no whole block")
        used = attention_mask.unsqueeze(2)
        return self.head((self.inner(self.words(input_ids)).tanh() * used).sum(1) / used.sum(1))


def test_padding_that_one_tensor_shows_need_not_be_tried_by_another():
    """By the mask a block can be left out, by labels of all but two words none."""

    def blocks(width: int) -> dict[str, Tensor]:
        labels = torch.zeros(4, width, dtype=torch.long)
        labels[:, width - 2 :] = -100
        return {**texts(width, 3, 2, width), "labels": labels}

    run(Blocks(), blocks(16), blocks(12))


class Counted(nn.Module):
    """Rows of all examples and how many each has, in a tuple; of some numbers of examples alone."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.inner, self.most = DPLinear(6, 3), most

    def forward(self, labels: Tensor, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        assert len(counts) == len(labels) < self.most
        return torch.stack([part.mean(0) for part in self.inner(rows).split(list(counts))]) + 0 * labels.unsqueeze(1)


def test_a_number_of_examples_that_varies_and_cannot_be_tried_is_refused():
    def counted(n: int) -> dict[str, Any]:
        return {"labels": torch.arange(n), "rows": torch.randn(2 * n, 6), "counts": (2,) * n}

    run(Counted(8), counted(4), counted(4))  # one structure, in which it is wanted from the second number on
    run(Counted(11), counted(4), counted(5))
    with pytest.raises(IsolationError, match="does not take every example of this one twice.*whose first dimension is"):
        run(Counted(8), counted(4), counted(5))


class Sideways(nn.Module):
    """Given something of each example along another dimension than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = DPLinear(6, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(x / (1 + lengths.max())) if lengths.dim() == 2 else self.head(x)


@pytest.mark.parametrize(
    ("lengths", "place"),
    [(lambda n: torch.ones(1, n), 1), (lambda n: torch.ones(2, n), 1), (lambda n: torch.ones(3, 1, n), 2)],
)
def test_examples_in_another_dimension_are_refused_once_it_follows_their_number(lengths, place):
    model = Sideways().train()
    optimizer = make_private(model, batch_size=8)
    for n in (8, 8):
        model(torch.randn(n, 6), lengths(n))
        optimizer.recorder.discard()
    with pytest.raises(IsolationError, match=rf"as long as the batch in dimension {place}"):
        model(torch.randn(9, 6), lengths(9))
