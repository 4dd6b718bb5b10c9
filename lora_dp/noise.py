"""Gaussian noise on a grid.

Adding floating-point noise to a floating-point sum leaks the sum through the gaps of the number format (Mironov
2012, doi 10.1145/2382196.2382264). Here the sum and the noise are each rounded to one grid whose step is a power
of two, and added exactly as integers: the release is a function of the rounded sum plus a rounded Gaussian, so
it is post-processing of a mechanism with slightly larger sensitivity (:func:`grid_sensitivity`).
"""

import math
from typing import Protocol

import torch
from torch import Tensor

# The grid is at most 2⁻³² of the deviation: values up to 2²¹ deviations stay exact in float64's 53 bits.
GRID_BITS = 32


class NormalSource(Protocol):
    """Where standard normal draws come from (``lora_dp.randomness``)."""

    def normal(self, n: int) -> Tensor:
        """``n`` independent standard normals, float64, on the CPU."""
        ...


def grid_step(std: float) -> float:
    """The grid's step for noise of deviation ``std`` > 0: a power of two, at most std · 2⁻³²."""
    return math.ldexp(1.0, math.floor(math.log2(std)) - GRID_BITS)


def grid_sensitivity(sensitivity: float, noise_multiplier: float, size: int) -> float:
    """Sensitivity of the rounded sum of ``size`` values.

    Rounding moves each coordinate of either of two neighbouring sums by at most half a step, so their distance
    grows by at most √size · step, and step ≤ 2⁻³² · noise_multiplier · (the result). Solved for the result.

    Raises:
        ValueError: the noise is so large that the grid's rounding alone exceeds the sensitivity.
    """
    rounding = math.sqrt(size) * noise_multiplier * 2.0**-GRID_BITS
    if rounding >= 0.5:
        raise ValueError(f"noise_multiplier {noise_multiplier:g} is too large for a sum of {size} numbers: lower it.")
    return sensitivity / (1 - rounding)


def add_noise(value: Tensor, std: float, source: NormalSource) -> Tensor:
    """``value`` plus Gaussian noise of deviation ``std``, both rounded to one grid.

    Args:
        value: the clipped sum, any shape, float32 or float64, finite.
        std: deviation of the noise in the units of ``value``; 0 returns ``value`` itself.
        source: of standard normals.

    Returns:
        The shape, dtype and device of ``value``.
    """
    if std == 0:
        return value
    step = grid_step(std)
    noise = source.normal(value.numel()).mul_(std / step).round_().view(value.shape).to(value.device)
    # Float64 holds these integers exactly; the cast back to float32 only post-processes the release.
    total = value.to(torch.float64).div(step).round_().add_(noise)
    return total.mul_(step).to(value.dtype)
