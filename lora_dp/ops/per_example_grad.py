"""Per-example gradients of a matrix parameter: Gᵢ = scale · Σₜ leftᵢₜ ⊗ rightᵢₜ.

Both phases of LoRA and full-rank linear layers have this one shape of work (design note 1, §1):
(left, right) is (g, h) for B, (u, x) for A and (g, x) for a full-rank weight.
"""

import torch
from torch import Tensor

from lora_dp.ops.registry import define, wide_dtype


def _reference(left: Tensor, right: Tensor, scale: float) -> Tensor:
    dtype = wide_dtype(left.dtype)
    left, right = left.to(dtype), right.to(dtype)
    if left.shape[2] > right.shape[2]:
        # Few rows rather than few columns: three to four times faster on a CPU.
        return torch.bmm(right.transpose(1, 2), left).mul_(scale).transpose(1, 2).contiguous()
    return torch.bmm(left.transpose(1, 2), right).mul_(scale)


def _fake(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return left.new_empty((left.shape[0], left.shape[2], right.shape[2]), dtype=wide_dtype(left.dtype))


_op = define("per_example_grad(Tensor left, Tensor right, float scale) -> Tensor", _reference, _fake)


def per_example_grad(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Gᵢ for every example.

    Args:
        left: (N, T, p), any floating dtype.
        right: (N, T, q), same dtype.
        scale: factor of the whole gradient (LoRA's alpha / r).

    Returns:
        (N, p, q) in float32, or float64 for float64 inputs: half types are accumulated in float32.
    """
    return _op(left, right, scale)
