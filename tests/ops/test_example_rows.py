"""Per-example gradients of a lookup table: norms and sums, against float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.float64_definitions import DTYPES, assert_near, lookups, outer


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
