"""Batches of one example: what can be tried of them, is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from tests.isolation.text_models import VOCABULARY, Pooling, Scaled, scaled, texts
from tests.models import assert_refuses
from tests.support import make_private


def test_a_count_is_refused_in_micro_batches_of_one():
    """A batch of one has nobody to meet, but its loss may be divided by what the logical batch holds."""
    model = Scaled().train()
    optimizer = make_private(model, batch_size=4, loss_reduction="sum")
    model(**scaled(1, 30.0))
    optimizer.recorder.discard()
    model(**scaled(1, 30.0, seed=2))
    optimizer.recorder.discard()
    with pytest.raises(IsolationError, match=r"The argument \S*\['tokens'\] of the model differs from batch to batch"):
        model(**scaled(1, 31.0))


class Keeps(nn.Module):
    """A running mean of what it was given, in a buffer."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(VOCABULARY, 6).requires_grad_(False), DPLinear(6, 3)
        self.register_buffer("kept", torch.zeros(6))
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.counts = counts

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids).mean(1)
        self.passes += 1
        if not self.counts:
            self.kept.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.head(x)


@pytest.mark.parametrize("counts", [True, False])
def test_a_buffer_that_takes_up_the_only_example_is_refused(counts):
    torch.manual_seed(0)
    model = Keeps(counts).train()
    make_private(model, batch_size=1)
    x = torch.randint(VOCABULARY, (1, 5))
    if counts:
        model(x)
    else:
        assert_refuses(IsolationError, "The buffer 'kept' takes up statistics", lambda: model(x))


def test_a_model_that_takes_no_other_numbers_than_the_only_examples_is_left_alone():
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = DPLinear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.max() > 1:
                raise ValueError("no share")
            return self.head(x)

    model = Shares().train()
    make_private(model, batch_size=1)
    model(torch.linspace(0, 1, 6).unsqueeze(0))


@pytest.mark.parametrize("masked", [True, False])
def test_padding_is_tried_in_micro_batches_of_one(masked):
    """Padded by the loader to the longest text of the whole batch."""
    torch.manual_seed(0)
    model = Pooling(masked=masked).train()
    optimizer = make_private(model, batch_size=1)
    optimizer.recorder.expect_padding()
    batch = texts(9, 4)
    batch = {name: tensor[1:] for name, tensor in batch.items() if masked or name == "input_ids"}
    if masked:
        model(**batch)
    else:
        assert_refuses(IsolationError, "changes with the padding", lambda: model(**batch))


def test_losses_at_the_padding_of_the_only_example_are_refused():
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(VOCABULARY, 6).requires_grad_(False), DPLinear(6, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.words(input_ids))

    def sum_of_squares(own: bool) -> None:
        model = Tagger().train()
        optimizer = make_private(model, batch_size=1)
        optimizer.recorder.expect_padding()
        batch = {name: tensor[1:] for name, tensor in texts(9, 4).items()}
        losses = model(**batch).square().sum(2)
        weights = batch["attention_mask"] if own else torch.ones_like(batch["attention_mask"])
        optimizer.backward((losses * weights).sum(1))

    sum_of_squares(own=True)
    assert_refuses(IsolationError, "outputs at padding", lambda: sum_of_squares(own=False))


def test_of_one_example_nothing_is_tried_that_takes_two():
    """Whoever goes through a batch one by one may have a model that mixes examples: they do not meet."""
    model, optimizer = mixing()
    model(torch.randn(1, 6))
    optimizer.recorder.discard()
    assert_refuses(IsolationError, "example", lambda: model(torch.randn(2, 6)))


def mixing() -> tuple[nn.Module, Any]:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = DPLinear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + x.sum(0))

    model = Mixing().train()
    return model, make_private(model, batch_size=2)
