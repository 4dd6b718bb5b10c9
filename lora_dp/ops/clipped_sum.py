"""Σᵢ cᵢ Gᵢ, from the kept gradients or recomputed from (left, right) as one row-scaled product.

In float64: what a float32 sum over N examples rounds away, up to N² · 2⁻²⁴ of the clip bound, no noise is matched to.
"""

import torch
from torch import Tensor

from lora_dp.ops.registry import define

# Numbers that are turned into float64 at once.
_CHUNK = 2**22


def _sum_kept_reference(gradients: Tensor, coefficients: Tensor) -> Tensor:
    # 0 · NaN is NaN: what an excluded example holds must not reach a sum. Every example with a non-finite value is
    # excluded, so nan_to_num drops nothing else, at a fifth of the time of masking rows.
    flat, weights = gradients.flatten(1), coefficients.double()
    # Some columns at a time: in float64 all of them would take twice the memory of the gradients again.
    chunks = flat.split(max(_CHUNK // max(len(flat), 1), 1), dim=1)
    sums = [weights @ chunk.double().nan_to_num(0, 0, 0) for chunk in chunks]
    return torch.cat(sums).view(gradients.shape[1:])


def _sum_kept_fake(gradients: Tensor, coefficients: Tensor) -> Tensor:
    return gradients.new_empty(gradients.shape[1:], dtype=torch.float64)


def _sum_pairs_reference(left: Tensor, right: Tensor, coefficients: Tensor, scale: float) -> Tensor:
    left, right = left.double(), right.double()
    weighted = (left * (scale * coefficients.double()).view(-1, 1, 1)).nan_to_num_(0, 0, 0)
    return weighted.flatten(0, 1).t() @ right.nan_to_num(0, 0, 0).flatten(0, 1)


def _sum_pairs_fake(left: Tensor, right: Tensor, coefficients: Tensor, scale: float) -> Tensor:
    return left.new_empty((left.shape[2], right.shape[2]), dtype=torch.float64)


_sum_kept = define(
    "clipped_sum_kept(Tensor gradients, Tensor coefficients) -> Tensor", _sum_kept_reference, _sum_kept_fake
)
_sum_pairs = define(
    "clipped_sum_pairs(Tensor left, Tensor right, Tensor coefficients, float scale) -> Tensor",
    _sum_pairs_reference,
    _sum_pairs_fake,
)


def clipped_sum_kept(gradients: Tensor, coefficients: Tensor) -> Tensor:
    """Σᵢ cᵢ Gᵢ of kept per-example gradients.

    Args:
        gradients: ``(N, *shape)``, float32 or float64.
        coefficients: (N,) non-negative and finite; an example with 0 contributes nothing, whatever it holds, and an
            example with a non-finite value must have 0.

    Returns:
        ``(*shape)``, float64.
    """
    return _sum_kept(gradients, coefficients)


def clipped_sum_pairs(left: Tensor, right: Tensor, coefficients: Tensor, scale: float = 1.0) -> Tensor:
    """scale · Σᵢ cᵢ Σₜ leftᵢₜ ⊗ rightᵢₜ without forming any Gᵢ.

    Args:
        left: (N, T, p), any floating dtype.
        right: (N, T, q), same dtype.
        coefficients: (N,) as for :func:`clipped_sum_kept`.
        scale: factor of the whole gradient.

    Returns:
        (p, q), float64.
    """
    return _sum_pairs(left, right, coefficients, scale)
