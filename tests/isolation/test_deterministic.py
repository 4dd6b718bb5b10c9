"""A model without chance: every op of torch that draws gives what could be drawn, the same in every batch."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_dp.isolation.check import check_isolation
from lora_dp.isolation.deterministic import Still
from lora_dp.nn.layers import DPLinear
from lora_dp.privacy import secret_state
from tests.drawing_calls import DRAWING, REFUSED, forward, moves, seeded
from tests.drawing_ops import arguments, call, op, takes_generator


@pytest.fixture(autouse=True)
def secret() -> Iterator[None]:
    with secret_state.secret_generators():
        yield


def values(name: str, rows: int = 6, seed: int = 0) -> list[Tensor]:
    """What a call returns where nothing draws."""
    draw = call(DRAWING[name], rows)
    with seeded(seed), Still():
        return [leaf for leaf in pytree.tree_leaves(draw()) if isinstance(leaf, Tensor)]


@pytest.mark.slow
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", DRAWING)
def test_nothing_is_drawn_where_all_is_still(name, inference):
    with torch.inference_mode(inference):
        first, second, longer = values(name), values(name, seed=1), values(name, rows=10)
    for one, other, more in zip(first, second, longer, strict=True):
        assert torch.equal(one, other) and bool(one.isfinite().all())
        assert one.dtype == other.dtype == more.dtype
        if one.shape[0] == 6 and more.shape[0] == 10:  # an example's rows, whatever the batch
            assert torch.equal(one, more[:6])


@pytest.mark.parametrize("name", [name for name, schema in DRAWING.items() if takes_generator(schema)])
def test_a_generator_of_the_models_own_stays_where_it_is(name):
    own = torch.Generator().manual_seed(7)
    with Still():
        assert not moves(call(DRAWING[name], generator=own), own)


def written(schema: Any) -> list[str]:
    """Arguments that an op writes to and returns."""
    return [
        argument.name
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name != "noise"
    ]


@pytest.mark.parametrize("name", [name for name, schema in DRAWING.items() if written(schema)])
def test_outputs_and_inputs_in_place_are_what_is_returned(name):
    """Else the tensor that the model goes on with has what was drawn."""
    schema = DRAWING[name]
    given = arguments(schema)
    args = [given[argument.name] for argument in schema.arguments if not argument.kwarg_only]
    named = {argument.name: given[argument.name] for argument in schema.arguments if argument.kwarg_only}
    with Still():
        returned = pytree.tree_leaves(op(schema)(*args, **named))
    for place, result, value in zip(written(schema), returned, values(name), strict=True):
        assert given[place] is result and torch.equal(result, value)


def still(draw: Callable[[], Tensor]) -> Tensor:
    with Still():
        return draw()


def test_what_stands_for_a_draw_is_one_that_could_be():
    weights = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])
    assert still(lambda: torch.multinomial(weights, 3)).tolist() == [[1, 2, 0], [0, 2, 1]]
    assert still(lambda: torch.multinomial(weights, 5, replacement=True)).tolist() == [[1] * 5, [0] * 5]
    assert still(lambda: torch.multinomial(weights[0], 2)).tolist() == [1, 2]
    assert still(lambda: torch.poisson(torch.tensor([0.2, 3.7]))).tolist() == [0, 4]
    assert still(lambda: torch.binomial(torch.tensor([9.0, 4.0]), torch.tensor([0.5, 1.0]))).tolist() == [4, 4]
    assert still(lambda: torch._sample_dirichlet(torch.tensor([[1.0, 3.0]]))).tolist() == [[0.25, 0.75]]
    assert still(lambda: torch._standard_gamma(torch.tensor([2.0]))).tolist() == [2]
    assert still(lambda: torch.normal(torch.tensor([1.0, 2.0]), 3.0)).tolist() == [2.5, 3.5]
    assert still(lambda: torch.normal(1.5, torch.ones(2))).tolist() == [2, 2]
    assert still(lambda: torch.normal(torch.tensor([[1.0], [2.0]]), torch.ones(2))).tolist() == [[1.5, 1.5], [2.5, 2.5]]
    assert still(lambda: torch.empty(2).random_(5, 9)).tolist() == [5, 5]
    assert still(lambda: torch.randint(-3, 9, (2,))).tolist() == [-3, -3]
    assert still(lambda: torch.randint(9, (2,))).tolist() == [0, 0]
    assert still(lambda: torch.empty(1).log_normal_(0.0, 2.0)).tolist() == [pytest.approx(math.e)]
    assert still(lambda: torch.empty(1).exponential_(2.0)).tolist() == [0.5]
    assert still(lambda: torch.randperm(4)).tolist() == [0, 1, 2, 3]
    out = torch.empty(4, dtype=torch.int64)
    assert still(lambda: torch.randperm(4, out=out)) is out and out.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "distribution",
    [
        lambda x: torch.distributions.Normal(x, 1.0),
        lambda x: torch.distributions.Beta(x, 1.0),
        lambda x: torch.distributions.Gamma(x, 1.0),
        lambda x: torch.distributions.Dirichlet(x),
        lambda x: torch.distributions.StudentT(x),
        lambda x: torch.distributions.Poisson(x),
        lambda x: torch.distributions.Binomial(5, x / 9),
        lambda x: torch.distributions.Categorical(x),
        lambda x: torch.distributions.LogNormal(x, 1.0),
        lambda x: torch.distributions.Cauchy(x, 1.0),
        lambda x: torch.distributions.Exponential(x),
        lambda x: torch.distributions.Geometric(x / 9),
        lambda x: torch.distributions.VonMises(x, 1.0),
        lambda x: torch.distributions.Multinomial(3, x),
    ],
)
def test_distributions_are_still_and_refused(distribution):
    x = torch.arange(1.0, 9.0).view(2, 4)
    with seeded(1):
        first = still(lambda: distribution(x).sample())
    with seeded(2):
        assert torch.equal(first, still(lambda: distribution(x).sample())) and bool(first.isfinite().all())
    with forward():
        distribution(x).sample()
        with seeded(), pytest.raises(RuntimeError, match=REFUSED):
            distribution(x).sample()


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.distributions.Normal(x, 1.0).sample(),
        lambda x: torch.randint(0, 9, x.shape),
        lambda x: torch.randint_like(x, 9),
        lambda x: torch.multinomial(x.abs() + 1, 8, replacement=True),
        lambda x: torch.bernoulli(x.sigmoid(), out=torch.empty_like(x)),
    ],
)
def test_a_model_that_draws_so_mixes_no_examples(draw):
    """Its trials with another number of examples compare what is not drawn. (Where the number of draws hangs on what an
    example holds, as in a Poisson sampler, those in batches of one size already tell examples apart, and refuse.)"""

    class Net(torch.nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x + draw(x.detach()))

    check_isolation(Net(DPLinear(8, 3)), (torch.randn(6, 8),), {}, 6)


def test_a_leaky_rectifier_of_random_slope_has_the_middle_one_backwards_too():
    x = torch.tensor([-2.0, 4.0], requires_grad=True)
    with Still():
        y = F.rrelu(x, 0.25, 0.75, training=True)
        y.sum().backward()
    assert y.tolist() == [-1, 4] and x.grad.tolist() == [0.5, 1]


def test_an_op_that_is_not_known_is_refused():
    from torch.library import Library

    library = Library("lora_dp_test", "FRAGMENT")
    library.define("novel(Tensor self, *, Generator? generator=None) -> Tensor")
    library.impl("novel", lambda x, generator=None: torch.rand_like(x), "CPU")
    with Still(), pytest.raises(RuntimeError, match="draws at random by lora_dp_test::novel, which lora_dp does"):
        torch.ops.lora_dp_test.novel(torch.ones(2))
