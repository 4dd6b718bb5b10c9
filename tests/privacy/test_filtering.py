"""Low-pass filters against explicit sums and dense solves in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lora_dp.privacy.filtering import GaussianFilter, LaplacianFilter, make_filter

SHAPES = [(4, 37), (37, 4), (1, 9), (9, 1), (6, 6), (3, 2), (1, 1)]
STRENGTHS = [0.2, 1.0, 3.7]
FILTERS = [GaussianFilter, LaplacianFilter]


def random_matrix(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gaussian_oracle(grad: np.ndarray, std: float) -> np.ndarray:
    if grad.shape[0] > grad.shape[1]:
        return gaussian_oracle(grad.T, std).T
    radius, length = math.ceil(4 * std), grad.shape[1]
    weights = {k: math.exp(-0.5 * k * k / std**2) for k in range(-radius, radius + 1)}
    out = np.zeros_like(grad)
    for row in range(grad.shape[0]):
        for column in range(length):
            for k, weight in weights.items():
                out[row, column] += weight * grad[row, min(max(column + k, 0), length - 1)]
    return out / sum(weights.values())


def laplacian_oracle(grad: np.ndarray, sigma: float) -> np.ndarray:
    def ring(size: int) -> np.ndarray:  # graph Laplacian of a ring; of two nodes, joined by two edges
        eye = np.eye(size)
        return 2 * eye - np.roll(eye, 1, axis=0) - np.roll(eye, -1, axis=0)

    rows, columns = grad.shape
    laplacian = np.kron(ring(rows), np.eye(columns)) + np.kron(np.eye(rows), ring(columns))
    return np.linalg.solve(np.eye(rows * columns) + sigma * laplacian, grad.ravel()).reshape(grad.shape)


ORACLES = {GaussianFilter: gaussian_oracle, LaplacianFilter: laplacian_oracle}


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_oracle(kind, strength, shape):
    grad = random_matrix(shape)
    expected = ORACLES[kind](grad.numpy(), strength)
    np.testing.assert_allclose(kind(strength)(grad).numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_lower_precision_is_rounded_only_at_the_end(kind, dtype, tolerance):
    grad = random_matrix((8, 301), dtype)
    out = kind(2.0)(grad)
    assert out.dtype == dtype and out.shape == grad.shape and out.is_contiguous()
    expected = kind(2.0)(grad.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_constant_passes_unchanged(kind, strength):
    for shape in SHAPES:
        constant = torch.full(shape, -3.25, dtype=torch.float64)
        torch.testing.assert_close(kind(strength)(constant), constant, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", FILTERS)
def test_linear_and_fixed(kind):
    first, second = random_matrix((5, 40), seed=1), random_matrix((5, 40), seed=2)
    smooth = kind(1.5)
    together = smooth(2 * first - 7 * second)
    torch.testing.assert_close(together, 2 * smooth(first) - 7 * smooth(second), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(smooth(1e6 * first), 1e6 * smooth(first), rtol=1e-12, atol=1e-6)
    before = first.clone()
    smooth(first)
    assert torch.equal(first, before)


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_gaussian_shrinks_white_noise_by_the_closed_form(strength):
    noise = random_matrix((200, 1000), seed=3)
    radius = math.ceil(4 * strength)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / strength) ** 2)
    weights /= weights.sum()
    inside = GaussianFilter(strength)(noise)[:, radius:-radius]  # at the ends repeated entries weigh more
    assert inside.var().item() == pytest.approx((weights**2).sum(), rel=0.02)


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_laplacian_shrinks_white_noise_by_the_closed_form(strength):
    rows, columns = 200, 4000
    noise = random_matrix((rows, columns), seed=4)
    first = 2 * np.pi * np.arange(rows)[:, None] / rows
    second = 2 * np.pi * np.arange(columns)[None, :] / columns
    gain = 1 / (1 + 2 * strength * (2 - np.cos(first) - np.cos(second)))
    assert LaplacianFilter(strength)(noise).var().item() == pytest.approx((gain**2).mean(), rel=0.02)


@pytest.mark.parametrize("kind", FILTERS)
def test_identity_at_strength_zero(kind):
    grad = random_matrix((3, 5), torch.bfloat16)
    assert kind(0.0)(grad) is grad


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_what_is_refused(kind, strength):
    for shape in ((), (5,), (2, 3, 4)):
        with pytest.raises(ValueError, match="2-D gradient of a low-rank factor.*unfiltered"):
            kind(strength)(torch.zeros(shape))
    with pytest.raises(TypeError, match="floating-point"):
        kind(strength)(torch.zeros(2, 3, dtype=torch.int64))
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="strength must be a finite number >= 0.*turns it off"):
            kind(bad)


@pytest.mark.parametrize("kind", FILTERS)
def test_stays_on_the_inputs_device_and_takes_empty_matrices(kind):
    assert kind(1.0)(torch.zeros(4, 9, device="meta")).device.type == "meta"
    if torch.cuda.is_available():
        grad = random_matrix((4, 99), torch.float32)
        torch.testing.assert_close(kind(1.0)(grad.cuda()).cpu(), kind(1.0)(grad), rtol=1e-5, atol=1e-6)
    assert kind(1.0)(torch.zeros(0, 9)).shape == (0, 9)


def test_make_filter():
    assert make_filter("gaussian", 1.5) == GaussianFilter(1.5)
    assert make_filter("laplacian", 0.0) == LaplacianFilter(0.0)
    assert make_filter(None, 1.0) is None
    with pytest.raises(ValueError, match="Unknown low-pass filter 'median': choose 'gaussian', 'laplacian' or None"):
        make_filter("median", 1.0)
