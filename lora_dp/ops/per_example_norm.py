"""Squared per-example gradient norms without the gradients: the ghost norm.

‖Σₜ leftₜ ⊗ rightₜ‖² = Σ_{t,t'} (leftₜ·leftₜ')(rightₜ·rightₜ')   (Goodfellow 2015, arXiv 1510.01799;
for sequences Li et al. 2022, arXiv 2110.05679).
"""

import torch
from torch import Tensor

from lora_dp.ops.registry import define

# Rows of the Gram matrix held at once: memory stays N · 256 · T, never N · T · T.
_TILE = 256


def _reference(left: Tensor, right: Tensor, scale: float) -> Tensor:
    if left.dtype == torch.float64:
        return _of_any_size(left, right, scale)
    # In float32 a tiny factor's square would vanish beside a huge one, and terms of either sign could cancel: the
    # norm would come out below that of what is summed, and the example would be clipped too little.
    return _sq_norms(left.double(), right.double()).mul_(scale * scale)


def _of_any_size(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Of float64 factors, whose squares can leave the range of float64: each example's are brought near 1 first."""
    left, left_power = _near_one(left)
    right, right_power = _near_one(right)
    # What is too small for float64 then is too small for any clip bound; what is too large is infinite.
    return _sq_norms(left, right).sqrt_().mul_(torch.exp2(left_power + right_power)).mul_(scale).square_()


def _near_one(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Each example divided by a power of two near its largest value, and that power's exponent, (N,) float64."""
    if factor.numel() == 0:
        return factor, factor.new_zeros(len(factor))
    # Beyond 1000 the power, or its inverse, would not be a normal number.
    power = torch.frexp(factor.abs().amax((1, 2))).exponent.clamp(-1000, 1000).double()
    return factor * torch.exp2(-power).view(-1, 1, 1), power


def _sq_norms(left: Tensor, right: Tensor) -> Tensor:
    """In float64, never below what is true."""
    if left.shape[1] == 1:
        return left.square().sum((1, 2)) * right.square().sum((1, 2))
    left_t, right_t = left.transpose(1, 2), right.transpose(1, 2)
    norms = left.new_zeros(left.shape[0])
    for start in range(0, left.shape[1], _TILE):
        rows = slice(start, start + _TILE)
        norms += (torch.bmm(left[:, rows], left_t) * torch.bmm(right[:, rows], right_t)).sum((1, 2))
    # Rounding can leave a tiny negative number where the gradient is zero.
    return norms.clamp_(min=0).add_(_lost(left, right))


def _kernel(left: Tensor, right: Tensor, scale: float) -> Tensor:
    from lora_dp.kernels.gram import gram_sq_norm

    norms = gram_sq_norm(left, right, scale)
    return norms if left.shape[1] == 1 else norms.add_(_lost(left, right), alpha=scale * scale)


def _lost(left: Tensor, right: Tensor) -> Tensor:
    """What squared norms may have lost in float64 where tokens cancel, so that no example is clipped too little.

    (p + q + T) · 2⁻⁵² · (Σₜ ‖leftₜ‖ ‖rightₜ‖)² bounds the rounding of dots of p and q terms, products, and sums over T
    (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1).
    """
    lengths = torch.linalg.vector_norm(left, dim=2, dtype=torch.float64)
    lengths *= torch.linalg.vector_norm(right, dim=2, dtype=torch.float64)
    terms = left.shape[1] + left.shape[2] + right.shape[2]
    return lengths.sum(1).square_().mul_(terms * 2.0**-52)


def _fake(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return left.new_empty((left.shape[0],), dtype=torch.float64)


_op = define("ghost_sq_norm(Tensor left, Tensor right, float scale) -> Tensor", _reference, _fake, kernel=_kernel)


def ghost_sq_norm(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """‖scale · Σₜ leftᵢₜ ⊗ rightᵢₜ‖² for every example, rounded up by what float64 may have lost where tokens cancel.

    Args:
        left: (N, T, p), any floating dtype.
        right: (N, T, q), same dtype.
        scale: factor of the gradient (enters squared).

    Returns:
        (N,) in float64. NaN stays NaN.
    """
    return _op(left, right, scale)
