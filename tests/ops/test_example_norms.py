"""Norms of stored per-example values, in float64 whatever their dtype and size."""

import math

import pytest
import torch

from lora_dp.ops.example_norms import example_norms


def test_a_long_vector_of_tiny_numbers_beside_a_large_one():
    """Each is lost when added to 1 in float32; together they are half of the norm."""
    for size in (2**12, 2**20 + 3):
        values = torch.full((2, size), size**-0.5)
        values[0, 0] = 1.0
        expected = values.double().square().sum(1).sqrt()
        torch.testing.assert_close(example_norms(values), expected, rtol=size * 2.0**-54, atol=0)


@pytest.mark.parametrize("size", [3e38, 1e19, 1e-19, 1e-30, 1e-44])
@pytest.mark.parametrize("shape", [(2, 3, 2), (2, 700_000), (0, 4), (2, 0)])
def test_norms_at_any_size(size, shape):
    values = torch.full(shape, size)
    found = example_norms(values)
    assert found.dtype == torch.float64 and found.shape == shape[:1]
    exact = float(values.flatten()[0]) * math.sqrt(math.prod(shape[1:])) if values.numel() else 0.0
    assert found.tolist() == pytest.approx([exact] * shape[0], rel=1e-12, abs=0)


def test_other_devices_have_a_norm_for_each_example_too():
    found = example_norms(torch.empty(3, 4, 5, dtype=torch.bfloat16, device="meta"))
    assert (found.shape, found.dtype) == ((3,), torch.float64)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [3, 600_000])
def test_a_value_that_is_not_finite_shows_in_its_own_norm(bad, size):
    values = torch.ones(3, size)
    values[1, -1] = bad
    assert torch.isfinite(example_norms(values)).tolist() == [True, False, True]
