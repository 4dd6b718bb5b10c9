"""The norm by which an example is clipped is never below that of what is summed, where the kernels take both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_dp.kernels.clip_sum import clip_sum
from lora_dp.kernels.example_grad import example_grad
from lora_dp.kernels.gram import gram_sq_norm
from lora_dp.kernels.launching import DTYPES, INTERPRETED, Config
from lora_dp.privacy.clip_bounds import LARGEST_BOUND, LEAST_BOUND
from tests.norm_paths import PATHS, contribution, drawn, norm, rules

# NumPy's names for C / 0 = inf and for what leaves float32's range, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
SMALL = Config.of(2, 2, CHUNK=16, BLOCK_T=16, BLOCK_R=16, SPAN=16)
powers = st.floats(-149, 127)


@pytest.mark.skipif(not INTERPRETED, reason="the layers of these paths are on the CPU")
@pytest.mark.parametrize("path", [path for path in PATHS if path != "transposed"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    case=st.one_of(drawn(largest_batch=3, largest_tokens=3), drawn(largest_batch=60, largest_tokens=2, hardest=True)),
    rule=rules,
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_one_example_adds_no_more_than_the_bound(path, case, rule, reduction):
    assert contribution(case, PATHS[path], rule, reduction) <= case.bound


def sized(shape: tuple[int, ...], power: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.randn(shape).double() * 2.0**power).clamp(-3e38, 3e38).to(device, dtype)


@pytest.mark.parametrize("config", [None, SMALL])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(wide=powers, skinny=powers, dtype=st.sampled_from(DTYPES), r=st.sampled_from([3, 20]))
def test_norms_of_stored_gradients(device, config, wide, skinny, dtype, r):
    """At any size: those of the very values, to float64's rounding."""
    torch.manual_seed(0)
    factors = sized((2, 5, 40), wide, dtype, device), sized((2, 5, r), skinny, dtype, device)
    found = example_grad(*factors, 0.37, config=config)
    assert found.gradients is not None
    for gradient, sq_norm in zip(found.gradients.cpu(), found.sq_norms.tolist(), strict=True):
        if bool(torch.isfinite(gradient).all()):
            assert sq_norm**0.5 == pytest.approx(norm([gradient]), rel=1e-12, abs=0)
        else:
            assert not sq_norm < float("inf")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(left=powers, right=powers, tokens=st.sampled_from([1, 3, 20]), scale=st.sampled_from([1.0, 1e-30, 1e30]))
def test_ghost_norms(device, left, right, tokens, scale):
    torch.manual_seed(0)
    factors = (sized((2, tokens, 9), left, torch.float32, device), sized((2, tokens, 5), right, torch.float32, device))
    exact = [norm([scale * (p.double().t() @ q.double())]) for p, q in zip(*factors, strict=True)]
    assert gram_sq_norm(*factors, scale).sqrt().tolist() == pytest.approx(exact, rel=1e-6, abs=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    power=st.floats(-150, 128),
    bound=st.sampled_from([LEAST_BOUND, 1e-7, 1.0, 3.7e5, LARGEST_BOUND]),
    rule=rules,
    scale=st.sampled_from([1.0, 7.0, 65_537.0]),
)
def test_clipped_sums(device, power, bound, rule, scale):
    torch.manual_seed(0)
    gradients = [sized((1, 30), power, torch.float32, device), sized((1, 7, 3), power - 1, torch.float32, device)]
    sq_norms = torch.stack([each.double().square().flatten(1).sum(1) for each in gradients])
    coefficients, sums = clip_sum(
        gradients, [0, 1], sq_norms, torch.tensor([0, 1], device=device), 3, rule, bound, 0.01, None, scale
    )
    whole = norm([each * scale for each in gradients])
    assert coefficients.dtype == torch.float64 and bool((coefficients > 0).all())
    assert norm(sums) <= bound
    if rule == "flat":
        assert norm(sums) >= min(whole, bound) * (1 - 1e-5)
