"""The mechanism: noise that matches the sensitivity of what is summed."""

import math
import sys

import pytest
import torch

from lora_dp.privacy.clipping import make_clip_rule
from lora_dp.privacy.mechanism import Mechanism
from lora_dp.privacy.noise import grid_sensitivity, grid_step
from lora_dp.privacy.randomness import SeededSource
from tests.models import assert_refuses
from tests.privacy.silence import Silence


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("bound", [0.999, 1.0, 1.3])
@pytest.mark.parametrize("sigma", [0.999, 1.0, 7.0, 0.9999 * 2.0**-12, 1e-6, 2.0**-45])
def test_the_grid_of_a_step_is_that_of_a_release(sigma, bound, size):
    """Step and deviation in steps: std / step of them, and one at least."""
    source = Silence()
    mechanism = Mechanism(make_clip_rule("flat", bound), sigma, source)
    std, (step, scale) = mechanism.noise_std(size), mechanism.grid(size)
    assert step == grid_step(std, bound) and scale == max(std / step, 1)
    assert (scale == 1) == (sigma == 2.0**-45)
    # An odd number of steps is on this grid, and on none that is coarser.
    value = torch.full((size,), 3 * step, dtype=torch.float64)
    assert torch.equal(mechanism.release([value])[0], value) and source.scale == scale
    half = torch.full((size,), 0.6 * step, dtype=torch.float64)
    assert torch.equal(mechanism.release([half])[0], torch.full((size,), step, dtype=torch.float64))


def test_without_noise_there_is_no_grid():
    assert Mechanism(make_clip_rule("flat", 0.3), 0.0, Silence()).grid(5) == (1.0, 0.0)


def test_the_least_noise_has_64_bits_below_it():
    least = sys.float_info.min * 2.0**64
    rule = make_clip_rule("flat", 1.0)
    assert Mechanism(rule, 1.001 * least, SeededSource(0)).noise_std(1) == pytest.approx(1.001 * least)
    assert_refuses(
        ValueError, "is noise too small", lambda: Mechanism(rule, 0.999 * least, SeededSource(0)).noise_std(1)
    )


def test_noise_that_underflows_is_refused():
    mechanism = Mechanism(make_clip_rule("flat", 1e-20), 1e-290, SeededSource(0))
    assert_refuses(ValueError, "is noise too small for floating-point numbers", lambda: mechanism.noise_std(3))


def test_rounded_neighbours_stay_within_the_grid_sensitivity():
    sigma, size = 50.0, 40_000
    mechanism = Mechanism(make_clip_rule("flat", 1.0), sigma, Silence())
    generator = torch.Generator().manual_seed(0)
    apart = torch.randn(size, generator=generator, dtype=torch.float64)
    first = torch.randn(size, generator=generator, dtype=torch.float64)
    left, right = mechanism.release([first])[0], mechanism.release([first + apart / apart.norm()])[0]
    assert not torch.equal(left, first)
    assert (left - right).norm() <= mechanism.noise_std(size) / sigma


@pytest.mark.parametrize(("sigma", "size"), [(2.0**31, 1), (1e6, 10**9), (2.0**21, 2**20), (1e300, 3)])
def test_noise_whose_rounding_exceeds_the_sensitivity_is_refused(sigma, size):
    """√size · σ · 2⁻³² ≥ 1/2: the grid would be as coarse as what it rounds."""
    words = f"noise_multiplier {sigma:g} is too large for a sum of {size} numbers: lower it."
    assert_refuses(ValueError, words, lambda: grid_sensitivity(1.0, sigma, size))
    mechanism = Mechanism(make_clip_rule("flat", 1.0), sigma, SeededSource(0))
    assert_refuses(ValueError, words, lambda: mechanism.noise_std(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_noise_the_value_is_released_as_it_is(dtype):
    value = torch.tensor([0.1, -0.3], dtype=dtype)
    mechanism = Mechanism(make_clip_rule("flat", 1.0), 0.0, SeededSource(0))
    (released,) = mechanism.release([value])
    assert released.dtype == torch.float64 and torch.equal(released, value.double())
    assert mechanism.noise_std(2) == 0.0


@pytest.mark.parametrize("sigma", [0.5, 3.0])
@pytest.mark.parametrize("rule", ["flat", "per_layer", "automatic"])
def test_deviation_is_sigma_times_the_sensitivity(rule, sigma):
    mechanism = Mechanism(make_clip_rule(rule, 0.7), sigma, SeededSource(1))
    assert mechanism.noise_std(1000) == pytest.approx(sigma * 0.7, rel=1e-6)
    assert mechanism.noise_std(1000) > sigma * 0.7  # the grid's share


def test_every_tensor_of_a_release_gets_noise_of_its_own():
    sums = [torch.zeros(4, 5), torch.zeros(20)]
    first, second = Mechanism(make_clip_rule("flat", 1.0), 1.0, SeededSource(1)).release(sums)
    assert first.shape == (4, 5) and second.shape == (20,)
    assert not torch.isclose(first.flatten(), second).any()


def test_mask_zeroes_coefficients():
    mechanism = Mechanism(make_clip_rule("flat", 1.0), 1.0, SeededSource(1))
    coefficients = mechanism.coefficients(
        torch.full((2, 3), 0.01), torch.tensor([0, 1]), 2, torch.tensor([True, False, True])
    )
    assert coefficients.tolist() == [[1, 0, 1]] * 2


@pytest.mark.parametrize(
    ("sigma", "bound", "words"),
    [
        (-1.0, 1.0, "noise_multiplier must be"),
        (math.nan, 1.0, "noise_multiplier must be"),
        (math.inf, 1.0, "noise_multiplier must be"),
        (1.0, math.inf, "set a finite max_grad_norm"),
    ],
)
def test_bad_noise_is_refused(sigma, bound, words):
    assert_refuses(ValueError, words, lambda: Mechanism(make_clip_rule("flat", bound), sigma, SeededSource(0)))
