"""What only many examples do to each other, and what hides behind large scores."""

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.check import check_isolation
from lora_dp.isolation.other_batches import _compare_part
from lora_dp.isolation.trials import LayerRows, Quiet
from tests.models import Drawing, assert_refuses, examples, mlp

N = 24


class Capacity(nn.Module):
    """Experts of a mixture, each of which takes so many examples and drops the rest."""

    def __init__(self, capacity: int | None):
        super().__init__()
        self.inner, self.capacity = mlp(), capacity
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        result = torch.zeros_like(out)
        for number, expert in enumerate(self.experts):
            own = ((out[:, 0] > 0).long() == number).nonzero()[:, 0][: self.capacity]
            result = result.index_add(0, own, expert(out[own]))
        return result


def test_a_capacity_that_many_fill_together_is_refused():
    """Four examples of a trial fill no expert."""
    assert_refuses(
        IsolationError,
        "changes with the number of examples in the batch",
        lambda: check_isolation(Capacity(5).train(), (examples(N)[0],), {}, N),
    )
    check_isolation(Capacity(None).train(), (examples(N)[0],), {}, N)


class Placed(nn.Module):
    """Adds to each row what stands at its place: positions of sequence-first inputs, used with the batch first."""

    def __init__(self, by_place: bool):
        super().__init__()
        self.inner, self.by_place = mlp(), by_place
        self.register_buffer("positions", torch.randn(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.positions[: len(x)]) if self.by_place else self.inner(x)


@pytest.mark.parametrize("zero_head", [False, True])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, N])
def test_a_place_that_decides_is_refused_in_batches_of_any_size(n, zero_head):
    for by_place in (True, False):
        model = Placed(by_place).train()
        if zero_head:
            for parameter in model.inner[-1].parameters():
                nn.init.zeros_(parameter)

        def check(model: nn.Module = model) -> None:
            check_isolation(model, (examples(n)[0],), {}, n)

        if by_place:
            assert_refuses(IsolationError, "or with its place among them", check)
        else:
            check()


class Filled(nn.Module):
    """The first ten of a batch pass an expert, before a head that begins at zero: outputs tell nothing of it."""

    def __init__(self, most: int | None):
        super().__init__()
        self.most, self.head = most, DPLinear(6, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        passed = (torch.ones(len(x), 1).cumsum(0) <= (self.most or len(x))).to(x)
        return self.head(x + passed)


def test_what_a_layer_is_given_of_many_is_compared_where_its_weights_are_zero():
    assert_refuses(
        IsolationError,
        "What 'head' is given of example",
        lambda: check_isolation(Filled(10).train(), (examples(N)[0],), {}, N),
    )
    check_isolation(Filled(None).train(), (examples(N)[0],), {}, N)


class Grouped(nn.Module):
    """Sums of groups of rows, which lie in one tensor, over the number of groups."""

    def __init__(self, counts: bool):
        super().__init__()
        self.inner, self.counts = mlp(), counts

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        groups = len(offsets) - 1
        place = torch.bucketize(torch.arange(len(rows)), offsets[1:], right=True)
        sums = torch.zeros(groups, rows.shape[1]).index_add(0, place, rows)
        return self.inner(sums / groups if self.counts else sums)


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_groups_of_rows_that_are_counted_are_refused(n):
    """They cannot be taken apart: each comes twice."""
    offsets = torch.arange(n + 1) * 2
    rows = torch.randn(2 * n, 6, generator=torch.Generator().manual_seed(1))
    assert_refuses(
        IsolationError,
        "changes with the number of examples in the batch",
        lambda: check_isolation(Grouped(True).train(), (rows, offsets), {}, n),
    )
    check_isolation(Grouped(False).train(), (rows, offsets), {}, n)


class Limited(nn.Module):
    """A layer beside what it returns looks at the first ten examples alone."""

    def __init__(self, most: int | None):
        super().__init__()
        self.inner, self.side, self.most = mlp(), DPLinear(6, 3), most

    def forward(self, x: Tensor) -> Tensor:
        self.side(x[: self.most])
        return self.inner(x)


def test_a_layer_that_has_rows_of_some_of_many_examples_is_refused():
    assert_refuses(
        IsolationError,
        "'side' works on 10 rows in a batch of 24 examples and on 6 in one of 6",
        lambda: check_isolation(Limited(10).train(), (examples(N)[0],), {}, N),
    )
    model = Limited(None).train()
    check_isolation(model, (examples(N)[0],), {}, N)
    model.side.register_forward_hook(lambda module, given, output: (output,))  # whose rows nobody counts
    check_isolation(model, (examples(N)[0],), {}, N)


class Counted(nn.Module):
    """Scores of which one is masked, and which count what is above a number of examples."""

    def __init__(self, most: int):
        super().__init__()
        self.inner, self.most = mlp(), most

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + torch.tensor([0.1, 0.1, 0.0]) * max(len(x) - self.most, 0) - torch.tensor([0, 0, 1e9])


@pytest.mark.parametrize(("n", "most"), [(4, 0), (N, 8)])
def test_a_masked_score_hides_no_count(n, most):
    assert_refuses(
        IsolationError,
        "changes with the number of examples in the batch",
        lambda: check_isolation(Counted(most).train(), (examples(n)[0],), {}, n),
    )
    check_isolation(Counted(n).train(), (examples(n)[0],), {}, n)


# Large scores


class Masked(nn.Module):
    """One class of three is masked; the others are centred over the batch, without a gradient of their own."""

    def __init__(self, value: float):
        super().__init__()
        self.inner, self.value = mlp(), value

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        out = out - 0.1 * out.detach().mean(0)
        return out + torch.tensor([0.0, 0.0, self.value])


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4, 0.0])
def test_a_masked_score_hides_nothing_beside_it(value):
    assert_refuses(
        IsolationError,
        "The output for example 0 changes with the other examples",
        lambda: check_isolation(Masked(value).train(), (examples(4)[0],), {}, 4),
    )


# Backward


class Normalised(nn.Module):
    """Normalises the gradient of the whole batch on its way back."""

    def __init__(self, by: str):
        super().__init__()
        self.inner, self.by = mlp(), by

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        if self.by == "batch":
            out.register_hook(lambda gradient: gradient / gradient.norm())
        elif self.by == "example":
            out.register_hook(lambda gradient: gradient / gradient.norm(dim=1, keepdim=True))
        return out * 1.0


def test_a_backward_that_looks_at_the_whole_batch_is_refused():
    assert_refuses(
        IsolationError,
        "changes with the other examples of the batch: something in the model's backward",
        lambda: check_isolation(Normalised("batch").train(), (examples(4)[0],), {}, 4),
    )
    check_isolation(Normalised("example").train(), (examples(4)[0],), {}, 4)


# What a model is, may change


@pytest.mark.parametrize("momentum", [0.1, 1e-4, 1e-6])
def test_a_buffer_that_takes_up_the_examples_is_refused_however_slowly(momentum):
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("centre", torch.ones(3))
            self.register_buffer("never", torch.full((3,), math.nan))
            self.register_buffer("flags", torch.tensor([True, False]))

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            self.centre = torch.lerp(self.centre, 100 * out.detach().mean(0), momentum)
            return out

    assert_refuses(
        IsolationError,
        "The buffer 'centre' takes up statistics",
        lambda: check_isolation(Slow().train(), (examples(4)[0],), {}, 4),
    )


@pytest.mark.parametrize("kind", ["labels", "flags"])
def test_an_output_of_whole_numbers_is_compared_too(kind):
    """Made of the whole batch, it comes back as a label."""

    class Clustered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = self.inner(x)
            above = x[:, 0] > x[:, 0].mean()
            return out, above.long() if kind == "labels" else above

    assert_refuses(
        IsolationError, "The output for example", lambda: check_isolation(Clustered().train(), (examples(4)[0],), {}, 4)
    )


# In some passes


@pytest.mark.parametrize("draw", [lambda: float(torch.rand(())), np.random.rand, random.random])
def test_a_model_that_mixes_in_half_of_its_passes_is_refused(draw):
    """Each check draws anew, so that many together miss it no more often than (1/2)^24."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = DPLinear(6, 3), nn.Linear(3, 3).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            return self.head((out + out.flip(0)) / 2 if draw() < 0.5 else out)

    model = Sometimes().train()
    assert_refuses(
        IsolationError, "example", lambda: [check_isolation(model, (examples(4)[0],), {}, 4, draws=4) for _ in range(6)]
    )


@pytest.mark.parametrize("draws", [1, 3])
def test_a_model_that_draws_is_tried_with_so_many_random_states(draws):
    class Still(Drawing):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(0.0)
            return self.inner(x)

    seen: list[float] = []
    check_isolation(Drawing(seen).train(), (examples(4)[0],), {}, 4, draws=draws)
    states = [seen.count(value) for value in dict.fromkeys(seen) if value != 0.5]  # 0.5 where nothing is drawn
    assert states == [3] * draws  # as it is, and with the others replaced, for two examples
    passes = []
    for number in (1, draws):
        seen.clear()
        check_isolation(Still(seen).train(), (examples(4)[0],), {}, 4, draws=number)
        passes.append(len(seen))
    assert passes[0] == passes[1]


def quiet(outputs: list[list[float]], given: list[list[float]], rows: int) -> Quiet:
    return Quiet(
        [[torch.tensor(row) for row in outputs]],
        [("inner", LayerRows(rows, [torch.tensor(row) for row in given]))],
        {},
        {},
    )


@pytest.mark.parametrize(
    ("outputs", "given", "refused"),
    [
        (([[1.0], [2.0]], [[2.0]]), ([[3.0], [4.0]], [[4.0]]), None),
        (([[1.0], [2.0]], [[1.0]]), ([[3.0], [4.0]], [[4.0]]), "The output for example 7"),
        (([[1.0], [2.0]], [[2.0]]), ([[3.0], [4.0]], [[3.0]]), "What 'inner' is given of example 7"),
        (([[1.0], [2.0]], [[2.0, 1.0]]), ([[3.0], [4.0]], [[4.0]]), None),  # cut to the longest, say
        (([[1.0], [2.0]], [[2.0]]), ([[3.0], [4.0]], [[4.0, 1.0]]), "What 'inner' is given of example 7"),
        (([], [[2.0]]), ([], [[4.0]]), None),  # not of each as many
        (([[1.0, -1e9], [2.0, -1e9]], [[2.002, -1e9]]), ([[3.0], [4.0]], [[4.0]]), "The output for example 7"),
        (([[1.0], [2.0]], [[2.0]]), ([[3.0, -1e9], [4.0, -1e9]], [[4.004, -1e9]]), None),
    ],
)
def test_a_part_of_a_batch_is_compared_with_the_whole(outputs, given, refused):
    whole, part = (quiet(outputs[k], given[k], (10, 5)[k]) for k in (0, 1))

    def compare() -> None:
        _compare_part(whole, part, [3, 7], [7], 2)

    if refused:
        assert_refuses(IsolationError, refused, compare)
    else:
        compare()


def test_what_has_no_rows_of_each_example_is_not_compared():
    _compare_part(quiet([], [], 10), quiet([[2.0]], [[4.0]], 5), [7], [7], 2)
