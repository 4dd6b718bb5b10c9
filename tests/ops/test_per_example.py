"""The ops under the layers against float64 definitions: every shape, half dtypes, NaN, and their fake functions."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_dp.ops.clipped_sum import clipped_sum_kept, clipped_sum_pairs
from lora_dp.ops.example_rows import ExampleRows
from lora_dp.ops.lora_backward import lora_backward
from lora_dp.ops.lora_forward import lora_forward
from lora_dp.ops.per_example_grad import per_example_grad, per_example_grad_and_u
from lora_dp.ops.per_example_norm import ghost_sq_norm

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALF]

sizes = st.integers(1, 9)
shapes = st.fixed_dictionaries(
    {"n": st.integers(0, 4), "tokens": st.integers(1, 7), "p": sizes, "q": sizes, "seed": st.integers(0, 2**16)}
)
examples = settings(max_examples=40, deadline=None)


def factors(n: int, tokens: int, p: int, q: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(n, tokens, p).to(dtype), torch.randn(n, tokens, q).to(dtype)


def outer(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Gᵢ in float64, straight from the definition."""
    return scale * (left.double().unsqueeze(3) * right.double().unsqueeze(2)).sum(1)


def lookups(ids: Tensor, gradient: Tensor, rows: int) -> ExampleRows:
    return ExampleRows.of(ids, gradient, torch.Size((rows, gradient.shape[2])))


def assert_near(actual: Tensor, expected: Tensor, magnitude: Tensor, roundings: float = 8) -> None:
    """Within a few roundings of ``actual``'s dtype of the sum of absolute values that made it up."""
    assert actual.shape == expected.shape
    slack = roundings * torch.finfo(actual.dtype).eps * magnitude.double()
    assert bool(((actual.double() - expected).abs() <= slack).all())


@examples
@given(shape=shapes, dtype=st.sampled_from(DTYPES), scale=st.sampled_from([1.0, 0.25, 3.0]))
def test_per_example_grad(shape, dtype, scale):
    left, right = factors(**shape, dtype=dtype)
    actual, norms = per_example_grad(left, right, scale)
    assert_near(norms, actual.double().flatten(1).norm(dim=1), actual.double().flatten(1).norm(dim=1))
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual.is_contiguous()
    assert_near(actual, outer(left, right, scale), outer(left.abs(), right.abs(), scale))


@examples
@given(shape=shapes, dtype=st.sampled_from(DTYPES), scale=st.sampled_from([1.0, 0.25, 3.0]))
def test_ghost_norm(shape, dtype, scale):
    left, right = factors(**shape, dtype=dtype)
    actual = ghost_sq_norm(left, right, scale)
    assert actual.dtype == torch.float64
    expected = outer(left, right, scale).square().sum((1, 2))
    assert_near(actual.float(), expected, outer(left.abs(), right.abs(), scale).square().sum((1, 2)))
    assert bool((actual >= expected * (1 - 2.0**-45)).all())
    assert bool((actual >= 0).all())


def test_ghost_norm_in_several_tiles():
    left, right = factors(2, 600, 3, 5, 0, torch.float32)
    expected = outer(left, right, 0.5).square().sum((1, 2))
    torch.testing.assert_close(ghost_sq_norm(left, right, 0.5).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e6, 1e8, 1.2e10, 1e15])
def test_ghost_norm_is_never_below_the_norm_where_float64_cancels_too(size):
    """Tokens that a hostile model has made to cancel: a norm of 0 would not be clipped at all."""
    rest = torch.tensor([[30.0, 1.0, 0.0]], dtype=torch.float64)
    huge = torch.full((1, 3), size, dtype=torch.float64)
    left = torch.stack([huge, -huge, rest], 1)
    right = torch.ones(1, 3, 2, dtype=torch.float64)
    norm = float(rest.square().sum() * 2)
    assert norm <= float(ghost_sq_norm(left, right)) <= norm + 1e-13 * (2 * size * 6) ** 2


def test_ghost_norm_where_terms_cancel():
    """Rows that cancel up to one part in 10⁴: float32 Gram matrices would lose most of the norm, float64 ones can have
    lost 10⁻⁵ of it, which is added."""
    torch.manual_seed(0)
    left, right = torch.randn(3, 1, 64), torch.randn(3, 1, 48)
    left, right = torch.cat([left, -left + 1e-4 * torch.randn(3, 1, 64)], 1), torch.cat([right, right], 1)
    expected = outer(left, right, 1.0).square().sum((1, 2))
    lengths = (left.double().norm(dim=2) * right.double().norm(dim=2)).sum(1)
    lost = (2 + 64 + 48) * 2.0**-52 * lengths.square()
    assert bool((lost < 1e-5 * expected).all())
    torch.testing.assert_close(ghost_sq_norm(left, right).double(), expected + lost, rtol=1e-6, atol=0)


@examples
@given(shape=shapes, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_clipped_sum_of_kept_gradients(shape, dtype):
    gradients, _ = per_example_grad(*factors(**shape, dtype=dtype))
    coefficients = torch.rand(shape["n"], dtype=dtype)
    actual = clipped_sum_kept(gradients, coefficients)
    assert actual.dtype == torch.float64
    weights = coefficients.double().view(-1, 1, 1)
    assert_near(actual, (weights * gradients.double()).sum(0), (weights * gradients.double().abs()).sum(0))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_clipped_sum_keeps_the_parameters_shape(shape):
    gradients, coefficients = torch.randn(3, *shape), torch.rand(3)
    expected = torch.tensordot(coefficients.double(), gradients.double(), dims=1)
    torch.testing.assert_close(clipped_sum_kept(gradients, coefficients).double(), expected, rtol=1e-5, atol=1e-6)


@examples
@given(shape=shapes, dtype=st.sampled_from(DTYPES), scale=st.sampled_from([1.0, 0.25]))
def test_clipped_sum_of_pairs(shape, dtype, scale):
    left, right = factors(**shape, dtype=dtype)
    coefficients = torch.rand(shape["n"])
    actual = clipped_sum_pairs(left, right, coefficients, scale)
    assert actual.dtype == torch.float64
    weights = coefficients.double().view(-1, 1, 1)
    assert_near(
        actual, (weights * outer(left, right, scale)).sum(0), (weights * outer(left.abs(), right.abs(), scale)).sum(0)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_excluded_example_adds_exactly_nothing(bad):
    left, right = factors(3, 4, 5, 2, 0, torch.float32)
    left[1, 2], right[1, 0] = bad, bad
    coefficients = torch.tensor([0.5, 0.0, 0.25])
    kept = coefficients != 0
    torch.testing.assert_close(
        clipped_sum_pairs(left, right, coefficients), clipped_sum_pairs(left[kept], right[kept], coefficients[kept])
    )
    gradients, _ = per_example_grad(left, right)
    torch.testing.assert_close(
        clipped_sum_kept(gradients, coefficients), clipped_sum_kept(gradients[kept], coefficients[kept])
    )
    ids = torch.tensor([[0, 1], [1, 1], [2, 0]])
    rows = torch.randn(3, 2, 4)
    rows[1, 0] = bad
    assert torch.equal(
        lookups(ids, rows, 3).weighted_sum(coefficients),
        lookups(ids[kept], rows[kept], 3).weighted_sum(coefficients[kept]),
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_row_shows_in_its_own_norm_alone(bad):
    left, right = factors(3, 4, 5, 2, 0, torch.float32)
    left[1, 2] = bad
    _, direct = per_example_grad(left, right)
    assert torch.isfinite(ghost_sq_norm(left, right)).tolist() == [True, False, True]
    assert torch.isfinite(direct).tolist() == [True, False, True]
    ids = torch.tensor([[0, 1, 1, 2]] * 3)
    assert torch.isfinite(lookups(ids, left, 3).norms()).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", HALF)
def test_half_types_accumulate_in_float32(dtype):
    """4,096 ones: a half-precision accumulator stops at 256 (bfloat16) or 2,048 (float16)."""
    ones = torch.ones(1, 4096, 1, dtype=dtype)
    coefficients = torch.ones(1)
    assert [found.item() for found in per_example_grad(ones, ones)] == [4096, 4096]
    assert ghost_sq_norm(ones, ones).float().item() == 4096**2
    assert clipped_sum_pairs(ones, ones, coefficients).item() == 4096
    ids = torch.zeros(1, 4096, dtype=torch.int64)
    assert lookups(ids, ones, 1).norms().item() == 4096
    assert lookups(ids, ones, 1).weighted_sum(coefficients).item() == 4096


lora_shapes = st.fixed_dictionaries(
    {"rows": st.integers(0, 9), "d_in": sizes, "d_out": sizes, "r": st.integers(1, 4), "seed": st.integers(0, 2**16)}
)


def lora_tensors(rows: int, d_in: int, d_out: int, r: int, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "x": torch.randn(rows, d_in),
        "g": torch.randn(rows, d_out),
        "weight": torch.randn(d_out, d_in),
        "bias": torch.randn(d_out),
        "A": torch.randn(r, d_in),
        "B": torch.randn(d_out, r),
    }


@examples
@given(
    shape=lora_shapes,
    dtype=st.sampled_from([torch.float64, torch.float32]),
    base=st.booleans(),
    with_bias=st.booleans(),
)
def test_lora_forward(shape, dtype, base, with_bias):
    t = {name: tensor.to(dtype) for name, tensor in lora_tensors(**shape).items()}
    weight = t["weight"] if base else None
    y, h = lora_forward(t["x"], weight, t["bias"] if base and with_bias else None, t["A"], t["B"], 0.75)
    assert y.dtype == h.dtype == dtype
    d = {name: tensor.double() for name, tensor in t.items()}

    def definition(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        h = x @ A.t()
        return (x @ weight.t() if base else 0) + (bias if base and with_bias else 0) + 0.75 * (h @ B.t()), h

    names = ("x", "weight", "bias", "A", "B")
    expected, size = definition(*(d[k] for k in names)), definition(*(d[k].abs() for k in names))
    for actual, value, magnitude in zip((y, h), expected, size, strict=True):
        assert_near(actual, value, magnitude)


@examples
@given(shape=lora_shapes, dtype=st.sampled_from([torch.float64, torch.float32]), base=st.booleans())
def test_lora_backward(shape, dtype, base):
    t = {name: tensor.to(dtype) for name, tensor in lora_tensors(**shape).items()}
    dx, u = lora_backward(t["g"], t["weight"] if base else None, t["A"], t["B"], 0.75)
    assert dx.dtype == u.dtype == dtype
    d = {name: tensor.double() for name, tensor in t.items()}

    def definition(g: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        u = g @ B
        return (g @ weight if base else 0) + 0.75 * (u @ A), u

    names = ("g", "weight", "A", "B")
    expected, size = definition(*(d[k] for k in names)), definition(*(d[k].abs() for k in names))
    for actual, value, magnitude in zip((dx, u), expected, size, strict=True):
        assert_near(actual, value, magnitude)


@pytest.mark.parametrize("dtype", HALF)
def test_lora_in_half_precision(dtype):
    """Two products, each rounded to the dtype."""
    t = {name: tensor.to(dtype) for name, tensor in lora_tensors(12, 64, 48, 4, 0).items()}
    y, h = lora_forward(t["x"], t["weight"], t["bias"], t["A"], t["B"], 0.5)
    dx, u = lora_backward(t["g"], t["weight"], t["A"], t["B"], 0.5)
    d = {name: tensor.double() for name, tensor in t.items()}
    expected_h, expected_u = d["x"] @ d["A"].t(), d["g"] @ d["B"]
    expected = {
        "y": d["x"] @ d["weight"].t() + d["bias"] + 0.5 * expected_h @ d["B"].t(),
        "h": expected_h,
        "dx": d["g"] @ d["weight"] + 0.5 * expected_u @ d["A"],
        "u": expected_u,
    }
    for name, actual in {"y": y, "h": h, "dx": dx, "u": u}.items():
        assert actual.dtype == dtype
        relative = (actual.double() - expected[name]).norm() / expected[name].norm()
        assert relative < 2 * torch.finfo(dtype).eps, name


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 4),
    tokens=st.integers(1, 9),
    rows=st.integers(1, 5),
    d=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_embedding_norms_and_sums(n, tokens, rows, d, dtype, seed):
    """Tokens that repeat within an example add up before the norm."""
    torch.manual_seed(seed)
    ids, gradient = torch.randint(rows, (n, tokens)), torch.randn(n, tokens, d).to(dtype)
    one_hot = torch.nn.functional.one_hot(ids, rows)
    found = lookups(ids, gradient, rows)
    assert found.norms().dtype == torch.float64
    assert_near(
        found.norms().square(),
        outer(one_hot, gradient, 1.0).square().sum((1, 2)),
        outer(one_hot, gradient.abs(), 1.0).square().sum((1, 2)),
    )
    coefficients = torch.rand(n)
    weights = coefficients.double().view(-1, 1, 1)
    assert_near(
        found.weighted_sum(coefficients),
        (weights * outer(one_hot, gradient, 1.0)).sum(0),
        (weights * outer(one_hot, gradient.abs(), 1.0)).sum(0),
    )


def op_arguments(n: int, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    left, right = factors(n, 3, 5, 2, 0, dtype)
    t = {name: tensor.to(dtype) for name, tensor in lora_tensors(2 * n, 4, 6, 2, 0).items()}
    coefficients = torch.rand(n)
    return {
        "per_example_grad_and_norm": (left, right, 0.5, None),
        "ghost_sq_norm": (left, right, 0.5),
        "clipped_sum_kept": (per_example_grad(left, right)[0], coefficients),
        "clipped_sum_pairs": (left, right, coefficients, 0.5),
        "lora_forward": (t["x"], t["weight"], t["bias"], t["A"], t["B"], 0.5),
        "lora_backward": (t["g"], t["weight"], t["A"], t["B"], 0.5, None),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("name", list(op_arguments(1, torch.float32)))
def test_opcheck(name, n, dtype):
    """Schema, fake function (shapes, dtypes, strides) and dispatch, as torch checks a custom op."""
    arguments = op_arguments(n, dtype)[name]
    overload = getattr(torch.ops.lora_dp, name).default
    # These run inside the recorded ops' derivatives: none has a gradient of its own.
    torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("swap", [False, True])
def test_opcheck_of_either_orientation(swap):
    left, right = factors(3, 4, 5, 2, 0, torch.float32)
    arguments = (right, left, 0.5, None) if swap else (left, right, 0.5, torch.randn(5, 2))
    torch.library.opcheck(
        torch.ops.lora_dp.per_example_grad_and_norm.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@examples
@given(shape=shapes, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_u_beside_the_gradient(shape, dtype):
    left, right = factors(**shape, dtype=dtype)
    factor = torch.randn(shape["p"], shape["q"]).to(dtype)
    gradients, norms, u = per_example_grad_and_u(left, right, factor, 0.5)
    assert all(map(torch.equal, (gradients, norms), per_example_grad(left, right, 0.5)))
    assert_near(u, left.double() @ factor.double(), left.double().abs() @ factor.double().abs())
    t = lora_tensors(shape["n"], 3, shape["p"], shape["q"], 0)
    g, u = left[:, 0], u[:, 0]
    dx, same = lora_backward(g, None, t["A"].to(dtype), factor, 0.5, u)
    assert same is u
    torch.testing.assert_close(dx, lora_backward(g, None, t["A"].to(dtype), factor, 0.5)[0])


@pytest.mark.parametrize("name", ["lora_forward", "lora_backward"])
def test_opcheck_without_a_base_weight(name):
    arguments = list(op_arguments(2, torch.float32)[name])
    arguments[1] = None
    if name == "lora_forward":
        arguments[2] = None
    overload = getattr(torch.ops.lora_dp, name).default
    torch.library.opcheck(overload, tuple(arguments), test_utils=("test_schema", "test_faketensor"))
