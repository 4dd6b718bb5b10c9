"""Poisson sampling: every example at the same rate, whoever else is drawn."""

import math

import pytest
import torch
from torch import Tensor

from lora_dp.privacy.randomness import SecureSource, SeededSource
from lora_dp.privacy.sampling import PoissonSampler


@pytest.mark.slow
@pytest.mark.parametrize("make_source", [SecureSource, lambda: SeededSource(4)])
def test_every_example_has_the_same_rate(make_source):
    """χ² over 40 examples, 4,000 draws each: by Wilson and Hilferty, a right sampler passes 110 with probability
    below 2e-8."""
    counts = torch.zeros(40, dtype=torch.float64)
    sampler = PoissonSampler(40, 0.15, 4000, make_source())
    for batch in sampler:
        assert batch == sorted(set(batch))
        counts[batch] += 1
    chi2 = ((counts - 600).square() / (600 * 0.85)).sum()
    assert chi2 < 110


def test_a_uniform_value_below_the_rate_takes_part_and_no_other():
    """Of the multiples of 2⁻⁵³ in [0, 1) as many are below the rate as the rate says, if itself is not."""

    class Fixed:
        def uniform(self, n: int) -> Tensor:
            return torch.tensor([0.25, 0.25 - 2.0**-53, 0.0, 0.25 + 2.0**-53], dtype=torch.float64)

    assert PoissonSampler(4, 0.25, 1, Fixed()).draw() == [1, 2]


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.95])
def test_a_sampler_draws_at_its_rate(rate):
    """8,000,000 draws, seeded: 2 % more would be 5.7 deviations at rate 0.01, 37 and more at the others."""
    count = sum(map(len, PoissonSampler(1_000_000, rate, 8, SeededSource(11))))
    assert abs(count / 8e6 - rate) < 2.6 * math.sqrt(rate * (1 - rate) / 8e6)
