"""Losses that a backward comes from: what keeps the examples apart is taken, what joins them is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_dp.engine.hooks
from lora_dp import DPLinear, IsolationError
from tests.isolation.loss_checks.outside_losses import MEANS, SUMS, N, OutsideLoss, step
from tests.models import examples, flat, mlp
from tests.support import assert_close, brute_force, clip_and_sum, make_private, private_gradients


def weighted(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, weight=torch.tensor([1.0, 2.0, 3.0]))


def ignoring(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, torch.where(y == y[0], y, torch.full_like(y, -100)))


def contrastive(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out @ out.t(), torch.arange(len(out)))


def check_taken(loss: OutsideLoss, reduction: str) -> None:
    """The step is that of the examples' own gradients, which a batch of one has."""
    model, _ = step(loss, reduction=reduction)
    (x, y), reference = examples(N), mlp()
    names = {name for name, p in reference.named_parameters() if p.requires_grad}
    gradients = brute_force(
        reference,
        lambda m, example: loss(m(example[0].double()), example[1]),
        [(x[i : i + 1], y[i : i + 1]) for i in range(N)],
        names,
    )
    assert_close(flat(private_gradients(model)) * N, flat(clip_and_sum(gradients, "flat", 0.3, str)))


@pytest.mark.slow
@pytest.mark.parametrize("name", MEANS)
def test_means_are_taken_for_what_they_are(name):
    check_taken(MEANS[name], "mean")


@pytest.mark.slow
@pytest.mark.parametrize("name", SUMS)
def test_sums_are_taken_for_what_they_are(name):
    check_taken(SUMS[name], "sum")


@pytest.mark.parametrize(
    ("words", "reduction", "loss"),
    [
        ("declared a mean", "mean", SUMS["cross entropy"]),
        ("declared a mean", "mean", SUMS["mean times N"]),
        ("declared a mean", "mean", lambda out, y: out.square().sum() / 19),
        ("declared a sum", "sum", MEANS["cross entropy"]),
        ("declared a sum", "sum", MEANS["squares over outputs"]),
        ("declared a sum", "sum", MEANS["sum by hand"]),
        ("weighted by classes", "mean", weighted),
        ("the labels that are not ignored", "mean", ignoring),
        ("depends on the model's outputs for others", "mean", contrastive),
        ("depends on the model's outputs for others", "sum", lambda out, y: contrastive(out, y) * len(y)),
        ("'Max'", "mean", lambda out, y: out.max()),
        ("'LinalgVectorNorm'", "mean", lambda out, y: out.norm()),
        ("joins 3 numbers in a batch of 6", "mean", lambda out, y: out.mean(0).square().sum()),
    ],
)
def test_losses_that_join_examples_are_refused(words, reduction, loss):
    with pytest.raises(IsolationError, match=words):
        step(loss, reduction=reduction)


@pytest.mark.parametrize(
    ("words", "loss"),
    [
        ("'Max'", lambda out, y: out.max()),
        ("depends on the model's outputs for others", contrastive),
        ("declared a mean", SUMS["cross entropy"]),
    ],
)
def test_two_examples_can_meet_and_one_cannot(words, loss):
    with pytest.raises(IsolationError, match=words):
        step(loss, n=2)
    assert step(loss, n=1)[1].ledger.steps == 1


@pytest.mark.parametrize("place", [0, N - 1])
def test_a_single_example_that_depends_on_others_is_seen(place):
    """The first or the last: what is mixed by its place is mostly mixed there."""

    def loss(out: Tensor, y: Tensor) -> Tensor:
        alone = torch.arange(N) == place
        return (out.square().sum(1) + alone * out[N // 2].sum()).mean()

    with pytest.raises(IsolationError, match=f"that of example {place} depends"):
        step(loss)


@pytest.mark.parametrize(("n", "place"), [(2, 0), (2, 1), (N, 0), (N, N - 1)])
def test_a_single_example_of_small_weight_that_depends_on_others_is_seen(n, place):
    """Beside the others' own gradients it is nothing, beside its own it is much."""

    def loss(out: Tensor, y: Tensor) -> Tensor:
        weight = torch.where(torch.arange(n) == place, 1e-6, 0.0)
        own = torch.where(weight > 0, weight, 1.0) * out.square().sum(1)
        return (own + weight * out[(place + 1) % n].sum()).mean()

    with pytest.raises(IsolationError, match=f"that of example {place} depends"):
        step(loss, n=n)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_of_no_example_is_a_step(reduction):
    _, optimizer = step(lambda out, y: out.sum(), reduction=reduction, n=0)
    assert optimizer.ledger.steps == 1


def test_outputs_are_found_in_an_object():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=self.inner(x), name="of no use here")

    model = Wrapped().train()
    _, optimizer = step(lambda out, y: F.cross_entropy(out.logits, y), model=model)
    assert optimizer.ledger.steps == 1
    with pytest.raises(IsolationError, match="weighs an example by 6, that of an earlier one by 1"):
        step(lambda out, y: F.cross_entropy(out.logits, y, reduction="sum"), model=model, optimizer=optimizer)


@pytest.mark.parametrize("mixing", [True, False])
def test_a_loss_that_joins_examples_of_flattened_outputs_is_refused(mixing):
    model = nn.Sequential(DPLinear(6, 3), nn.Flatten(0, 1)).train()
    optimizer, x = make_private(model, batch_size=4), torch.randn(4, 5, 6)
    optimizer.batch.expect(4)
    if mixing:
        with pytest.raises(IsolationError, match="depends on the model's outputs for others"):
            contrastive(model(x), x).backward()
    else:
        model(x).square().mean().backward()
        optimizer.step()
    assert optimizer.ledger.steps == (not mixing)


@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("mixing", [False, True])
def test_a_later_loss_whose_graph_tells_nothing_new_is_looked_at_in_secret(mixing, by_example, monkeypatch):
    """What joins the examples may be in the numbers alone."""

    model, (x, _) = mlp(), examples(N)
    optimizer = make_private(model, batch_size=N)

    def backward(matrix: Tensor) -> None:
        optimizer.batch.expect(N)
        losses = (matrix @ model(x)).square().sum(1)
        optimizer.backward(losses) if by_example else losses.mean().backward()

    for drawn in (False, True):
        monkeypatch.setattr(lora_dp.engine.hooks, "drawn_for_test", lambda drawn=drawn: drawn)
        if mixing and drawn:
            with pytest.raises(IsolationError, match="depends on the model's outputs for others"):
                backward(torch.eye(N) + 0.1)
        else:
            backward(torch.eye(N))
            optimizer.step()
    assert optimizer.ledger.steps == (1 if mixing else 2)


class Large(nn.Module):
    """Returns ``rest`` numbers and 2**14 − 1 for each example: together with one, 2**17 of eight."""

    def __init__(self, rest: int) -> None:
        super().__init__()
        self.inner, self.rest = mlp(), rest

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.inner(x)
        return out.repeat(1, 2**14 // 3), out.repeat(1, self.rest)[:, : self.rest]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(lora_dp.engine.hooks, "drawn_for_test", lambda: False)


@pytest.mark.parametrize(("rest", "looked"), [(1, True), (2, False)])
def test_losses_of_few_outputs_are_looked_through_in_every_batch(rest, looked, undrawn):
    def mixed(share: float) -> OutsideLoss:
        return lambda out, y: ((torch.eye(8) + share) @ out[0]).square().mean()

    model, optimizer = step(mixed(0.0), model=Large(rest).train(), n=8)
    if looked:
        with pytest.raises(IsolationError, match="depends on the model's outputs for others"):
            step(mixed(0.1), model=model, optimizer=optimizer, n=8)
    else:
        step(mixed(0.1), model=model, optimizer=optimizer, n=8)


def test_losses_of_two_examples_are_looked_through_in_every_batch(undrawn):
    def mixed(share: float) -> OutsideLoss:
        return lambda out, y: ((torch.eye(2) + share) @ out).square().mean()

    model, optimizer = step(mixed(0.0), n=2)
    with pytest.raises(IsolationError, match="depends on the model's outputs for others"):
        step(mixed(0.1), model=model, optimizer=optimizer, n=2)


def test_a_loss_of_many_outputs_that_was_seen_in_a_batch_of_one_alone_is_looked_at_in_the_next(undrawn):
    def centred(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return (out[0] - out[0].sum(0)).square().mean()

    model, optimizer = step(lambda out, y: out[0].square().mean(), model=Large(2).train(), n=8)
    step(centred, model=model, optimizer=optimizer, n=1)
    with pytest.raises(IsolationError, match="depends on the model's outputs for others"):
        step(centred, model=model, optimizer=optimizer, n=8)


def test_a_loss_that_was_seen_in_a_batch_of_one_alone_is_looked_at_in_the_next():
    """Though batches of that kind were tried before, with another loss."""

    def centred(out: Tensor, y: Tensor) -> Tensor:
        return (out - out.sum(0)).square().mean()

    model, optimizer = step(F.cross_entropy, n=2)
    step(centred, model=model, optimizer=optimizer, n=1)
    with pytest.raises(IsolationError, match="depends on the model's outputs for others"):
        step(centred, model=model, optimizer=optimizer, n=2)


@pytest.mark.parametrize("by_example", [False, True])
def test_where_a_whole_client_is_protected_losses_may_join_its_examples(by_example):
    """Its change is clipped as one: the step is that of the mean, whatever the examples do to each other."""

    def centred(model: nn.Module) -> Tensor:
        out = model(x)
        return F.cross_entropy(out - out.mean(0), y, reduction="none" if by_example else "mean")

    model, plain, (x, y) = mlp(), mlp(), examples(N)
    optimizer = make_private(model, batch_size=N, max_grad_norm=100.0)
    optimizer.recorder.per_example = False
    optimizer.batch.expect(N)
    loss = centred(model)
    optimizer.backward(loss) if by_example else loss.backward()
    optimizer.step()
    centred(plain).mean().backward()
    assert_close(flat(private_gradients(model)), flat(private_gradients(plain)))
