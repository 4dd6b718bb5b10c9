"""Filters that know the noise: against their formulas, and by what they promise of signals under noise."""

import math

import numpy as np
import pytest
import torch

from lora_dp import GaussianFilter, JamesStein, SpectralShrinkage
from lora_dp.privacy.shrinkage import check_shrinkage

FILTERS = [JamesStein(), SpectralShrinkage()]
SHAPES = [(4, 30), (30, 4), (1, 50), (12, 12)]


def noise(shape, std=1.0, seed=0):
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rank_one(shape, length):
    """A signal of one direction and that Frobenius norm."""
    left, right = noise((shape[0], 1), seed=7), noise((1, shape[1]), seed=8)
    return length * left @ right / (left.norm() * right.norm())


def james_stein_oracle(grad, std):
    return max(0.0, 1 - (grad.size - 2) * std**2 / (grad**2).sum()) * grad


def spectral_oracle(grad, std):
    """By the eigenvectors of the smaller Gram matrix."""
    if grad.shape[0] > grad.shape[1]:
        return spectral_oracle(grad.T, std).T
    m, n = grad.shape
    out, beta = np.zeros_like(grad), m / n
    values, vectors = np.linalg.eigh(grad @ grad.T)
    for value, vector in zip(values, vectors.T, strict=True):
        y = math.sqrt(max(value, 0)) / (std * math.sqrt(n))
        if y > 1 + math.sqrt(beta):
            eta = math.sqrt((y**2 - beta - 1) ** 2 - 4 * beta) / y
            out += eta / y * np.outer(vector, vector @ grad)
    return out


@pytest.mark.parametrize("std", [1e-3, 0.4, 1.3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shrink, oracle", [(FILTERS[0], james_stein_oracle), (FILTERS[1], spectral_oracle)])
def test_against_the_oracle(shrink, oracle, shape, std):
    grad = rank_one(shape, 20.0) + noise(shape)
    out = shrink(grad, std)
    np.testing.assert_allclose(out.numpy(), oracle(grad.numpy(), std), rtol=1e-9, atol=1e-10)
    assert out.shape == grad.shape and out.dtype == grad.dtype


@pytest.mark.parametrize("shrink", FILTERS)
def test_without_noise_nothing_changes(shrink):
    grad = noise((3, 5)).float()
    assert shrink(grad, 0.0) is grad
    torch.testing.assert_close(shrink(grad, 1e-7), grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shrink", FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_never_longer(shrink, shape):
    for seed in range(50):
        grad = noise(shape, seed=seed) + rank_one(shape, seed / 2)
        assert float(shrink(grad, 1.0).norm()) <= float(grad.norm())


@pytest.mark.parametrize("shape", [(8, 300), (300, 8), (40, 60)])
def test_of_noise_alone_next_to_nothing_is_left(shape):
    parts = {shrink: 0.0 for shrink in FILTERS}
    for seed in range(40):
        grad = noise(shape, 0.3, seed)
        for shrink in FILTERS:
            parts[shrink] += float(shrink(grad, 0.3).norm() / grad.norm()) / 40
    assert parts[FILTERS[0]] < 1 / math.sqrt(math.prod(shape))
    assert parts[FILTERS[1]] < 0.1


@pytest.mark.parametrize("shrink", FILTERS)
@pytest.mark.parametrize("length", [0.0, 10.0, 30.0, 300.0])
def test_its_error_is_below_that_of_the_release(shrink, length):
    """Paired over 60 seeds: the difference is many of its own standard errors away from zero."""
    signal = rank_one((8, 200), length)
    gains = []
    for seed in range(60):
        grad = signal + noise((8, 200), seed=seed)
        gains.append(float((grad - signal).square().sum() - (shrink(grad, 1.0) - signal).square().sum()))
    gains = torch.tensor(gains)
    assert float(gains.mean()) > 5 * float(gains.std()) / math.sqrt(60)


@pytest.mark.parametrize("length", [30.0, 100.0])
def test_of_one_direction_the_spectrum_tells_more(length):
    errors = {shrink: 0.0 for shrink in FILTERS}
    signal = rank_one((40, 60), length)
    for seed in range(10):
        grad = signal + noise((40, 60), seed=seed)
        for shrink in FILTERS:
            errors[shrink] += float((shrink(grad, 1.0) - signal).square().sum())
    assert errors[FILTERS[1]] < errors[FILTERS[0]] / 3


def test_what_has_no_spectrum_or_too_few_numbers_stays():
    bias = noise((7,))
    assert SpectralShrinkage()(bias, 1.0) is bias
    assert JamesStein()(bias, 1.0).norm() < bias.norm()
    pair = noise((2,))
    assert JamesStein()(pair, 1.0) is pair
    assert SpectralShrinkage()(torch.zeros(0, 4), 1.0).shape == (0, 4)
    for shrink in FILTERS:
        assert not shrink(torch.zeros(4, 4), 1.0).any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
@pytest.mark.parametrize("shrink", FILTERS)
def test_lower_precision_is_rounded_only_at_the_end(shrink, dtype, tolerance):
    grad = (rank_one((6, 40), 30.0) + noise((6, 40))).to(dtype)
    out = shrink(grad, 1.0)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), shrink(grad.double(), 1.0), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("shrink", FILTERS)
def test_what_is_refused(shrink):
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="deviation must be a finite number >= 0"):
            shrink(torch.zeros(3, 3), bad)
    with pytest.raises(TypeError, match="deviation must be a number"):
        shrink(torch.zeros(3, 3), "much")
    with pytest.raises(TypeError, match="floating-point"):
        shrink(torch.zeros(3, 3, dtype=torch.int64), 1.0)


@pytest.mark.parametrize("value", [GaussianFilter(1.0), "james-stein", JamesStein, 0.5])
def test_what_is_no_shrinkage_is_refused_by_name(value):
    with pytest.raises(TypeError, match=r"shrinkage must be JamesStein\(\), SpectralShrinkage\(\) or None"):
        check_shrinkage(value)
    for fine in (*FILTERS, None):
        check_shrinkage(fine)
