"""Every op of torch that draws on a CPU: refused from a seed inside a forward, and still where nothing may draw."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_dp.isolation.check import check_isolation
from lora_dp.isolation.deterministic import Still
from lora_dp.nn.layers import DPLinear
from lora_dp.privacy import cpu_draws, secret_state
from tests.drawing_ops import (
    FOR_OTHER_DEVICES,
    NO_OPS,
    WITHOUT_DRAWS,
    arguments,
    call,
    drawing,
    op,
    schemas,
    takes_generator,
)

DRAWING = drawing()
REFUSED = "seeds a generator inside its forward"


class Optimizer:
    """A private one, as far as it says that its randomness is secret."""

    mechanism = SimpleNamespace(source=SimpleNamespace(secure=True))


@pytest.fixture(autouse=True)
def secret() -> Iterator[None]:
    with secret_state.secret_generators():
        yield


@contextmanager
def forward() -> Iterator[None]:
    """A training forward runs."""
    optimizer = Optimizer()
    secret_state.forward_begins(optimizer)
    try:
        yield
    finally:
        secret_state.forward_ends(optimizer)


@contextmanager
def seeded(seed: int = 7) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def moves(draw: Callable[[], Any], generator: torch.Generator) -> bool:
    """Whether a call takes something from a generator."""
    before = generator.get_state()
    draw()
    return not torch.equal(before, generator.get_state())


# What there is


def test_schemas_still_say_what_draws():
    """Else torch has learnt to say it otherwise."""
    assert not set(FOR_OTHER_DEVICES) & WITHOUT_DRAWS.keys()
    assert {"aten::bernoulli_.float", "aten::normal.Tensor_Tensor_out", "aten::binomial"} <= DRAWING.keys()
    assert len(DRAWING) > 100


@pytest.mark.parametrize("name", NO_OPS)
def test_what_is_no_op_cannot_be_dispatched(name):
    try:
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    except RuntimeError as error:
        assert "does not exist" in str(error)


@pytest.mark.parametrize("name", [name for name in FOR_OTHER_DEVICES if name in schemas()])
def test_what_is_for_other_devices_has_no_kernel_for_this_one(name):
    for key in ("CPU", "CompositeImplicitAutograd"):
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd"):
        # Made of the op without out, or of none.
        base = name.rpartition(".")[0] or name
        assert (
            name.endswith(".out")
            and base in FOR_OTHER_DEVICES
            or name in ("aten::_scaled_dot_product_fused_attention_overrideable", "rngprims::philox_rand")
        )


def test_attention_without_dropout_alone_has_a_kernel_of_its_own():
    x = torch.ones(2, 2, 4, 8)
    with pytest.raises(RuntimeError, match="dropout"):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x, 0.5)


@pytest.mark.parametrize("name", DRAWING)
def test_each_kernel_for_the_cpu_that_draws_is_replaced_or_asks_first(name):
    """Not only the calls that are tried below: whatever the arguments."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU") and name != "aten::native_dropout":
        [line] = re.findall(r"(?m)^CPU: registered at (.*?):\d+ ::", torch._C._dispatch_dump(name))
        assert line == cpu_draws.__file__
    # Other layouts of a CPU's tensors, all of which draw by one of those above.
    keys = set(re.findall(rf"(?m)^({LAYOUTS})\b.*: registered", torch._C._dispatch_dump(name)))
    assert keys <= OTHER_LAYOUTS.get(name, {}).keys()


LAYOUTS = "SparseCPU|SparseCsrCPU|NestedTensorCPU|QuantizedCPU|MkldnnCPU|CompositeImplicitAutogradNestedTensor"
NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
OTHER_LAYOUTS: dict[str, dict[str, Callable[[], Any]]] = {
    "aten::normal_": {
        "SparseCsrCPU": lambda: torch.eye(3).to_sparse_csr().normal_(),
        "NestedTensorCPU": lambda: NESTED.normal_(),
    },
    "aten::native_dropout": {"NestedTensorCPU": lambda: torch.native_dropout(NESTED, 0.5, True)},
    "aten::randn_like": {"CompositeImplicitAutogradNestedTensor": lambda: torch.randn_like(NESTED)},
    "aten::randn_like.generator": {
        "CompositeImplicitAutogradNestedTensor": lambda: torch.ops.aten.randn_like.generator(NESTED, generator=None)
    },
}
CALLS: dict[str, Callable[[], Any]] = {name: call(schema) for name, schema in DRAWING.items()} | {
    f"{name} {key}": draw for name, layouts in OTHER_LAYOUTS.items() for key, draw in layouts.items()
}


# Refused


@pytest.mark.parametrize("name", CALLS)
def test_a_seed_inside_a_forward_is_refused_whatever_draws(name):
    draw = CALLS[name]
    with seeded():
        assert moves(draw, torch.default_generator)  # so that it is a draw that is refused
    with forward():
        assert moves(draw, torch.default_generator)
        with seeded(), pytest.raises(RuntimeError, match=REFUSED):
            draw()
        with seeded(), torch.inference_mode(), pytest.raises(RuntimeError, match=REFUSED):
            draw()


@pytest.mark.parametrize("name", [name for name, schema in DRAWING.items() if takes_generator(schema)])
def test_a_generator_of_the_models_own_is_refused_whatever_draws(name):
    own = torch.Generator().manual_seed(7)
    draw = call(DRAWING[name], generator=own)
    assert moves(draw, own)
    with forward(), pytest.raises(RuntimeError, match=REFUSED):
        draw()


@pytest.mark.parametrize("name", DRAWING)
def test_a_seed_outside_of_a_forward_gives_the_same_values_again(name):
    def drawn(seed: int) -> list[Tensor]:
        with seeded(seed):
            return [leaf for leaf in pytree.tree_leaves(call(DRAWING[name])()) if isinstance(leaf, Tensor)]

    assert all(torch.equal(one, other) for one, other in zip(drawn(1), drawn(1), strict=True))
    # Among 12 numbers or more: of an order of six, five seeds are enough.
    assert any(
        not torch.equal(one, other) for seed in range(2, 7) for one, other in zip(drawn(1), drawn(seed), strict=True)
    )


def test_bernoulli_into_another_tensor_is_that_of_the_secret_key(monkeypatch):
    state, p = torch.get_rng_state(), torch.full((4, 50), 0.5)
    drawn = torch.bernoulli(p, out=torch.empty(0, dtype=torch.float64))
    assert drawn.shape == p.shape and drawn.dtype == torch.float64 and 0 < drawn.mean() < 1
    torch.set_rng_state(state)
    assert torch.equal(torch.bernoulli(p), drawn.float())
    torch.set_rng_state(state)
    monkeypatch.setattr(cpu_draws, "_secret_key", lambda: None)
    assert not torch.equal(torch.bernoulli(p, out=torch.empty(0)), drawn.float())


# Still


def values(name: str, rows: int = 6, seed: int = 0) -> list[Tensor]:
    """What a call returns where nothing draws."""
    draw = call(DRAWING[name], rows)
    with seeded(seed), Still():
        return [leaf for leaf in pytree.tree_leaves(draw()) if isinstance(leaf, Tensor)]


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
