"""How much of white noise a low-pass filter leaves, found exactly from what it makes of impulses."""

import functools

import torch
from torch import Tensor

from lora_dp.kernels.gaussian_filter import filter_reach, filtered_dimension
from lora_dp.privacy.filtering import Filter, GaussianFilter


@functools.lru_cache(maxsize=256)
def filter_gain(low_pass: Filter, shape: tuple[int, int]) -> float:
    """trace(FᵀF) / n of a filter on matrices of that shape with n numbers: the share of white noise's energy it leaves.

    Exact, in float64, from the filter's own answers to impulses; F is never formed.
    """
    return impulse_energy(low_pass, shape, torch.eye(1, min(shape), dtype=torch.float64))


def impulse_energy(low_pass: Filter, shape: tuple[int, int], patterns: Tensor) -> float:
    """Mean of ‖F(impulse)‖² over the places along the longer dimension, and over patterns across it (k, shorter).

    Where a filter works alike, one place stands for many: everywhere for the Laplacian filter, which is periodic (in
    both dimensions: all rows give the same), and away from the ends for the Gaussian one.
    """
    length, along_rows = max(shape), filtered_dimension(shape) == 1
    places, weights = [0], [length]
    if isinstance(low_pass, GaussianFilter):
        radius = filter_reach(low_pass.strength)
        inner = length - 2 * radius
        ends = [*range(radius), *range(length - radius, length)]
        places, weights = (
            ([radius, *ends], [inner] + [1] * len(ends)) if inner > 0 else (list(range(length)), [1] * length)
        )
    total = 0.0
    for place, weight in zip(places, weights, strict=True):
        for pattern in patterns:
            impulse = torch.zeros(len(pattern), length, dtype=torch.float64)
            impulse[:, place] = pattern
            total += weight * float(low_pass(impulse if along_rows else impulse.t()).square().sum())
    return total / (length * len(patterns))
