"""Squared per-example gradient norms without the gradients: the ghost norm.

‖Σₜ leftₜ ⊗ rightₜ‖² = Σ_{t,t'} (leftₜ·leftₜ')(rightₜ·rightₜ')   (Goodfellow 2015, arXiv 1510.01799;
for sequences Li et al. 2022, arXiv 2110.05679).
"""

import torch
from torch import Tensor

from lora_dp.ops.registry import define, wide_dtype

# Rows of the Gram matrix held at once: memory stays N · 256 · T, never N · T · T.
_TILE = 256


def _reference(left: Tensor, right: Tensor, scale: float) -> Tensor:
    dtype = wide_dtype(left.dtype)
    # In float32 a tiny factor's square would vanish beside a huge one, and terms of either sign could cancel: the
    # norm would come out below that of what is summed, and the example would be clipped too little.
    left, right = left.double(), right.double()
    if left.shape[1] == 1:
        norms = left.square().sum((1, 2)) * right.square().sum((1, 2))
        return norms.mul_(scale * scale).to(dtype)
    left_t, right_t = left.transpose(1, 2), right.transpose(1, 2)
    norms = left.new_zeros(left.shape[0])
    for start in range(0, left.shape[1], _TILE):
        rows = slice(start, start + _TILE)
        norms += (torch.bmm(left[:, rows], left_t) * torch.bmm(right[:, rows], right_t)).sum((1, 2))
    # Rounding can leave a tiny negative number where the gradient is zero.
    return _rounded_up(norms.clamp_(min=0).mul_(scale * scale), left, right, scale).to(dtype)


def _kernel(left: Tensor, right: Tensor, scale: float) -> Tensor:
    from lora_dp.kernels.gram import gram_sq_norm

    norms = gram_sq_norm(left, right, scale)
    return norms if left.shape[1] == 1 else _rounded_up(norms, left, right, scale)


def _rounded_up(norms: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """With what they may have lost in float64 where tokens cancel, so that no example is clipped too little.

    (p + q + T) · 2⁻⁵² · (Σₜ ‖leftₜ‖ ‖rightₜ‖)² bounds the rounding of dots of p and q terms, products, and sums over T
    (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1). Below a millionth of the norm it is left
    away: the clip rules' margin covers that.
    """
    lengths = torch.linalg.vector_norm(left, dim=2, dtype=torch.float64)
    lengths *= torch.linalg.vector_norm(right, dim=2, dtype=torch.float64)
    terms = left.shape[1] + left.shape[2] + right.shape[2]
    lost = lengths.sum(1).square_().mul_(terms * 2.0**-52 * scale * scale)
    return torch.where(lost > 1e-6 * norms, norms + lost, norms).to(norms.dtype)


def _fake(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return left.new_empty((left.shape[0],), dtype=wide_dtype(left.dtype))


_op = define(
    "ghost_sq_norm(Tensor left, Tensor right, float scale) -> Tensor", _reference, _fake, kernel=_kernel)


def ghost_sq_norm(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """‖scale · Σₜ leftᵢₜ ⊗ rightᵢₜ‖² for every example, rounded up where tokens cancel.

    Args:
        left: (N, T, p), any floating dtype.
        right: (N, T, q), same dtype.
        scale: factor of the gradient (enters squared).

    Returns:
        (N,) in float32, or float64 for float64 inputs. NaN stays NaN.
    """
    return _op(left, right, scale)
