"""Clipped sums of kept gradients and of pairs, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_dp.ops.clipped_sum import clipped_sum_kept, clipped_sum_pairs
from lora_dp.ops.per_example_grad import per_example_grad
from tests.ops.float64_definitions import DTYPES, assert_near, examples, factors, lookups, outer, shapes


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
