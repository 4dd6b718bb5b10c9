"""A model's own losses: taken where they were found right, and held to what they were."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from tests.isolation.loss_checks.outside_losses import N
from tests.models import assert_refuses, examples, flat, mlp
from tests.support import assert_close, brute_force, clip_and_sum, make_private, private_gradients


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
    optimizer.batch.expect(N)
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


@pytest.mark.slow
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
    optimizer.batch.expect(N)
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
    optimizer.batch.expect(1)
    model(x[:1])["centre"].backward()
    optimizer.step()
    assert optimizer.ledger.steps == 1
    optimizer.zero_grad()
    with pytest.raises(IsolationError, match="a number that the model returned"):
        model(x)["centre"].backward()


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
        optimizer.batch.expect(n)
        output = forward(n, tokens)
        (output["loss"] + output["again"]).backward()
        optimizer.step()
    with pytest.raises(IsolationError, match="its own loss by 0.2 in this batch, by 0.25 in an earlier one"):
        forward(4, 5)["loss"].backward()
