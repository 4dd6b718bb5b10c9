"""Per-example gradients of a matrix parameter and their norms: Gᵢ = scale · Σₜ leftᵢₜ ⊗ rightᵢₜ.

Both phases of LoRA and full-rank linear layers have this one shape of work: (left, right) is (g, h) for B, (u, x) for
A and (g, x) for a full-rank weight. Here h = x Aᵀ, g is the gradient of the layer's output, and u = g B.
"""

import torch
from torch import Tensor

from lora_dp.ops.example_norms import example_norms
from lora_dp.ops.registry import define, wide_dtype

# The skinny side of what the kernel holds on chip; a full-rank weight has two wide sides and goes by the reference.
_MAX_SKINNY = 256


def _reference(left: Tensor, right: Tensor, scale: float, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide_dtype(left.dtype)
    # A product with few rows rather than few columns is three to four times faster on a CPU.
    if factor is None:
        u = left.new_empty(0)
    else:
        u = (factor.t() @ left.flatten(0, 1).t()).t().contiguous().view(*left.shape[:2], factor.shape[1])
    left, right = left.to(dtype), right.to(dtype)
    if left.shape[2] > right.shape[2]:
        gradients = torch.bmm(right.transpose(1, 2), left).mul_(scale).transpose(1, 2).contiguous()
    else:
        gradients = torch.bmm(left.transpose(1, 2), right).mul_(scale)
    return gradients, example_norms(gradients), u


def _kernel(left: Tensor, right: Tensor, scale: float, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from lora_dp.kernels.example_grad import example_grad

    p, q = left.shape[2], right.shape[2]
    if min(p, q) > _MAX_SKINNY or (factor is not None and q > p):
        return _reference(left, right, scale, factor)
    if q <= p:
        found = example_grad(left, right, scale, factor=factor)
    else:
        found = example_grad(right, left, scale, wide_first=False)
    assert found.gradients is not None
    return found.gradients, found.sq_norms.sqrt_(), left.new_empty(0) if found.u is None else found.u


def _fake(left: Tensor, right: Tensor, scale: float, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    n, tokens, p = left.shape
    gradients = left.new_empty((n, p, right.shape[2]), dtype=wide_dtype(left.dtype))
    u = left.new_empty(0) if factor is None else left.new_empty((n, tokens, factor.shape[1]))
    return gradients, gradients.new_empty(n, dtype=torch.float64), u


# Compilers keep what they made for an op of this name, on disk: one whose outputs change needs another.
_op = define(
    "per_example_grad_and_norm(Tensor left, Tensor right, float scale, Tensor? factor) -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    kernel=_kernel,
)


def per_example_grad(left: Tensor, right: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Gᵢ and ‖Gᵢ‖ for every example.

    Args:
        left: (N, T, p), any floating dtype.
        right: (N, T, q), same dtype.
        scale: factor of the whole gradient (LoRA's alpha / r).

    Returns:
        (N, p, q) in float32, or float64 for float64 inputs; half types are accumulated in float32. And (N,) in
        float64, the norms of the values returned.
    """
    gradients, norms, _ = _op(left, right, scale, None)
    return gradients, norms


def per_example_grad_and_u(left: Tensor, right: Tensor, factor: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gᵢ, ‖Gᵢ‖ and u = left · factor from one pass over left: LoRA's B phase, where left is g and factor is B.

    Args:
        left, right, scale: as for :func:`per_example_grad`.
        factor: (p, q), same dtype.

    Returns:
        As :func:`per_example_grad`, and u (N, T, q) in the dtype of ``left``.
    """
    gradients, norms, u = _op(left, right, scale, factor)
    return gradients, norms, u
