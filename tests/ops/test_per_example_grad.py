"""Per-example gradients of a product, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_dp.ops.clipped_sum import clipped_sum_pairs
from lora_dp.ops.lora_backward import lora_backward
from lora_dp.ops.per_example_grad import per_example_grad, per_example_grad_and_u
from lora_dp.ops.per_example_norm import ghost_sq_norm
from tests.ops.float64_definitions import (
    DTYPES,
    HALF,
    assert_near,
    examples,
    factors,
    lookups,
    lora_tensors,
    outer,
    shapes,
)


@examples
@given(shape=shapes, dtype=st.sampled_from(DTYPES), scale=st.sampled_from([1.0, 0.25, 3.0]))
def test_per_example_grad(shape, dtype, scale):
    left, right = factors(**shape, dtype=dtype)
    actual, norms = per_example_grad(left, right, scale)
    assert_near(norms, actual.double().flatten(1).norm(dim=1), actual.double().flatten(1).norm(dim=1))
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual.is_contiguous()
    assert_near(actual, outer(left, right, scale), outer(left.abs(), right.abs(), scale))


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
