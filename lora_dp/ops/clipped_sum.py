"""Σᵢ cᵢ Gᵢ, from the kept gradients or recomputed from (left, right) as one row-scaled product."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_dp.ops.registry import define, wide_dtype

# TF32 or bf16 products, which a user may have allowed, would round cᵢ far beyond the clip rules' margin.
_PRECISIONS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


@contextmanager
def _full_precision() -> Iterator[None]:
    allowed = [backend.fp32_precision for backend in _PRECISIONS]
    if set(allowed) <= {"none", "ieee"}:
        yield
        return
    for backend in _PRECISIONS:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(_PRECISIONS, allowed, strict=True):
            backend.fp32_precision = precision


def _sum_kept_reference(gradients: Tensor, coefficients: Tensor) -> Tensor:
    # 0 · NaN is NaN: what an excluded example holds must not reach a sum. Every example with a non-finite value is
    # excluded, so nan_to_num drops nothing else, at a fifth of the time of masking rows.
    flat = gradients.flatten(1).nan_to_num(0, 0, 0)
    with _full_precision():
        return (coefficients.to(flat.dtype) @ flat).view(gradients.shape[1:])


def _sum_kept_fake(gradients: Tensor, coefficients: Tensor) -> Tensor:
    return gradients.new_empty(gradients.shape[1:])


def _sum_pairs_reference(left: Tensor, right: Tensor, coefficients: Tensor, scale: float) -> Tensor:
    result = wide_dtype(left.dtype)
    # Where an example's tokens cancel, float32 would leave rounding that its norm, exact, does not count.
    dtype = result if left.shape[1] == 1 else torch.float64
    left, right = left.to(dtype), right.to(dtype)
    weighted = (left * (scale * coefficients.to(dtype)).view(-1, 1, 1)).nan_to_num_(0, 0, 0)
    with _full_precision():
        return (weighted.flatten(0, 1).t() @ right.nan_to_num(0, 0, 0).flatten(0, 1)).to(result)


def _sum_pairs_fake(left: Tensor, right: Tensor, coefficients: Tensor, scale: float) -> Tensor:
    return left.new_empty((left.shape[2], right.shape[2]), dtype=wide_dtype(left.dtype))


_sum_kept = define("clipped_sum_kept(Tensor gradients, Tensor coefficients) -> Tensor",
                   _sum_kept_reference, _sum_kept_fake)
_sum_pairs = define(
    "clipped_sum_pairs(Tensor left, Tensor right, Tensor coefficients, float scale) -> Tensor",
    _sum_pairs_reference, _sum_pairs_fake)


def clipped_sum_kept(gradients: Tensor, coefficients: Tensor) -> Tensor:
    """Σᵢ cᵢ Gᵢ of kept per-example gradients.

    Args:
        gradients: (N, *shape), float32 or float64.
        coefficients: (N,) non-negative and finite; an example with 0 contributes nothing, whatever it holds, and an
            example with a non-finite value must have 0.

    Returns:
        (*shape) in the dtype of ``gradients``.
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
        (p, q) in float32, or float64 for float64 inputs.
    """
    return _sum_pairs(left, right, coefficients, scale)
