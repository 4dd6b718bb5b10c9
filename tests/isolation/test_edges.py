"""The isolation check at its edges: the first and the last example, two and three of them, values that go by token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLayerNorm, DPLinear, IsolationError
from lora_dp.isolation.check import Passed, check_isolation
from tests.isolation.token_models import Tokens, padded, refused
from tests.models import examples, mlp


class Favoured(nn.Module):
    """One place of the batch takes something of all others: before a private layer or after all of them."""

    def __init__(self, place: int, before: bool, only: Callable[[Tensor], Tensor] = lambda x: x.mean(0)):
        super().__init__()
        torch.manual_seed(0)
        self.place, self.before, self.only = place, before, only
        self.inner = DPLinear(6, 6)

    def mixed(self, x: Tensor) -> Tensor:
        alone = torch.arange(len(x)) == self.place % len(x)
        return x + alone.unsqueeze(1) * self.only(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.mixed(x)) if self.before else self.mixed(self.inner(x))


@pytest.mark.parametrize("n", [2, 3, 4, 9])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("place", [0, -1])
def test_mixing_at_one_end_of_the_batch_is_refused(place, before, n):
    refused("example", Favoured(place, before), n, examples(n)[0])


@pytest.mark.parametrize("place", [0, -1])
def test_mixing_of_what_is_constant_is_refused(place):
    """No gradient goes from one example to another: only another batch tells."""
    refused("The output for example", Favoured(place, False, lambda x: x.detach().mean(0)), 4, examples(4)[0])


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("power", [-1.0, 1.0, 0.5])
def test_an_output_that_counts_is_refused_in_every_batch(power, n):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * len(x) ** power

    refused("changes with the number of examples", Counting(), n, examples(n)[0])


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_reductions_are_told_apart_in_every_batch(n):
    x, y = examples(n)

    def loss(power: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda out, labels: F.cross_entropy(out, labels, reduction="sum") / len(out) ** power

    for power, own in ((0.0, "sum"), (1.0, "mean")):
        for declared in ("mean", "sum", None):
            options: dict[str, Any] = {"targets": y, "criterion": loss(power), "reduction": declared}
            if declared in (own, None):
                assert check_isolation(mlp(), (x,), {}, n, **options).losses == {0}
            else:
                refused(f"is a {own} over the examples, but was declared a {declared}", mlp(), n, x, **options)
    refused("neither a mean nor a sum", mlp(), n, x, targets=y, criterion=loss(0.5))
    vector: dict[str, Any] = {
        "targets": y,
        "criterion": lambda out, labels: F.cross_entropy(out, labels, reduction="none"),
    }
    assert check_isolation(mlp(), (x,), {}, n, reduction="mean", **vector).losses == {0}
    vector["criterion"] = lambda out, labels: F.cross_entropy(out, labels, reduction="none") / len(out)
    refused("declared a sum", mlp(), n, x, reduction="mean", **vector)


def test_a_batch_of_one_has_nobody_to_mix_with():
    assert check_isolation(Favoured(0, True).train(), (examples(1)[0],), {}, 1) == Passed()


def test_a_large_batch_costs_a_trial_of_a_few_examples():
    seen = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return self.inner(x)

    check_isolation(Watched().train(), (examples(200)[0],), {}, 200)
    few = [n for n in seen if n <= 4]
    assert 2 <= len(few) <= 6
    # Once without gradients, and a quarter of it.
    assert [n for n in seen if n > 4] == [200, 50]


def test_rows_without_an_example_are_refused():
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = DPLinear(6, 6), DPLayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.norm(x[0])

    refused("'norm' works on .* in a batch of 4 examples", Averaged(), 4, examples(4)[0])


@pytest.mark.parametrize("grows", [True, False])
def test_a_buffer_that_follows_the_examples_is_refused(grows):
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("seen", torch.zeros(6))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if grows:
                self.seen += x.detach().mean(0)
            return self.inner(x)

    model = Remembering()
    if grows:
        refused("The buffer 'seen' takes up statistics", model, 4, examples(4)[0])
    else:
        check_isolation(model.train(), (examples(4)[0],), {}, 4)
    assert int(model.calls) == 0 and not model.seen.any()


# Outputs whose rows are tokens


class Flattened(nn.Module):
    """(N, T, 6) to (N·T, 3), after which something may join the examples."""

    def __init__(self, after: Callable[[Tensor], Tensor], table: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.after, self.table = DPLinear(6, 3), after, table

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.after(self.inner(x)).flatten(0, 1)
        return {**({"table": torch.ones(6, 5)} if self.table else {}), "logits": out}


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize(
    ("words", "after"),
    [
        ("attributed to other examples", lambda out: out - out.mean(0)),
        ("the other examples", lambda out: out - out.detach().mean(0)),
        ("the number of examples", lambda out: out / len(out)),
    ],
)
def test_examples_that_meet_in_flattened_outputs_are_refused(words, after, table, n):
    x = torch.randn(n, 5, 6, generator=torch.Generator().manual_seed(0))
    refused(words, Flattened(after, table), n, x)
    check_isolation(Flattened(lambda out: out.tanh(), table).train(), (x,), {}, n)


# Padding


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_tokens_that_take_something_of_padding_are_refused(flat, left, n):
    with pytest.raises(IsolationError, match="output of example .* changes with the padding"):
        check_isolation(Tokens("all", flat).train(), (), padded(n, left), n)
    for leak in ("none", "own"):
        check_isolation(Tokens(leak, flat).train(), (), padded(n, left), n, reduction="mean")
    check_isolation(Tokens("all", flat).train(), (), padded(n, left), n, padding_varies=False)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_that_counts_padding_is_refused(reduction, left, n):
    with pytest.raises(IsolationError, match="gradient at 'inner' of example .* changes with the padding"):
        check_isolation(Tokens(over="all", reduction=reduction).train(), (), padded(n, left), n, reduction=reduction)  # type: ignore[arg-type]
    passed = check_isolation(Tokens(reduction=reduction).train(), (), padded(n, left), n, reduction=reduction)  # type: ignore[arg-type]
    assert passed.losses == {0} and passed.padding


@pytest.mark.parametrize("over", ["own", "all"])
def test_losses_of_single_examples_are_held_to_padding_too(over):
    def criterion(output: Any, targets: Any) -> Tensor:
        found: Tensor = output["loss"]
        return found

    model = Tokens(over=over, reduction="none").train()
    batch = padded(3)
    if over == "own":
        check_isolation(model, (), batch, 3, criterion=criterion, reduction="mean")
        check_isolation(model, (), batch, 3, criterion=criterion)
    else:
        for reduction in ("mean", "sum", None):
            with pytest.raises(IsolationError, match="changes with the padding"):
                check_isolation(model, (), batch, 3, criterion=criterion, reduction=reduction)  # type: ignore[arg-type]


# Numbers among the arguments


@pytest.mark.slow
@pytest.mark.parametrize("where", ["output", "loss", "nowhere"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_number_that_differs_from_batch_to_batch(where, dropout):
    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.dropout = mlp(), nn.Dropout(dropout)

        def forward(self, x: Tensor, count: float) -> dict[str, Tensor]:
            out = self.inner(self.dropout(x))
            loss = out.square().mean() * (count if where == "loss" else 1)
            return {"loss": loss, "logits": out * (count if where == "output" else 1)}

    model, batch = Numbered().train(), {"x": examples(4)[0], "count": 3.0}
    name = "[1]['count']"
    check_isolation(model, (), batch, 4, earlier={name: 3.0})
    if where == "nowhere":
        check_isolation(model, (), batch, 4, earlier={name: 2.0})
    else:
        with pytest.raises(IsolationError, match="differs from batch to batch"):
            check_isolation(model, (), batch, 4, earlier={name: 2.0})
