"""Clip coefficients and the clipped sums of all parameters in one launch, where Triton kernels run.

What it computes is defined by the rules of :mod:`lora_dp.privacy.clipping` and by
:func:`lora_dp.ops.clipped_sum.clipped_sum_kept`, which every other device runs.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

from lora_dp.ops.registry import kernels_run_on


def can_clip_and_sum(gradients: Sequence[Tensor], sq_norms: Tensor) -> bool:
    """Whether :func:`clip_and_sum` takes these: all on one device with kernels, in float32."""
    return kernels_run_on(sq_norms.device) and all(
        tensor.dtype == torch.float32 and tensor.device == sq_norms.device for tensor in gradients
    )


def clip_and_sum(
    gradients: Sequence[Tensor],
    rows: Sequence[int],
    sq_norms: Tensor,
    layers: Tensor,
    layer_count: int,
    rule: Literal["flat", "per_layer", "automatic"],
    max_grad_norm: float,
    gamma: float,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """cᵢ for every parameter and example, and Σᵢ cᵢ Gᵢ of ``gradients``; see ``lora_dp.kernels.clip_sum.clip_sum``.

    Args:
        gradients: each ``(N, *shape)`` float32.
        rows: which row of ``sq_norms`` each belongs to.
        sq_norms: (P, N) float64, of unscaled gradients.
        layers: (P,) int64.
        layer_count: how many layers this phase trains.
        rule, max_grad_norm, gamma: the clip rule.
        mask: (N,) bool or None.
        scale: factor of every gradient (N where the loss is a mean).

    Returns:
        (P, N) coefficients, mask and scale included, and a sum in the shape of each parameter, all float64.
    """
    from lora_dp.kernels.clip_sum import clip_sum

    return clip_sum(
        [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in gradients],
        rows,
        sq_norms,
        layers,
        layer_count,
        rule,
        max_grad_norm,
        gamma,
        mask,
        scale,
    )


def tables_captured(device: torch.device) -> AbstractContextManager[Any]:
    """Around the capture of a CUDA graph with :func:`clip_and_sum` in it; what it gives must live as long."""
    from lora_dp.kernels.tile_table import captured_tables

    return captured_tables(device)
