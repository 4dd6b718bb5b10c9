"""Filters that know the noise: a released gradient is pulled towards zero as far as noise of that size explains it.

A filter sees the noised gradient G and the deviation s of its noise, and nothing else. G is released and s is public,
so whatever is computed from them is as private as G: post-processing. s is that of σC/L, the grid's rounding included.
Both filters take the noise to be Gaussian, independent between entries and of one deviation. So they come before a
regulator and before a low-pass filter, after which it is not.

What they leave has a smaller mean squared error as an estimate of the gradient, and a bias towards zero. An optimizer
that averages over many steps by itself (momentum, small rates) takes noise out without that bias.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_dp.argument_checks import check_number


def _working(grad: Tensor, std: float) -> Tensor:
    """``grad`` in float64; raises unless both are what they should be."""
    check_number("The noise's deviation", std, "it is one number, alike for all entries")
    if not 0 <= std < math.inf:
        raise ValueError(f"The noise's deviation must be a finite number >= 0, not {std}.")
    if not grad.is_floating_point():
        raise TypeError(f"Shrinkage takes a floating-point gradient, not {grad.dtype}: convert it first.")
    return grad.double()


@dataclass(frozen=True)
class JamesStein:
    """The whole gradient of a parameter times max(0, 1 − (d − 2)s²/‖G‖²), d its numbers (James and Stein 1961).

    With E‖G‖² = ‖g‖² + ds², the factor estimates ‖g‖² / (‖g‖² + ds²), by which G is to be multiplied for the least
    mean squared error. From d = 3 on that error is below the raw G's whatever g is; the positive part makes it smaller
    still (Baranchik 1964). Up to d = 2 nothing is changed. Of noise alone about 0.6/√d is left in the mean.

    It needs no direction and no shape: biases are shrunk as well as matrices.

    >>> sure, noise = torch.tensor([30.0, -40.0, 0.0, 0.0]), torch.tensor([1.0, -1.0, 1.0, 0.0])
    >>> JamesStein()(sure, 1.0), JamesStein()(noise, 1.5)
    (tensor([ 29.9760, -39.9680,   0.0000,   0.0000]), tensor([0., -0., 0., 0.]))
    """

    def __call__(self, grad: Tensor, std: float) -> Tensor:
        """Shrink a gradient of any shape; the same shape, dtype and device, computed in float64.

        Args:
            grad: G, floating-point.
            std: s, the deviation of the noise in each of its entries; 0 returns it as it is.

        Raises:
            ValueError: ``std`` is negative or not finite.
            TypeError: ``std`` is no number, or G not floating-point.
        """
        wide = _working(grad, std)
        if std == 0 or grad.numel() <= 2:
            return grad
        factor = (1 - (grad.numel() - 2) * std * std / wide.square().sum()).clamp_min(0.0)
        return (wide * factor).to(grad.dtype)


@dataclass(frozen=True)
class SpectralShrinkage:
    """Shrinks the singular values of a matrix by the rule of least squared error (Gavish and Donoho 2017, 1405.7511).

    Of an m × n matrix, m ≤ n, let β = m/n and y a singular value over s√n. It becomes η(y)·s√n with

        η(y) = √((y² − β − 1)² − 4β) / y   above 1 + √β,   else 0.

    1 + √β is where the singular values of noise alone end (Marchenko and Pastur 1967). Above it noise makes a signal's
    value longer and turns its vectors; η takes back both, and is the best of all such rules as m and n grow. In the
    small a value of noise is above the edge by chance, and just above it η is near 0. That gradients of few directions
    come out of noise by their spectrum is from arXiv 2510.01137.

    What is no matrix stays as it is: a bias has no spectrum. It costs one singular value decomposition a matrix and
    step, O(m²n).

    >>> signal = 100.0 * torch.ones(4, 5)
    >>> SpectralShrinkage()(signal, 1.0)[0]
    tensor([99.9955, 99.9955, 99.9955, 99.9955, 99.9955])
    """

    def __call__(self, grad: Tensor, std: float) -> Tensor:
        """Shrink a matrix; the same shape, dtype and device, computed in float64.

        Args:
            grad: G, floating-point; of another number of dimensions than 2 it is returned as it is.
            std: s, the deviation of the noise in each of its entries; 0 returns G as it is.

        Raises:
            ValueError: ``std`` is negative or not finite.
            TypeError: ``std`` is no number, or G not floating-point.
        """
        wide = _working(grad, std)
        if std == 0 or grad.ndim != 2 or grad.numel() == 0:
            return grad
        ratio = min(grad.shape) / max(grad.shape)
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
        squares = (values / std).square() / max(grad.shape)
        # η(y)/y, at most 1; below the edge the root may be of something negative, and is not used.
        kept = ((squares - ratio - 1).square() - 4 * ratio).clamp_min(0.0).sqrt() / squares
        kept = torch.where(squares > (1 + math.sqrt(ratio)) ** 2, kept, 0.0)
        return ((left * (values * kept)) @ right).to(grad.dtype)


Shrinkage = JamesStein | SpectralShrinkage


def check_shrinkage(value: object) -> None:
    """Refuse what is neither such a filter nor None.

    Raises:
        TypeError: a low-pass filter, a name, a class instead of an object.
    """
    if value is not None and not isinstance(value, Shrinkage):
        raise TypeError(
            f"shrinkage must be JamesStein(), SpectralShrinkage() or None, got a {type(value).__name__}: a low-pass "
            "filter is given as low_pass."
        )
