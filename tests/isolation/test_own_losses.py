"""Losses that a model computes itself: what they are divided by before they are joined, and what they choose."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.check import check_isolation
from tests.models import assert_refuses, examples, mlp
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
            "tokens": lambda: divided.sum(),
            "rows": lambda: (losses.sum(1) / self.count).sum(),
            "rows of tokens": lambda: divided.sum(1).sum(),
            "before a mask": lambda: (divided * used).sum(),
            "times": lambda: (losses * (1 / self.count)).sum(),
            "a tensor": lambda: (losses / torch.tensor(self.count)).sum(),
            "a mean of rows": lambda: divided.sum(1).mean(),
            "a vector": lambda: divided.sum(1),
            "a vector before a mask": lambda: (divided * used).sum(1),
        }[self.way]()


WAYS = {
    "tokens": "sum",
    "rows": "sum",
    "rows of tokens": "sum",
    "before a mask": "sum",
    "times": "sum",
    "a tensor": "sum",
    "a mean of rows": "mean",
    "a vector": "mean",
    "a vector before a mask": "mean",
}


def tokens(*lengths: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    labels = torch.randint(3, (len(lengths), 8), generator=generator)
    return (
        torch.randn(len(lengths), 8, 4, generator=generator),
        labels.where(torch.arange(8) < torch.tensor(lengths).unsqueeze(1), -100),
    )


@pytest.mark.slow
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
        optimizer.batch.expect(len(batch[0]))
        optimizer.step()
        optimizer.zero_grad()

    first, second = tokens(5, 5, 5, 5, 5, 5), tokens(2, 8, 5, 6, 3)
    for batch in (first, second, first):  # a constant, in batches of other sizes
        step(batch, 40.0)
    assert_refuses(
        IsolationError,
        "by 0.0416667 in this batch, by 0.025 in an earlier one",
        lambda: step(second, float((second[1] >= 0).sum())),
    )


# What only many do to each other

MANY = 30


def each(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none")


def hardest(out: Tensor, y: Tensor, kept: int = 16) -> Tensor:
    losses = each(out, y)
    return losses * (losses >= losses.detach().sort(descending=True).values[min(kept, len(y)) - 1])


def of_a_class(out: Tensor, y: Tensor) -> Tensor:
    """At most the first four of each class."""
    return each(out, y) * (F.one_hot(y, 3).cumsum(0).gather(1, y[:, None])[:, 0] <= 4)


def mined(out: Tensor, y: Tensor) -> Tensor:
    """The hardest of the others, as many as there are of class 2 and at least eight: single-shot detection."""
    losses, positive = each(out, y), y == 2
    rank = losses.detach().masked_fill(positive, -1).argsort(descending=True).argsort()
    return losses * (positive | (rank < max(int(positive.sum()), 8)))


CHOOSING = {"hardest": hardest, "of a class": of_a_class, "mined": mined}
HARMLESS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "each": each,
    "focal": lambda out, y: each(out, y) * (1 - (-each(out, y)).exp()).square(),
    "above a threshold": lambda out, y: each(out, y) * (each(out, y).detach() > 1),
    "its own hardest class": lambda out, y: out.topk(1, dim=1).values[:, 0].square(),
}


class Own(nn.Module):
    """Returns its loss, as Transformers' models do, or that alone."""

    def __init__(self, losses: Callable[[Tensor, Tensor], Tensor], reduction: str = "mean", alone: bool = False):
        super().__init__()
        self.inner, self.losses, self.reduction, self.alone = mlp(), losses, reduction, alone

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.inner(x)
        losses = self.losses(logits, labels)
        loss = losses.mean() if self.reduction == "mean" else losses.sum()
        return loss if self.alone else {"loss": loss, "logits": logits}


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CHOOSING)
def test_a_loss_of_the_models_own_that_chooses_among_many_is_refused(name, reduction, alone):
    """Four examples of a trial are all chosen."""
    model = Own(CHOOSING[name], reduction, alone)
    make_private(model, batch_size=MANY, loss_reduction=reduction)
    x, y = examples(MANY)
    assert_refuses(IsolationError, "The loss mixes examples: what example", lambda: model(x, y))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", HARMLESS)
def test_a_loss_of_the_models_own_by_which_each_example_decides_for_itself_is_taken(name, reduction):
    for n in (5, 6, 7, MANY):
        model, (x, y) = Own(HARMLESS[name], reduction), examples(n)
        optimizer = make_private(model, batch_size=n, loss_reduction=reduction)
        model(x, y)["loss"].backward()
        optimizer.batch.expect(n)
        optimizer.step()


@pytest.mark.slow
def test_the_last_to_be_chosen_is_found_whichever_examples_are_drawn():
    x, y = examples(17)
    for _ in range(8):
        assert_refuses(
            IsolationError, "is another in a batch of 17", lambda: check_isolation(Own(hardest).train(), (x, y), {}, 17)
        )


@pytest.mark.slow
@pytest.mark.parametrize("declared", ["mean", "sum", None])
@pytest.mark.parametrize("name", [*CHOOSING, *HARMLESS])
def test_a_criterion_of_single_examples_that_chooses_among_many_is_refused(name, declared):
    x, y = examples(MANY)
    losses = {**CHOOSING, **HARMLESS}[name]

    def check() -> None:
        check_isolation(mlp(), (x,), {}, MANY, targets=y, criterion=losses, reduction=declared)

    if name in CHOOSING:
        assert_refuses(IsolationError, "The loss mixes examples: what example", check)
    else:
        check()


@pytest.mark.slow
@pytest.mark.parametrize(("reduction", "n"), [("mean", MANY), ("sum", MANY), (None, MANY), (None, 5)])
def test_a_scalar_criterion_that_chooses_among_many_is_refused(reduction, n):
    x, y = examples(n)

    def joined(losses: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda out, y: losses(out, y).sum() if reduction == "sum" else losses(out, y).mean()

    def check(losses: Callable[[Tensor, Tensor], Tensor]) -> None:
        check_isolation(mlp(), (x,), {}, n, targets=y, criterion=joined(losses), reduction=reduction)

    check(each)
    assert_refuses(
        IsolationError, "The loss mixes examples: what example", lambda: check(lambda out, y: hardest(out, y, kept=4))
    )


class Two(nn.Module):
    """Returns two losses, the second of which chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.inner(x)
        return each(out, y).mean(), hardest(out, y).mean()


@pytest.mark.slow
def test_a_further_loss_that_chooses_among_many_is_refused_once_it_is_used():
    model, (x, y) = Two(), examples(MANY)
    optimizer = make_private(model, batch_size=MANY)
    model(x, y)[0].backward()
    optimizer.batch.expect(MANY)
    optimizer.step()
    optimizer.zero_grad()
    assert check_isolation(model, (x, y), {}, MANY, reduction="mean").losses == {0}
    assert_refuses(IsolationError, "was not found to be a mean or sum over examples", lambda: model(x, y)[1].backward())


def test_a_values_difference_without_a_gradient_is_seen_in_a_criterion():
    x, y = examples(MANY)
    assert_refuses(
        IsolationError,
        "The loss mixes examples: what example",
        lambda: check_isolation(
            mlp(), (x,), {}, MANY, targets=y, criterion=lambda out, y: each(out, y) + float(len(y) > 8)
        ),
    )


def test_without_a_loss_no_gradient_of_many_is_taken():
    """Losses outside of the model are followed by their graphs: a trial of these costs what it did."""
    counts: list[int] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            if len(x) > 4:
                counts.append(len(x))
                out.register_hook(lambda _: counts.append(-1))
            return out

    check_isolation(Counting().train(), (examples(MANY)[0],), {}, MANY)
    assert counts == [MANY, 7]


def test_the_gradients_of_many_leave_no_trace():
    model, (x, y) = Own(each), examples(MANY)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    check_isolation(model.train(), (x, y), {}, MANY, reduction="mean")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))


def test_a_loss_that_chooses_among_more_than_the_first_batches_held_is_refused():
    model = Own(hardest)
    optimizer = make_private(model, batch_size=10)
    for n in (10, 9, 11):
        x, y = examples(n)
        model(x, y)["loss"].backward()
        optimizer.batch.expect(n)
        optimizer.step()
        optimizer.zero_grad()
    x, y = examples(MANY)
    assert_refuses(IsolationError, "is another in a batch of 30", lambda: model(x, y))


def test_parts_of_a_batch_hold_two_examples_at_least():
    """One alone is a case of its own in many losses."""
    sizes: list[int] = []

    def noted(out: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(y))
        return each(out, y)

    for n, parts in ((5, [5, 4, 2]), (6, [6, 4, 2])):
        sizes.clear()
        x, y = examples(n)
        check_isolation(mlp(), (x,), {}, n, targets=y, criterion=noted)
        found = [sizes[place:] for place in range(len(sizes)) if sizes[place] == n]
        assert found[0][:3] == parts


class Checkpointed(nn.Module):
    """Drops in what backward computes again, and has a loss of its own."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.inner, self.reentrant = mlp(), reentrant

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = checkpoint(lambda x: F.dropout(self.inner(x), 0.5), x.requires_grad_(), use_reentrant=self.reentrant)
        return each(out, y).mean()


@pytest.mark.parametrize("reentrant", [True, False])
def test_nothing_is_drawn_where_many_are_computed_again(reentrant):
    x, y = examples(MANY)
    assert check_isolation(Checkpointed(reentrant).train(), (x, y), {}, MANY, reduction="mean").losses == {0}
