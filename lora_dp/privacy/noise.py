"""Gaussian noise on a grid, safe against attacks on floating-point numbers.

*The attack.* Floating-point noise added to a floating-point sum leaks the sum: the gaps of the number format, and the
holes in what a generator can return, tell neighbouring inputs apart (Mironov 2012, doi 10.1145/2382196.2382264; for
Gaussian noise Holohan and Braghin 2021, arXiv 2107.10138, and Jin et al. 2022, arXiv 2112.05307).

*The release.* Let Δ be the grid's step, a power of two, and R rounding to multiples of Δ. What leaves is

    R(S) + Δ · round(z · std / Δ)        z ~ N(0, I), std = σ · (sensitivity below)

with S the clipped sum, or with Σᵢ R(cᵢgᵢ) in place of R(S), each example rounded by itself. Both terms are multiples
of Δ and are added as integers, so the release equals R(R(S) + std · z): a function of R(S) + std · z alone, the
Gaussian mechanism on R(S). It is exactly as private as that mechanism, with no assumption about the format of numbers.
(The discrete Gaussian of Canonne, Kamath and Steinke 2020, arXiv 2004.00010, is another way to the same end; its
privacy resembles the Gaussian's, while this release inherits it, amplification by sampling included.) The integer is
turned into a float by one multiplication with Δ, exact below 2⁵³ steps, and otherwise, like a cast to the parameter's
dtype, a function of what may leave anyway.

*What rounding costs.* Each of the ``size`` numbers of R(S) is off by up to Δ/2, so neighbouring sums can be farther
apart by √size · Δ (half of that where each example is rounded by itself). Noise is matched to that sensitivity,
C + √size · Δ (:func:`grid_sensitivity`); with Δ ≤ 2⁻³² std the increase is below √size · σ · 2⁻³² of C: 2.4e-7 for a
million numbers at σ = 1. A coarser grid would cost privacy for large models (at 2⁻¹⁶ that would be 1.6 %), a finer one
would take the integers beyond the 2⁵³ that a float64 holds. Where S itself was summed in float64 (micro-batches, the
ghost way), neighbours may differ by N² · 2⁻⁵³ of C more, 4.8e-7 for N = 65,536: within the margin of 2⁻¹⁹ that the clip
rules leave.

*What the sampler costs.* The integers are within total variation 2⁻⁷⁴ of a rounded Gaussian each
(:mod:`lora_dp.ops.rounded_gaussian`; no value beyond 13.32 deviations, where a pair lies with probability 2⁻¹²⁸). A
run that draws n of them keeps its ε at δ + (1 + e^ε) · n · 2⁻⁷⁴: for 10¹² draws, δ + 2e-10 at ε = 1 and δ + 1.6e-7 at
ε = 8.

*What is not defended.* The bits are those of ChaCha20 (RFC 8439): the guarantee holds against whoever cannot break it.
The time of a step may depend on the data and, by a few microseconds, on the noise; a compromised host, or one who can
read the process's memory, sees everything. Per-example gradients are computed in floating point, and where a library
picks another algorithm for another batch size, the rounding of one example's gradient (about 1e-7 of it in float32) can
depend on how many others there are; no accounting that we know of covers this. Whoever chooses the model can amplify
it to the clip bound. The federation's clients rule it out (:mod:`lora_dp.fed.rounds.fixed_shapes`). Elsewhere, pad
batches to a fixed size (:class:`lora_dp.engine.cuda_graphs.GraphedStep`) to keep the shapes of all products the same.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# The grid is at most 2⁻³² of the deviation: values up to 2²⁰ deviations stay exact in float64's 53 bits.
GRID_BITS = 32
_LEAST_BITS = 40


class NoiseSource(Protocol):
    """Where rounded Gaussians come from (``lora_dp.privacy.randomness``)."""

    def rounded_gaussians(self, shapes: Sequence[Sequence[int]], scale: float, device: torch.device) -> list[Tensor]:
        """Independent round(scale · z), one int64 tensor of each shape on the device."""
        ...


def grid_step(std: float, sensitivity: float) -> float:
    """The grid's step for noise of deviation ``std`` > 0 on sums of this sensitivity: a power of two.

    In (2⁻³³, 2⁻³²] · std; where the noise is below 2⁻⁸ of the sensitivity, which protects nobody, at least 2⁻⁴¹ of the
    sensitivity, so that one example never has more than 2⁴¹ steps.
    """
    return max(_power_below(std) * 2.0**-GRID_BITS, _power_below(sensitivity) * 2.0**-_LEAST_BITS)


def _power_below(value: float) -> float:
    return math.ldexp(1.0, math.frexp(value)[1] - 1)


def grid_sensitivity(sensitivity: float, noise_multiplier: float, size: int) -> float:
    """Sensitivity of the rounded sum of ``size`` values.

    Rounding moves each coordinate of either of two neighbouring sums by at most half a step, so their distance
    grows by at most √size · step, and step ≤ max(2⁻³² · noise_multiplier, 2⁻⁴⁰) · (the result). Solved for the result.

    Raises:
        ValueError: the noise is so large that the grid's rounding alone exceeds the sensitivity.
    """
    rounding = math.sqrt(size) * max(noise_multiplier * 2.0**-GRID_BITS, 2.0**-_LEAST_BITS)
    if rounding >= 0.5:
        raise ValueError(f"noise_multiplier {noise_multiplier:g} is too large for a sum of {size} numbers: lower it.")
    return sensitivity / (1 - rounding)


def add_noise(values: Sequence[Tensor], std: float, sensitivity: float, source: NoiseSource) -> list[Tensor]:
    """Each value plus Gaussian noise of deviation ``std``, both rounded to one grid.

    Args:
        values: the clipped sums, any shapes, float32 or float64, finite, on one device.
        std: deviation of the noise in the units of ``values``; 0 returns them as they are.
        sensitivity: of the sums, in the same units.
        source: of rounded Gaussians.

    Returns:
        The shapes and device of ``values``, always in float64: rounded to the dtype of what was summed, the last bits
        would tell the zeros of an empty batch from the sums of others.
    """
    if std == 0 or not values:
        return [value.double() for value in values]
    step = grid_step(std, sensitivity)
    scale = max(std / step, 1.0)
    noise = source.rounded_gaussians([value.shape for value in values], scale, values[0].device)
    return [_on_grid(value, step).add_(drawn).double().mul_(step) for value, drawn in zip(values, noise, strict=True)]


def _on_grid(value: Tensor, step: float) -> Tensor:
    """The nearest integers to value / step, within ±2⁶², so that adding noise stays within 64 bits."""
    return value.double().div(step).clamp_(-(2.0**62), 2.0**62).round_().to(torch.int64)
