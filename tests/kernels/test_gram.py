"""The ghost norm's kernel against the norm of the gradient in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_dp.kernels.gram import CONFIGS, gram_sq_norm
from lora_dp.kernels.launching import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
examples = settings(max_examples=20, deadline=None)


def factors(n: int, tokens: int, p: int, q: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(n, tokens, p).to(device, dtype), torch.randn(n, tokens, q).to(device, dtype)


def expected(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return (scale * torch.einsum("ntp,ntq->npq", left.double(), right.double())).square().sum((1, 2))


def check(actual: Tensor, reference: Tensor) -> None:
    """Float64 inside and out."""
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, reference, rtol=1e-12, atol=0)


@examples
@given(
    n=st.integers(1, 3),
    tokens=st.integers(1, 40),
    p=st.integers(1, 40),
    q=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 0.25]),
    name=st.sampled_from(sorted(CONFIGS)),
)
def test_norms(device, n, tokens, p, q, dtype, scale, name):
    torch.manual_seed(0)
    left, right = factors(n, tokens, p, q, dtype, device)
    check(gram_sq_norm(left, right, scale, config=CONFIGS[name]), expected(left, right, scale))


@pytest.mark.parametrize("sizes", [(33, 5), (4, 12), (16, 40)])
@pytest.mark.parametrize("name", CONFIGS)
def test_many_tiles(device, name, sizes):
    left, right = factors(1, 70, *sizes, torch.float32, device)
    first = gram_sq_norm(left, right, 0.5, config=CONFIGS[name])
    check(first, expected(left, right, 0.5))
    assert torch.equal(first, gram_sq_norm(left, right, 0.5, config=CONFIGS[name]))


@pytest.mark.parametrize("tokens", [1, 20])
def test_any_strides(device, tokens):
    """Windows of one example, transposed factors, every other column, one row for all tokens."""
    base = torch.randn(2, 12, 2 * tokens, device=device)
    left = base.transpose(1, 2)[:, ::2]
    right = torch.randn(2, 1, 18, device=device)[:, :, ::2].expand(2, tokens, 9)
    check(gram_sq_norm(left, right, 1.0), expected(left, right, 1.0))


def test_terms_that_cancel(device):
    """Rows that cancel to one part in 10⁴: in float32 most of the norm would be lost."""
    torch.manual_seed(0)
    left, right = torch.randn(3, 1, 64), torch.randn(3, 1, 48)
    left, right = torch.cat([left, -left + 1e-4 * torch.randn(3, 1, 64)], 1), torch.cat([right, right], 1)
    left, right = left.to(device), right.to(device)
    torch.testing.assert_close(gram_sq_norm(left, right, 1.0), expected(left, right, 1.0), rtol=1e-6, atol=0)


def test_zero_is_not_below_zero(device):
    """Three tokens whose gradients add up to exactly nothing: without a bound, rounding goes either way."""
    torch.manual_seed(0)
    a, b = torch.randint(-(2**20), 2**20, (2, 32, 1, 64)).float()
    left, right = torch.cat([a, b, -(a + b)], 1).to(device), torch.randn(32, 1, 48).expand(32, 3, 48).to(device)
    assert (gram_sq_norm(left, right, 1.0) >= 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_bad_example_keeps_to_itself(device, bad, tokens):
    left, right = factors(3, tokens, 9, 5, torch.float32, device)
    left[1, -1, 3] = bad
    assert torch.isfinite(gram_sq_norm(left, right, 1.0)).tolist() == [True, False, True]


def test_what_lies_beside_a_view_does_not_enter(device):
    storage = torch.full((2, 19, 12), float("nan"), device=device)
    left = storage[:, 1:18, 2:11]
    left.copy_(torch.randn(2, 17, 9))
    right = torch.randn(2, 17, 5, device=device)
    check(gram_sq_norm(left, right, 1.0), expected(left, right, 1.0))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_nothing_gives_zeros(device, shape):
    left = torch.empty(shape, device=device)
    assert gram_sq_norm(left, left, 1.0).tolist() == [0.0] * shape[0]


def test_faults_are_named(device):
    left = torch.zeros(2, 3, 4, device=device)
    with pytest.raises(ValueError, match=r"gram_sq_norm: right must have the shape \(2, 3, any\), got \(2, 4, 4\)"):
        gram_sq_norm(left, torch.zeros(2, 4, 4, device=device), 1.0)
    with pytest.raises(TypeError, match="gram_sq_norm: right must be float32, got bfloat16"):
        gram_sq_norm(left, left.bfloat16(), 1.0)
    with pytest.raises(TypeError, match="gram_sq_norm: left must be float32 or bfloat16 or float16, got float64"):
        gram_sq_norm(left.double(), left.double(), 1.0)
    with pytest.raises(ValueError, match="gram_sq_norm: left must be on"):
        gram_sq_norm(left.to("meta"), left.to("meta"), 1.0)
