"""A batch of more examples than any before may show what fewer do not do to each other."""

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_dp.engine.hooks
from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.batches.sizes import Sizes
from lora_dp.isolation.check import check_larger
from tests.models import assert_refuses, examples, mlp
from tests.support import make_private, training_forwards


@pytest.fixture(autouse=True)
def no_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_dp.engine.hooks, "drawn_for_test", lambda: False)


@pytest.fixture
def larger(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of examples of those batches."""
    found: list[int] = []
    check = lora_dp.engine.hooks.check_larger
    monkeypatch.setattr(
        lora_dp.engine.hooks,
        "check_larger",
        lambda *args, **options: (found.append(args[3]), check(*args, **options))[1],
    )
    return found


def first_come(out: Tensor, y: Tensor) -> Tensor:
    return out * (torch.arange(len(out)) < 24).unsqueeze(1)


def by_score(out: Tensor, y: Tensor) -> Tensor:
    score = out[:, 0].detach()
    return out * (score >= score.sort(descending=True).values[min(24, len(out)) - 1]).unsqueeze(1)


def hardest(out: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(out, y, reduction="none")
    return losses * (losses >= losses.detach().sort(descending=True).values[min(24, len(y)) - 1])


def hardest_mean(out: Tensor, y: Tensor) -> Tensor:
    return hardest(out, y).mean()


def each(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none")


def each_mean(out: Tensor, y: Tensor) -> Tensor:
    return each(out, y).mean()


class Model(nn.Module):
    def __init__(self, of: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.inner, self.of = mlp(), of

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.of(self.inner(x), y)


def private(model: nn.Module) -> Callable[[int], None]:
    call = training_forwards(model, batch_size=18)
    return lambda n: call(*examples(n, seed=n))


@pytest.mark.slow
@pytest.mark.parametrize("of", [first_come, by_score, hardest, hardest_mean])
def test_what_only_more_examples_do_to_each_other_is_refused(of: Any, larger: list[int]) -> None:
    for n in (26, 28, 31):
        call = private(Model(of))
        for first in (18, 20, 19, 22):
            call(first)
        assert_refuses(IsolationError, "example", functools.partial(call, n))
    assert larger == [20, 22, 26, 20, 22, 28, 20, 22, 31]


@pytest.mark.parametrize("of", [each, each_mean, lambda out, y: out])
def test_each_record_is_tried_once(of: Any, larger: list[int]) -> None:
    call = private(Model(of))
    for n in (5, 3, 9, 7, 9, 12, 11, 0, 13):
        call(n)
    # With a loss of the model's own, nine and five are two kinds of batches.
    assert larger == ([12, 13] if of is each_mean else [9, 12, 13])


def test_a_batch_has_to_be_larger_by_a_sixteenth(larger: list[int]) -> None:
    call = private(Model(each))
    for n in (32, 33, 34, 35, 37, 36, 38, 42):
        call(n)
    assert larger == [35, 38, 42]


def test_up_to_four_are_tried_as_they_are(larger: list[int]) -> None:
    call = private(Model(each))
    for n in (1, 2, 4, 3, 4):
        call(n)
    assert larger == []


def test_nothing_is_compared_where_sizes_are_fixed_or_a_model_draws_elsewhere(larger: list[int]) -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = DPLinear(6, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.inner(x * (1 + random.random()))

    call = private(Drawing())
    for n in (5, 9):
        call(n)
    model = Model(each)
    optimizer = make_private(model.train(), batch_size=5)
    optimizer.recorder.sizes_fixed = True
    for n in (5, 7):
        model(*examples(n))
        optimizer.recorder.discard()
    assert larger == []


def test_the_last_to_come_is_always_compared() -> None:
    for _ in range(4):
        assert_refuses(
            IsolationError,
            "example 11",
            functools.partial(private(Model(lambda out, y: out * (torch.arange(len(out)) < 11).unsqueeze(1))), 12),
        )


class Parted(nn.Module):
    """Rows of the examples, one of each or two."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, y: Tensor, rows: Tensor) -> Tensor:
        return self.inner(rows).view(len(y), -1, 3).mean(1)


def test_rows_of_all_in_one_tensor_are_not_taken_by_example() -> None:
    x, y = examples(12)
    call = ((y[:6], x), {}, None)
    seen = Sizes().look(call, 6)
    assert check_larger(Parted().train(), *call[:2], 6, reduction=None, losses=frozenset({3}), seen=seen) == {3}


def test_batches_are_forgotten_where_a_model_is_made_private_anew(larger: list[int]) -> None:
    model = Model(first_come)
    call = private(model)
    for n in (5, 9):
        call(n)
    call = private(model)
    for n in (5, 9):
        call(n)
    assert larger == [9, 9]
