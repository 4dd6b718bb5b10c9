"""Losses that a backward comes from: what keeps the examples apart is taken, what joins them is refused."""

import concurrent.futures
import contextlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_dp.engine.hooks
from lora_dp import DPLinear, IsolationError, PrivacyEngine
from lora_dp.losses import classification_loss
from tests.models import assert_refuses, examples, flat, mlp, take_step
from tests.support import assert_close, brute_force, clip_and_sum, make_private, private_gradients

OutsideLoss = Callable[[Any, Tensor], Tensor]
N = 6


def step(loss: OutsideLoss, *, reduction: str = "mean", n: int = N, optimizer=None, model=None):
    """One private step, without noise, with a loss outside the model; the optimizer, to go on with."""
    model = model or mlp()
    optimizer = optimizer or make_private(model, batch_size=N, max_grad_norm=0.3, loss_reduction=reduction)
    x, y = examples(n)
    optimizer.expect_batch(n)
    loss(model(x), y).backward()
    optimizer.step()
    return model, optimizer


def weighted(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, weight=torch.tensor([1.0, 2.0, 3.0]))


def ignoring(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, torch.where(y == y[0], y, torch.full_like(y, -100)))


def contrastive(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out @ out.t(), torch.arange(len(out)))


def soft(y: Tensor) -> Tensor:
    return F.one_hot(y, 3).float() * 0.8 + 0.2 / 3


MEANS: dict[str, OutsideLoss] = {
    "cross entropy": F.cross_entropy,
    "smoothed": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1),
    "probabilities": lambda out, y: F.cross_entropy(out, soft(y)),
    "mean of a vector": lambda out, y: F.cross_entropy(out, y, reduction="none").mean(),
    "sum by hand": lambda out, y: F.cross_entropy(out, y, reduction="sum") / len(y),
    "focal": lambda out, y: (1 - (-F.cross_entropy(out, y, reduction="none")).exp()).square().mean(),
    "squares over outputs": lambda out, y: F.mse_loss(out, soft(y)),
    "binary": lambda out, y: F.binary_cross_entropy_with_logits(out, soft(y)),
    "absolute": lambda out, y: F.l1_loss(out, soft(y)),
    "Huber": lambda out, y: F.smooth_l1_loss(out, soft(y)),
    "divergence": lambda out, y: F.kl_div(out.log_softmax(1), soft(y), reduction="batchmean"),
    "two terms": lambda out, y: 0.7 * F.cross_entropy(out, y) + 0.3 * out.square().mean(),
    "half of it": lambda out, y: F.cross_entropy(out, y) / 2,
    "margin": lambda out, y: F.multi_margin_loss(out, y),
    "one less a mean": lambda out, y: 1 - out.tanh().mean(),
    "mean of tasks": lambda out, y: torch.stack([F.cross_entropy(out, y), out.square().mean(), out.mean()]).mean(),
    "sum of tasks": lambda out, y: torch.stack([F.cross_entropy(out, y), out.square().mean()]).sum(),
}
SUMS: dict[str, OutsideLoss] = {
    "cross entropy": lambda out, y: F.cross_entropy(out, y, reduction="sum"),
    "weighted": lambda out, y: F.cross_entropy(out, y, weight=torch.tensor([1.0, 2.0, 3.0]).to(out), reduction="sum"),
    "ignoring": lambda out, y: F.cross_entropy(out, torch.where(y == 0, -100, y), reduction="sum"),
    "over all dimensions": lambda out, y: out.square().sum((0, 1)),
    "mean times N": lambda out, y: F.cross_entropy(out, y) * len(y),
}


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


@pytest.mark.parametrize("name", MEANS)
def test_means_are_taken_for_what_they_are(name):
    check_taken(MEANS[name], "mean")


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
    optimizer.expect_batch(4)
    if mixing:
        with pytest.raises(IsolationError, match="depends on the model's outputs for others"):
            contrastive(model(x), x).backward()
    else:
        model(x).square().mean().backward()
        optimizer.step()
    assert optimizer.ledger.steps == (not mixing)


class Both(nn.Module):
    """Returns its loss, and what it was made of."""

    def __init__(self, losses: Callable[[Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        self.inner, self.losses = mlp(), losses

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.inner(x)
        return {"logits": out, **self.losses(out)}


def test_the_models_own_loss_is_taken_where_it_was_found_right():
    def cubes(out: Tensor) -> dict[str, Tensor]:
        return {"loss": (out * out * out).sum() / len(out)}

    model, reference, (x, _) = Both(cubes).train(), mlp(), examples(N)
    optimizer = make_private(model, batch_size=N, max_grad_norm=0.3)
    optimizer.expect_batch(N)
    model(x)["loss"].backward()
    optimizer.step()
    names = {name for name, p in reference.named_parameters() if p.requires_grad}
    gradients = brute_force(
        reference, lambda m, row: m(row.double()).pow(3).sum(), [x[i : i + 1] for i in range(N)], names
    )
    assert_close(flat(private_gradients(model)) * N, flat(clip_and_sum(gradients, "flat", 0.3, str)))


class Missing(nn.Module):
    """A loss of its own that is a mean in the first batch, and divides by what the batch holds."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.way = mlp(), way
        self.register_buffer("rates", torch.tensor([1.0, 20.0, 20.0]))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out, y = self.inner(x), y.long()
        if self.way == "a product that joins":
            return {"loss": torch.einsum("nk,nk->", out, out) / len(out)}
        if self.way == "weights":
            return {"loss": F.cross_entropy(out, y, self.rates)}
        if self.way == "weights and smoothing":
            return {"loss": F.cross_entropy(out, y, self.rates, label_smoothing=0.1)}
        if self.way == "areas":
            maps, labels = out.view(len(x), 3, 1, 1).expand(-1, -1, 2, 2), (y - 1).view(-1, 1, 1).expand(-1, 2, 2)
            return {
                "loss": F.cross_entropy(maps, labels, ignore_index=-1)
                + 0.4 * F.cross_entropy(0.5 * maps, labels, ignore_index=-1)
            }
        known = (y > 0).float()
        return {"loss": (out.square().sum(1) * known).sum() / known.sum()}


@pytest.mark.usefixtures("none_drawn")
@pytest.mark.parametrize("way", ["sums", "weights", "weights and smoothing", "areas", "a product that joins"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_of_the_models_own_may_not_divide_by_what_a_batch_holds(way, compiled):
    """A first batch that is even, so that nothing shows in its trial, proves nothing of others, which look alike."""
    model, (x, _) = Missing(way).train(), examples(N)
    optimizer = make_private(model, batch_size=N)
    called = torch.compile(model, backend="aot_eager") if compiled else model
    even = torch.ones(N)

    def step(y: Tensor) -> None:
        called(x, y)["loss"].backward()
        optimizer.zero_grad()

    if compiled or way == "a product that joins":
        assert_refuses(IsolationError, "It cannot be told that the loss keeps examples apart", lambda: step(even))
        return
    step(even)
    step(even)
    with pytest.raises(IsolationError, match="its own loss by .* in this batch, by .* in an earlier one"):
        step(even * (torch.arange(N) != 1))


@pytest.mark.usefixtures("none_drawn")
@pytest.mark.parametrize("shape", [(), (1,)])
def test_losses_of_single_examples_that_the_model_returns_may_not_count_the_batch(shape):
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor, known: Tensor) -> Tensor:
            losses = self.inner(x).square().sum(1)
            return losses * (len(x) / known.sum().view(shape))

    model, (x, _) = Counts().train(), examples(N)
    optimizer = make_private(model, batch_size=N)
    known = torch.ones(N)
    for _ in range(2):
        optimizer.backward(model(x, known))
        optimizer.zero_grad()
    known[1:] = 0.5
    with pytest.raises(IsolationError, match="that of an earlier one by 1"):
        optimizer.backward(model(x, known))


def test_a_loss_of_the_models_own_in_a_tensor_of_one_number_is_refused_in_a_sentence():
    model, (x, _) = Both(lambda out: {"loss": out.square().mean().view(1)}).train(), examples(N)
    make_private(model, batch_size=N)
    assert_refuses(IsolationError, "a number that the model returned", lambda: model(x)["loss"].backward())


def test_numbers_that_the_model_returns_are_told_apart_by_their_place():
    """The second of two was found right, the third was not; outputs that are no numbers do not count."""

    def three(out: Tensor) -> dict[str, Tensor]:
        third = out.mean(0).square().sum()
        return {"loss": out.square().mean(), "second": out.abs().mean(), "third": third, "boxed": third.view(1)}

    model, (x, _) = Both(three).train(), examples(N)
    optimizer = make_private(model, batch_size=N)
    optimizer.expect_batch(N)
    output = model(x)
    (output["loss"] + output["second"]).backward()
    optimizer.step()
    assert optimizer.ledger.steps == 1
    for inputs, name in ((x, "third"), (x, "boxed"), (x[:2], "third")):
        with pytest.raises(IsolationError, match="a number that the model returned"):
            model(inputs)[name].backward()
        optimizer.zero_grad()


def test_a_number_of_one_example_alone_is_taken_though_it_would_join_several():
    def two(out: Tensor) -> dict[str, Tensor]:
        return {"loss": out.square().mean(), "centre": out.mean(0).square().sum()}

    model, (x, _) = Both(two).train(), examples(2)
    optimizer = make_private(model, batch_size=N)
    optimizer.expect_batch(1)
    model(x[:1])["centre"].backward()
    optimizer.step()
    assert optimizer.ledger.steps == 1
    optimizer.zero_grad()
    with pytest.raises(IsolationError, match="a number that the model returned"):
        model(x)["centre"].backward()


def test_a_divisor_that_follows_the_batch_is_refused_in_the_next_one():
    """Of one batch alone it might be a constant."""
    counts = iter((12, 13))
    model, optimizer = step(loss := lambda out, y: F.cross_entropy(out, y) * 6 / next(counts))
    before = optimizer.ledger.steps
    with pytest.raises(IsolationError, match="weighs an example by 0.461538, that of an earlier one by 0.5"):
        step(loss, model=model, optimizer=optimizer, n=5)
    assert optimizer.ledger.steps == before


def test_a_divisor_that_follows_large_batches_is_refused_too():
    """One token more or less of thousands is still a count."""
    counts = iter((2000, 2001))
    model, optimizer = step(loss := lambda out, y: F.cross_entropy(out, y) * 6 / next(counts))
    with pytest.raises(IsolationError, match="weighs an example"):
        step(loss, model=model, optimizer=optimizer)


@pytest.mark.parametrize("n", [2, N])
def test_a_divisor_that_creeps_is_held_to_the_first_one(n):
    weights = iter(0.5 * (1 + 8e-6 * i) for i in range(3))
    model, optimizer = step(loss := lambda out, y: next(weights) * F.cross_entropy(out, y), n=n)
    step(loss, model=model, optimizer=optimizer, n=n)
    with pytest.raises(IsolationError, match="weighs an example"):
        step(loss, model=model, optimizer=optimizer, n=n)


def test_a_batch_of_one_is_held_to_the_weight_of_earlier_ones():
    weights = iter((0.5, 0.5, 0.4))
    model, optimizer = step(loss := lambda out, y: next(weights) * F.cross_entropy(out, y), n=1)
    step(loss, model=model, optimizer=optimizer, n=2)
    with pytest.raises(IsolationError, match="by 0.4, that of an earlier one by 0.5"):
        step(loss, model=model, optimizer=optimizer, n=1)


@pytest.mark.parametrize("first", [2, N])
def test_batches_of_one_that_creep_are_held_to_the_first_batch_of_several(first):
    weights = iter(0.5 * (1 + 8e-6 * i) for i in range(3))
    model, optimizer = step(loss := lambda out, y: next(weights) * F.cross_entropy(out, y), n=first)
    step(loss, model=model, optimizer=optimizer, n=1)
    with pytest.raises(IsolationError, match="weighs an example by 0.500008, that of an earlier one by 0.5"):
        step(loss, model=model, optimizer=optimizer, n=1)


def in_a_loop(lengths: list[int], share: float) -> OutsideLoss:
    """Another graph for other lengths; ``share`` of the mean over the examples."""

    def loss(out: Tensor, y: Tensor) -> Tensor:
        each = [sum((out[i : i + 1].square().sum(1) for _ in range(k)), torch.zeros(1)) for i, k in enumerate(lengths)]
        return share * torch.cat(each).mean()

    return loss


@pytest.mark.parametrize("n", [2, N])
def test_a_divisor_outside_a_loop_whose_graph_is_another_in_every_batch_is_refused(n):
    """Before that it is compared with those of other graphs, it looks like a constant."""
    model, optimizer = step(in_a_loop([2] * n, 0.5), n=n)
    step(in_a_loop([1] * (n - 1) + [3], 0.5), model=model, optimizer=optimizer, n=n)
    with pytest.raises(IsolationError, match="weighs an example by 0.4, that of an earlier one by 0.5"):
        step(in_a_loop([2] * (n - 1) + [3], 0.4), model=model, optimizer=optimizer, n=n)


def test_one_examples_own_divisor_is_no_measure_for_others():
    """A mean over its own tokens, in a loop, where micro-batches have one example each."""
    model, optimizer = step(in_a_loop([4], 1 / 4), n=1)
    for lengths, share in (([5], 1 / 5), ([2, 3], 1.0), ([7], 1 / 7), ([3, 3], 1.0)):
        step(in_a_loop(lengths, share), model=model, optimizer=optimizer, n=len(lengths))
    assert optimizer.ledger.steps == 5


def test_each_loss_is_compared_with_its_like():
    """Two losses by turns are right, each with a weight of its own; that one of them changes is seen."""
    losses = (lambda out, y: F.cross_entropy(out, y), lambda out, y: 0.5 * out.square().mean())
    model, optimizer = step(losses[0])
    for loss in (losses[1], losses[0], losses[1]):
        step(loss, model=model, optimizer=optimizer)
    with pytest.raises(IsolationError, match="weighs an example by 0.1, that of an earlier one by 0.166667"):
        step(lambda out, y: 0.3 * out.square().mean(), model=model, optimizer=optimizer)


def mixed_by(matrix: Tensor) -> OutsideLoss:
    return lambda out, y: (matrix @ out).square().mean()


@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("mixing", [False, True])
def test_a_later_loss_whose_graph_tells_nothing_new_is_looked_at_in_secret(mixing, by_example, monkeypatch):
    """What joins the examples may be in the numbers alone."""

    model, (x, _) = mlp(), examples(N)
    optimizer = make_private(model, batch_size=N)

    def backward(matrix: Tensor) -> None:
        optimizer.expect_batch(N)
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


def test_a_count_inside_the_mean_is_refused_at_once():
    with pytest.raises(IsolationError, match="multiplied by 0.0131579, which looks like a count"):
        step(lambda out, y: (F.cross_entropy(out, y, reduction="none") / 76).mean())
    step(lambda out, y: (F.cross_entropy(out, y, reduction="none") / 20).mean())


def test_the_order_in_which_terms_are_added_is_nothing():
    model, optimizer = step(lambda out, y: 0.3 * out[:, :1].square().mean() + 0.7 * out[:, 1:].square().mean())
    step(
        lambda out, y: 0.7 * out[:, 1:].square().mean() + 0.3 * out[:, :1].square().mean(),
        model=model,
        optimizer=optimizer,
    )
    assert optimizer.ledger.steps == 2


def test_a_loss_that_was_seen_in_a_batch_of_one_alone_is_looked_at_in_the_next():
    """Though batches of that kind were tried before, with another loss."""

    def centred(out: Tensor, y: Tensor) -> Tensor:
        return (out - out.sum(0)).square().mean()

    model, optimizer = step(F.cross_entropy, n=2)
    step(centred, model=model, optimizer=optimizer, n=1)
    with pytest.raises(IsolationError, match="depends on the model's outputs for others"):
        step(centred, model=model, optimizer=optimizer, n=2)


def test_a_mean_over_labels_of_the_models_own_has_as_many_for_each_example_in_every_batch():
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = DPLinear(6, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            loss = F.cross_entropy(self.inner(x).flatten(0, 1), labels.flatten())
            return {"loss": loss, "again": 0.5 * loss}

    model = Tagger().train()
    optimizer = make_private(model, batch_size=4)

    def forward(n: int, tokens: int) -> dict[str, Tensor]:
        output: dict[str, Tensor] = model(torch.randn(n, tokens, 6), (torch.arange(tokens) % 3).expand(n, -1))
        return output

    for n, tokens in ((1, 6), (4, 4), (5, 4), (1, 4), (1, 5)):  # that of one example is its own
        optimizer.expect_batch(n)
        output = forward(n, tokens)
        (output["loss"] + output["again"]).backward()
        optimizer.step()
    with pytest.raises(IsolationError, match="its own loss by 0.2 in this batch, by 0.25 in an earlier one"):
        forward(4, 5)["loss"].backward()


def test_a_sum_is_refused_even_after_a_batch_of_one():
    """Of one example mean and sum are the same."""
    model, optimizer = step(SUMS["cross entropy"], n=1)
    with pytest.raises(IsolationError, match="weighs an example by 2, that of an earlier one by 1"):
        step(SUMS["cross entropy"], model=model, optimizer=optimizer, n=2)


@pytest.mark.parametrize("name", MEANS)
def test_means_are_taken_in_batches_of_any_size(name):
    model, optimizer = step(MEANS[name])
    for n in (5, 1, 7, 2):
        step(MEANS[name], model=model, optimizer=optimizer, n=n)
    assert optimizer.ledger.steps == 5


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_taken_in_batches_of_any_size(name):
    model, optimizer = step(SUMS[name], reduction="sum")
    for n in (5, 1, 7, 2):
        step(SUMS[name], reduction="sum", model=model, optimizer=optimizer, n=n)
    assert optimizer.ledger.steps == 5


def test_a_public_constant_may_stay():
    model, optimizer = step(loss := lambda out, y: 0.3 * F.cross_entropy(out, y))
    step(loss, model=model, optimizer=optimizer, n=5)
    assert optimizer.ledger.steps == 2


def test_each_backward_of_a_kept_graph_has_a_weight_of_its_own():
    """Two passes through one graph are two constants; that one of them follows the batch is refused as ever."""
    model = mlp()
    optimizer = make_private(model, batch_size=N)

    def twice(second: float, n: int) -> None:
        x, y = examples(n)
        optimizer.expect_batch(n)
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        (second * loss).backward()
        optimizer.step()

    twice(-0.9, N)
    twice(-0.9, 1)
    assert optimizer.ledger.steps == 2
    with pytest.raises(IsolationError, match="weighs an example by -0.8, that of an earlier one by -0.9"):
        twice(-0.8, 5)


def test_a_mean_over_tokens_of_a_batch_of_another_width_is_refused():
    model = nn.Sequential(DPLinear(6, 3)).train()
    optimizer = make_private(model, batch_size=4)
    optimizer.expect_batch(4)
    model(torch.randn(4, 5, 6)).square().mean().backward()
    optimizer.step()
    with pytest.raises(IsolationError, match="weighs an example"):
        model(torch.randn(4, 7, 6)).square().mean().backward()


def test_a_loss_that_passes_by_the_outputs_is_refused():
    """From a hook's features the reduction cannot be followed to the examples."""
    model, kept = mlp(), []
    model[0].register_forward_hook(lambda module, inputs, output: kept.append(output))
    optimizer = make_private(model, batch_size=4)
    optimizer.expect_batch(4)
    x, y = examples(4)
    out = model(x)
    for loss in (kept[-1].sum(), F.cross_entropy(out, y) + 0.01 * kept[-1].mean(0).square().sum()):
        with pytest.raises(IsolationError, match="beside what the model returned"):
            loss.backward(retain_graph=True)
    with pytest.raises(IsolationError, match="beside what the model returned"):
        optimizer.backward(F.cross_entropy(out, y, reduction="none") + kept[-1].mean(0).square().sum())


def test_losses_of_two_forward_passes_are_told_from_unknown_functions():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.expect_batch(4)
    x, y = examples(4)
    first, second = model(x), model(x + 0.1)
    losses = F.cross_entropy(second, y, reduction="none") + (first - second).square().sum(1)
    words = "another forward pass of the model, or on values within it that it does not return: join several views"
    assert_refuses(IsolationError, words, lambda: optimizer.backward(losses))


def test_a_gradient_by_another_way_than_backward_is_refused():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.expect_batch(4)
    out = model(examples(4)[0])
    nn.Linear(3, 1)(out.detach()).mean().backward()  # a loss that does not depend on the model
    torch.autograd.Variable._execution_engine.run_backward(
        (out,), (torch.ones_like(out),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    assert_refuses(IsolationError, "from a loss that was not seen", optimizer.step)
    assert optimizer.ledger.steps == 0


def test_several_losses_in_one_backward_are_examined():
    model, (x, y) = mlp(), examples(4)
    optimizer = make_private(model, batch_size=4)
    optimizer.expect_batch(4)
    out = model(x)
    with pytest.raises(IsolationError, match="'Max'"):
        torch.autograd.backward([F.cross_entropy(out, y), out.max()])
    torch.autograd.backward([F.cross_entropy(out, y), out.square().mean()])
    optimizer.step()
    assert optimizer.ledger.steps == 1


def test_a_backward_from_an_edge_of_the_graph_is_refused():
    model, (x, y) = mlp(), examples(4)
    optimizer = make_private(model, batch_size=4)
    optimizer.expect_batch(4)
    loss = F.cross_entropy(model(x), y)
    torch.autograd.backward([torch.autograd.graph.get_gradient_edge(loss)], [torch.ones(())])
    assert_refuses(IsolationError, "from a loss that was not seen", optimizer.step)


def test_a_vector_with_weights_is_refused():
    model = mlp()
    make_private(model, batch_size=4)
    x, y = examples(4)
    losses = F.cross_entropy(model(x), y, reduction="none")
    with pytest.raises(IsolationError, match="backward\\(\\) of a vector with weights cannot be followed: hand"):
        losses.backward(torch.ones(4))


def test_other_models_are_none_of_our_business():
    model, other = mlp(), nn.Linear(6, 3)
    make_private(model, batch_size=4)
    x, _ = examples(4)
    model(x)
    other(x).max().backward()
    other(x).backward(torch.ones(4, 3))
    number = torch.ones((), requires_grad=True)
    number.backward()
    assert other.weight.grad is not None and float(number.grad) == 1


def test_an_unknown_graph_is_taken_once_the_criterion_was_tested():
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value / 2

        @staticmethod
        def backward(ctx, g):
            return g / 2

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        return Half.apply(F.cross_entropy(out, y))

    engine, model, batch = PrivacyEngine("rdp", reproducible_seed=0), mlp(), examples(4)
    optimizer = make_private(model, batch_size=4, engine=engine)
    with pytest.raises(IsolationError, match="the operation 'Half"):
        criterion(model(batch[0]), batch[1]).backward()
    optimizer.zero_grad()
    engine.check_isolation(model, batch, criterion)
    take_step(model, optimizer, batch, lambda m, b: criterion(m(b[0]), b[1]))
    assert optimizer.ledger.steps == 1
    engine.check_isolation(model, batch, lambda out, y: criterion(out * 0.5, y))
    take_step(model, optimizer, batch, lambda m, b: criterion(m(b[0]) * 0.5, b[1]))
    with pytest.raises(IsolationError, match="weighs an example by 0.4, that of an earlier one by 0.5"):
        take_step(model, optimizer, batch, lambda m, b: criterion(m(b[0]) * 0.4, b[1]))


@pytest.mark.parametrize("way", ["set_default_device", "device"])
def test_losses_are_followed_under_a_default_device_too(way):
    """torch's backward comes back to itself there."""
    model = mlp().train()
    optimizer = make_private(model, batch_size=4)
    x, y = examples(4)
    torch.set_default_device("cpu" if way == "set_default_device" else None)
    try:
        with torch.device("cpu") if way == "device" else contextlib.nullcontext():
            for _ in range(2):
                optimizer.zero_grad()
                optimizer.expect_batch(4)
                optimizer.backward(classification_loss(model(x), y))
                optimizer.step()
            optimizer.zero_grad()
            with pytest.raises(IsolationError):
                (F.cross_entropy(model(x), y) + model(x).var(0).mean()).backward()
    finally:
        torch.set_default_device(None)


def test_losses_are_followed_in_a_thread_too():
    def run():
        model = mlp().train()
        make_private(model, batch_size=4)
        outputs = model(examples(4)[0])
        (F.cross_entropy(outputs, examples(4)[1]) + outputs.var(0).mean()).backward()

    with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(IsolationError):
        pool.submit(run).result()


def test_after_a_backward_that_failed_losses_are_followed_still():
    model = mlp().train()
    optimizer = make_private(model, batch_size=4)
    x, y = examples(4)

    def fails(gradient):
        raise ZeroDivisionError

    outputs = model(x)
    outputs.register_hook(fails)
    with pytest.raises(ZeroDivisionError):
        F.cross_entropy(outputs, y).backward()
    optimizer.zero_grad()
    with pytest.raises(IsolationError):
        outputs = model(x)
        (F.cross_entropy(outputs, y) + outputs.var(0).mean()).backward()


def test_a_graph_is_not_kept_after_the_step():
    """What the watch holds of the outputs goes with the pass."""
    model, (x, y) = mlp(), examples(N)
    optimizer = make_private(model, batch_size=N)
    take_step(model, optimizer, (x, y))
    assert optimizer.recorder.losses._outputs is None


def test_the_deepest_graph_does_not_exhaust_the_stack():
    model, (x, y) = mlp(), examples(N)
    optimizer = make_private(model, batch_size=N)
    out = model(x)
    for _ in range(5000):
        out = out + 0.0
    optimizer.expect_batch(N)
    total = F.cross_entropy(out, y)
    for _ in range(5000):
        total = total + 0.0
    total.backward()
    optimizer.step()
    assert optimizer.ledger.steps == 1 and math.isfinite(float(total))


PAIRS = {
    "mse": lambda p, y: F.mse_loss(p, y),
    "smooth": lambda p, y: F.smooth_l1_loss(p, y),
    "by hand": lambda p, y: (p - y).square().mean(),
    "vector": lambda p, y: (p - y).square().mean(1),
    "at rest": lambda p, y: (p - y - 1e3).relu().mean(1),
    "vector of sums": lambda p, y: F.mse_loss(p, y, reduction="none").sum(1),
}


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
        optimizer.expect_batch(n)
        optimizer.backward((model(torch.randn(n, 6)) - torch.linspace(0, 1, N)).square().sum(1))
        optimizer.step()
    assert optimizer.ledger.steps == 3


@pytest.mark.parametrize("by_example", [False, True])
def test_where_a_whole_client_is_protected_losses_may_join_its_examples(by_example):
    """Its change is clipped as one: the step is that of the mean, whatever the examples do to each other."""

    def centred(model: nn.Module) -> Tensor:
        out = model(x)
        return F.cross_entropy(out - out.mean(0), y, reduction="none" if by_example else "mean")

    model, plain, (x, y) = mlp(), mlp(), examples(N)
    optimizer = make_private(model, batch_size=N, max_grad_norm=100.0)
    optimizer.recorder.per_example = False
    optimizer.expect_batch(N)
    loss = centred(model)
    optimizer.backward(loss) if by_example else loss.backward()
    optimizer.step()
    centred(plain).mean().backward()
    assert_close(flat(private_gradients(model)), flat(private_gradients(plain)))
