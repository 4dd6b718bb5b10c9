"""The differentiable layer functions: plain without slots, per-example with them.

Without slots every function here is a composition of torch's own differentiable operations (double backward,
functorch and compilation work as usual). With slots a custom autograd function runs the ops of ``lora_dp.ops``
and leaves per-example gradients in the slots; the parameters themselves then get no gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dp.ops.lora_backward import lora_backward
from lora_dp.ops.lora_forward import lora_forward
from lora_dp.ops.registry import wide_dtype
from lora_dp.recording import Slot


def _compute_dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype)


def _leaf(slot: Slot | None) -> Tensor | None:
    return None if slot is None else slot.leaf


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    slots: dict[str, Slot | None] | None = None,
) -> Tensor:
    """y = x W0ᵀ + b + s · (x Aᵀ) Bᵀ  (Hu et al. 2021, arXiv 2106.09685).

    Args:
        x: (..., d_in).
        weight: (d_out, d_in), or None for the adapter's update alone.
        bias: (d_out,) or None.
        lora_A: (r, d_in).
        lora_B: (d_out, r).
        scaling: s, usually alpha / r.
        slots: while a private step is recorded, the slots of "lora_A", "lora_B" and "bias" (None for what this
            phase does not train); None otherwise.

    Returns:
        (..., d_out).

    Raises:
        ValueError: while recording, N does not divide the first dimension of ``x``.
    """
    if slots is None:
        if weight is None:
            return F.linear(F.linear(x, lora_A), lora_B) * scaling
        base = F.linear(x, weight, bias)
        h = F.linear(x, lora_A).reshape(-1, lora_A.shape[0])
        return base.reshape(-1, base.shape[-1]).addmm(h, lora_B.t().to(h.dtype), alpha=scaling).view(base.shape)
    dtype = _compute_dtype(x)
    y: Tensor = _RecordedLoRA.apply(
        x.to(dtype), _cast(weight, dtype), _cast(bias, dtype), _cast(lora_A, dtype), _cast(lora_B, dtype), scaling,
        slots, _leaf(slots["lora_A"]), _leaf(slots["lora_B"]), _leaf(slots["bias"]))
    return y


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, fan_in_fan_out: bool = False,
    slots: dict[str, Slot | None] | None = None,
) -> Tensor:
    """y = x Wᵀ + b of a full-rank layer.

    Args:
        x: (..., d_in).
        weight: (d_out, d_in), or (d_in, d_out) with ``fan_in_fan_out``.
        bias: (d_out,) or None.
        fan_in_fan_out: how ``weight`` is stored.
        slots: while recording, the slots of "weight" and "bias"; None otherwise.

    Returns:
        (..., d_out).

    Raises:
        ValueError: while recording, N does not divide the first dimension of ``x``.
    """
    if fan_in_fan_out:
        weight = weight.t()
    if slots is None:
        return F.linear(x, weight, bias)
    dtype = _compute_dtype(x)
    y: Tensor = _RecordedLinear.apply(
        x.to(dtype), _cast(weight, dtype), _cast(bias, dtype), fan_in_fan_out, slots,
        _leaf(slots["weight"]), _leaf(slots["bias"]))
    return y


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, slots: dict[str, Slot | None]) -> Tensor:
    """x · w + b along the last dimension, recorded: each example uses w and b plus its own (zero) leaf.

    Args:
        x: (first, ..., d), normalised values.
        weight: (d,) or None.
        bias: (d,) or None.
        slots: the slots of "weight" and "bias".

    Returns:
        The shape of ``x``, in its dtype or the parameters', whichever is wider.

    Raises:
        ValueError: N does not divide the first dimension of ``x``.
    """
    y = x
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        slot, value = slots[name], parameter.detach()
        if slot is not None:
            rows = slot.group(y)
            value = (value + slot.leaf).to(x.dtype).unsqueeze(1)
            y = (rows * value if name == "weight" else rows + value).view(x.shape)
        else:
            y = y * value if name == "weight" else y + value
    return y


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None, *, slot: Slot | None = None) -> Tensor:
    """Rows of ``weight`` (num_embeddings, d) by ``ids`` (N, ...): (N, ..., d).

    Raises:
        ValueError: while recording, N does not divide the first dimension of ``ids``.
    """
    if slot is None:
        return F.embedding(ids, weight, padding_idx)
    y: Tensor = _RecordedEmbedding.apply(ids, weight.detach(), padding_idx, slot, slot.leaf)
    return y


class _RecordedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
        scaling: float, slots: dict[str, Slot | None], *leaves: Tensor | None,
    ) -> Tensor:
        for slot in slots.values():
            if slot is not None:
                slot.group(x)
        y, h = lora_forward(x.reshape(-1, x.shape[-1]), weight, bias, lora_A, lora_B, scaling)
        # The B phase needs h only: the wide input is not kept for the adapter.
        ctx.save_for_backward(
            x if slots["lora_A"] is not None else None,
            h if slots["lora_B"] is not None else None, weight, lora_A, lora_B)
        ctx.scaling, ctx.slots, ctx.x_shape = scaling, slots, x.shape
        return y.view(*x.shape[:-1], lora_B.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, h, weight, lora_A, lora_B = ctx.saved_tensors
        slots, scaling = ctx.slots, ctx.scaling
        g = grads[0]
        rows = g.reshape(ctx.x_shape[:-1].numel(), g.shape[-1])
        dx = grad_A = grad_B = grad_bias = None
        if ctx.needs_input_grad[0]:
            dx, u = lora_backward(rows, weight, lora_A, lora_B, scaling)
            dx = dx.view(ctx.x_shape)
        else:
            u = rows @ lora_B
        if slots["lora_A"] is not None:
            slot = slots["lora_A"]
            grouped = slot.group(x)
            grad_A = slot.add_outer(u.view(*grouped.shape[:2], u.shape[-1]), grouped, scaling)
        if slots["lora_B"] is not None:
            slot = slots["lora_B"]
            grouped = slot.group(g)
            grad_B = slot.add_outer(grouped, h.view(*grouped.shape[:2], h.shape[-1]), scaling)
        if slots["bias"] is not None:
            grad_bias = _sum_tokens(slots["bias"].group(g))
        return dx, None, None, None, None, None, None, grad_A, grad_B, grad_bias


class _RecordedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fan_in_fan_out: bool,
        slots: dict[str, Slot | None], *leaves: Tensor | None,
    ) -> Tensor:
        for slot in slots.values():
            if slot is not None:
                slot.group(x)
        ctx.save_for_backward(x if slots["weight"] is not None else None, weight)
        ctx.slots, ctx.fan_in_fan_out = slots, fan_in_fan_out
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        slots, g = ctx.slots, grads[0]
        dx = g @ weight if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if slots["weight"] is not None:
            slot = slots["weight"]
            left, right = slot.group(g), slot.group(x)
            grad_weight = slot.add_outer(right, left) if ctx.fan_in_fan_out else slot.add_outer(left, right)
        if slots["bias"] is not None:
            grad_bias = _sum_tokens(slots["bias"].group(g))
        return dx, None, None, None, None, grad_weight, grad_bias


class _RecordedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None, slot: Slot, leaf: Tensor
    ) -> Tensor:
        ctx.ids = slot.group(ids.unsqueeze(-1)).squeeze(-1)
        ctx.slot, ctx.padding_idx = slot, padding_idx
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gradient = ctx.slot.group(grads[0])
        if ctx.padding_idx is not None:
            gradient = gradient.masked_fill((ctx.ids == ctx.padding_idx).unsqueeze(-1), 0)
        ctx.slot.add_embedding(ctx.ids, gradient)
        return None, None, None, None, None


def _sum_tokens(grouped: Tensor) -> Tensor:
    return grouped.sum(1, dtype=wide_dtype(grouped.dtype))
