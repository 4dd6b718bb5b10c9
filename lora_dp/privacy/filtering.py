"""Low-pass filters for a noisy gradient of a low-rank factor, as in LA-LoRA (arXiv 2602.19926).

A filter is applied after clipping and noise. It is linear and fixed beforehand, and sees nothing but the noisy
gradient: pure post-processing, which costs no privacy. Neighbouring entries are averaged, so that independent noise
shrinks while a constant passes unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_dp.argument_checks import check_number
from lora_dp.kernels.gaussian_filter import filter_reach, filtered_dimension

FilterName = Literal["gaussian", "laplacian"]


def _check_strength(strength: float) -> None:
    check_number("The filter's strength", strength, "0 turns it off")
    if not 0 <= strength < math.inf:
        raise ValueError(f"The filter's strength must be a finite number >= 0, not {strength}: 0 turns it off.")


def _working_copy(grad: Tensor) -> Tensor:
    """``grad`` in float32, or float64 if it is that; raises unless it is a floating-point matrix."""
    if grad.ndim != 2:
        raise ValueError(
            f"A low-pass filter takes the 2-D gradient of a low-rank factor, not one of shape {tuple(grad.shape)}: "
            "leave biases and other parameters unfiltered."
        )
    if not grad.is_floating_point():
        raise TypeError(f"A low-pass filter takes a floating-point gradient, not {grad.dtype}: convert it first.")
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


@dataclass(frozen=True)
class GaussianFilter:
    """Convolution with a normalised Gaussian along the longer dimension (arXiv 2602.19926; off at strength 0).

    ``strength`` is the Gaussian's standard deviation, in entries; the kernel ends at 4 of them. The end entries are
    repeated outwards, so that a constant stays constant. Of two equal dimensions the last is filtered. Raises
    ValueError for a negative or non-finite strength.

    >>> spike = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]])
    >>> GaussianFilter(0.5)(spike)
    tensor([[2.6387e-04, 1.0645e-01, 7.8657e-01, 1.0645e-01, 2.6387e-04]])
    """

    strength: float

    def __post_init__(self) -> None:
        _check_strength(self.strength)

    def __call__(self, grad: Tensor) -> Tensor:
        """Filter a matrix of any floating-point dtype; same shape, dtype and device, computed in float32 or float64.

        Raises ValueError unless ``grad`` is 2-D, TypeError unless it is floating-point.
        """
        signal = _working_copy(grad)
        if self.strength == 0 or grad.numel() == 0:
            return grad
        along_rows = filtered_dimension(grad.shape) == 1
        signal = signal if along_rows else signal.T
        radius = filter_reach(self.strength)
        offsets = torch.arange(-radius, radius + 1, device=grad.device, dtype=signal.dtype)
        kernel = torch.softmax(-0.5 * (offsets / self.strength) ** 2, dim=0)
        padded = F.pad(signal.unsqueeze(0), (radius, radius), mode="replicate").squeeze(0)
        # A product with windows rather than conv1d: cuDNN would round float32 to TF32.
        smooth = padded.unfold(1, len(kernel), 1) @ kernel
        return (smooth if along_rows else smooth.T).contiguous().to(grad.dtype)


@dataclass(frozen=True)
class LaplacianFilter:
    """Laplacian smoothing: solves ``(I + σL) out = grad``, L the Laplacian of a periodic grid (off at strength 0).

    ``strength`` is σ. In the 2-D Fourier domain this divides by ``1 + 2σ(2 − cos ω₁ − cos ω₂)``, as the released code
    of LA-LoRA does (arXiv 2602.19926), after Osher et al. 2018 (arXiv 1806.06317). Raises ValueError for a negative or
    non-finite strength.

    >>> spike = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]])
    >>> LaplacianFilter(1.0)(spike)
    tensor([[0.0909, 0.1818, 0.4545, 0.1818, 0.0909]])
    """

    strength: float

    def __post_init__(self) -> None:
        _check_strength(self.strength)

    def __call__(self, grad: Tensor) -> Tensor:
        """Filter a matrix of any floating-point dtype; same shape, dtype and device, computed in float32 or float64.

        Raises ValueError unless ``grad`` is 2-D, TypeError unless it is floating-point.
        """
        signal = _working_copy(grad)
        if self.strength == 0 or grad.numel() == 0:
            return grad
        rows, columns = signal.shape
        first = 2 * math.pi * torch.fft.fftfreq(rows, device=grad.device, dtype=signal.dtype)
        second = 2 * math.pi * torch.fft.rfftfreq(columns, device=grad.device, dtype=signal.dtype)
        damping = 1 + 2 * self.strength * (2 - first.cos().unsqueeze(1) - second.cos().unsqueeze(0))
        smooth = torch.fft.irfft2(torch.fft.rfft2(signal) / damping, s=(rows, columns))
        return smooth.to(grad.dtype)


Filter = GaussianFilter | LaplacianFilter


def check_filter(value: object) -> None:
    """Refuse what is neither a filter nor None.

    Raises:
        TypeError: a name, a number, a function.
    """
    if value is not None and not isinstance(value, Filter):
        raise TypeError(
            f"low_pass must be a GaussianFilter, a LaplacianFilter or None, got a {type(value).__name__}: "
            "make_filter(name, strength) makes one of a name."
        )


def make_filter(name: FilterName | None, strength: float) -> Filter | None:
    """The filter called ``name``, or None (no filter) for None. ValueError for another name or a bad strength."""
    if name is None:
        return None
    if name == "gaussian":
        return GaussianFilter(strength)
    if name == "laplacian":
        return LaplacianFilter(strength)
    raise ValueError(f"Unknown low-pass filter {name!r}: choose 'gaussian', 'laplacian' or None.")
