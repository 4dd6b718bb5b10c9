"""y = x Wᵀ + b + s · (x aᵀ) bᵀ by whichever way was measured fastest for the shape.

*fused*: one Triton product with the adapter in its loop and epilogue (:mod:`lora_dp.kernels.lora_product`).
*two_step*: torch's own product for x Wᵀ, and the adapter added in place. The table is ``tuned.json``, see
:func:`lora_dp.kernels.launching.measured`; where nothing was measured it is two_step.
"""

import torch.nn.functional as F
from torch import Tensor

from lora_dp.kernels.launching import measured, padded
from lora_dp.kernels.lora_product import MAX_FUSED_RANK, lora_product
from lora_dp.kernels.low_rank_update import add_low_rank_
from lora_dp.kernels.skinny_product import skinny_product


def two_step_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """As :func:`adapted_product`, with torch's own product."""
    y = F.linear(x, weight, bias)
    h = skinny_product(x, a)
    add_low_rank_(y, h, b, scaling)
    return y, h


def adapted_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """LoRA's forward, and with (g, Wᵀ, None, Bᵀ, Aᵀ) its backward to the input.

    Args:
        x: (M, K), float32, bfloat16 or float16.
        weight: (N, K), same dtype.
        bias: (N,) or None.
        a: (r, K).
        b: (N, r).
        scaling: the factor s of the adapter.

    Returns:
        y (M, N) and h = x aᵀ (M, r), in the dtype of ``x``.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
    """
    r = a.shape[0]
    way = measured("adapted_product", x, M=x.shape[0], K=x.shape[1], N=b.shape[0], r=r)
    if way == "fused" and padded(r) <= MAX_FUSED_RANK:
        return lora_product(x, weight, bias, a, b, scaling)
    return two_step_product(x, weight, bias, a, b, scaling)
