"""The ghost norm: never below the norm in float64, and hardly above it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_dp.ops.per_example_grad import per_example_grad
from lora_dp.ops.per_example_norm import ghost_sq_norm
from tests.ops.float64_definitions import DTYPES, assert_near, examples, factors, lookups, outer, shapes


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_row_shows_in_its_own_norm_alone(bad):
    left, right = factors(3, 4, 5, 2, 0, torch.float32)
    left[1, 2] = bad
    _, direct = per_example_grad(left, right)
    assert torch.isfinite(ghost_sq_norm(left, right)).tolist() == [True, False, True]
    assert torch.isfinite(direct).tolist() == [True, False, True]
    ids = torch.tensor([[0, 1, 1, 2]] * 3)
    assert torch.isfinite(lookups(ids, left, 3).norms()).tolist() == [True, False, True]
