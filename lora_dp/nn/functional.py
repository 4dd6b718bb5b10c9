"""The differentiable layer functions: plain without slots, per-example with them.

Without slots every function here is a composition of torch's own differentiable operations (double backward,
functorch and compilation work as usual). With slots an op of our own runs, whose derivative hands per-example
gradients to the slots' leaves; the parameters themselves then get no gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dp.nn.per_example import Receiver, Slot, by_example
from lora_dp.ops.lora_backward import lora_backward
from lora_dp.ops.lora_forward import lora_forward
from lora_dp.ops.per_example_grad import per_example_grad, per_example_grad_and_u
from lora_dp.ops.registry import define, wide_dtype, without_autocast

_HALF = (torch.bfloat16, torch.float16)


def _compute_dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype)


def followed(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter that is kept in float32 beside activations of half precision, in the dtype of these.

    What is trained is float32 in every model, since bfloat16 would lose steps of 1e-4; products are in the model's
    dtype. Autocast makes its own choice.
    """
    if x.dtype not in _HALF or torch.is_autocast_enabled(x.device.type):
        return parameter
    return parameter.to(x.dtype)


def _whole(slot: Slot | None, rows: Tensor) -> Tensor | None:
    return None if slot is None else slot.receive_whole(rows)


def _leaves(receiver: Receiver | None) -> tuple[bool, Tensor | None, Tensor | None]:
    return (False, None, None) if receiver is None else receiver


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
        factor_A, factor_B = followed(lora_A, x), followed(lora_B, x)
        if weight is None:
            return F.linear(F.linear(x, factor_A), factor_B) * scaling
        base = F.linear(x, weight, None if bias is None else followed(bias, x))
        h = F.linear(x, factor_A).reshape(-1, lora_A.shape[0])
        return base.reshape(-1, base.shape[-1]).addmm(h, factor_B.t().to(h.dtype), alpha=scaling).view(base.shape)
    x = x.to(dtype := _compute_dtype(x))
    (r, d_in), d_out = lora_A.shape, lora_B.shape[0]
    slot_A, slot_B = slots["lora_A"], slots["lora_B"]
    ghost_A, *leaves_A = _leaves(None if slot_A is None else slot_A.receive(x, r, d_in, scaling))
    ghost_B, *leaves_B = _leaves(None if slot_B is None else slot_B.receive(x, d_out, r, scaling))
    y, _ = _recorded_lora(
        x,
        _cast(weight, dtype),
        _cast(bias, dtype),
        _cast(lora_A, dtype),
        _cast(lora_B, dtype),
        scaling,
        ghost_A,
        *leaves_A,
        ghost_B,
        *leaves_B,
        _whole(slots["bias"], x),
    )
    return y


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    fan_in_fan_out: bool = False,
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
        return F.linear(x, followed(weight, x), None if bias is None else followed(bias, x))
    x = x.to(dtype := _compute_dtype(x))
    slot, widths = slots["weight"], weight.shape[::-1] if fan_in_fan_out else weight.shape
    ghost, *leaves = _leaves(None if slot is None else slot.receive(x, *widths))
    y: Tensor = _recorded_linear(
        x, _cast(weight, dtype), _cast(bias, dtype), fan_in_fan_out, ghost, *leaves, _whole(slots["bias"], x)
    )
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
            value = (value + slot.receive_whole(y)).to(x.dtype).unsqueeze(1)
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
    grouped, leaf = slot.receive_lookup(ids, weight.dtype)
    y: Tensor = _recorded_embedding(grouped, weight.detach(), -1 if padding_idx is None else padding_idx, leaf)
    return y.view(*ids.shape, weight.shape[1])


def _differentiable(
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """An op with a derivative. A compiler sees the op; eagerly an autograd function does the same with less overhead
    (87 µs a forward instead of 130 on a busy CPU), which small models and GPUs feel."""

    def full_backward(ctx: Any, g: Tensor | None, *others: Any) -> Any:
        if g is None:
            return backward(ctx, g, *others)
        with without_autocast(g):
            return backward(ctx, g, *others)

    def unviewed(*inputs: Any) -> Any:
        """Nobody may modify in place a view made within an op; a detached one shares its memory and is none."""
        output = forward(*inputs)
        return output.detach() if isinstance(output, Tensor) else tuple(part.detach() for part in output)

    op = define(schema, unviewed, fake, setup_context=setup, backward=full_backward)

    class PrivateLayer(torch.autograd.Function):  # messages look for this name in graphs
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = unviewed(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *gradients: Any) -> Any:
            return full_backward(ctx, *gradients)

    def run(*inputs: Any) -> Any:
        return op(*inputs) if torch.compiler.is_compiling() else PrivateLayer.apply(*inputs)

    return run


def _rows(grouped: Tensor) -> Tensor:
    return grouped.reshape(math.prod(grouped.shape[:-1]), grouped.shape[-1])


def _hand_over(ghost: bool, leaf: Tensor, left: Tensor, right: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of a receiver's two leaves."""
    n = leaf.shape[0]
    left, right = by_example(left, n), by_example(right, n)
    return (left, right) if ghost else per_example_grad(left, right, scale)


def _sum_tokens(rows: Tensor, leaf: Tensor) -> Tensor:
    return by_example(rows, leaf.shape[0]).sum(1, dtype=wide_dtype(rows.dtype))


def _lora_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    ghost_A: bool,
    first_A: Tensor | None,
    second_A: Tensor | None,
    ghost_B: bool,
    first_B: Tensor | None,
    second_B: Tensor | None,
    bias_leaf: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, h = lora_forward(_rows(x), weight, bias, lora_A, lora_B, scaling)
    return y.view(*x.shape[:-1], lora_B.shape[0]), h


def _lora_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, *_: Any) -> Any:
    return (x.new_empty((*x.shape[:-1], lora_B.shape[0])), x.new_empty((math.prod(x.shape[:-1]), lora_A.shape[0])))


def _lora_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_A, lora_B, scaling, ghost_A, first_A, _, ghost_B, first_B, _, bias_leaf = inputs
    ctx.set_materialize_grads(False)
    # The B phase needs h only: the wide input is not kept for the adapter.
    ctx.save_for_backward(
        x if first_A is not None else None,
        output[1] if first_B is not None else None,
        weight,
        lora_A,
        lora_B,
        first_A,
        first_B,
        bias_leaf,
    )
    ctx.scaling, ctx.ghost_A, ctx.ghost_B, ctx.x_shape = scaling, ghost_A, ghost_B, x.shape


def _lora_backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [None] * 13
    if g is None:
        return tuple(found)
    x, h, weight, lora_A, lora_B, first_A, first_B, bias_leaf = ctx.saved_tensors
    rows, scaling, u = _rows(g), ctx.scaling, None
    wants_dx = ctx.needs_input_grad[0]
    if first_B is not None:
        n = first_B.shape[0]
        left, right = by_example(g, n), by_example(h, n)
        if not ctx.ghost_B and (wants_dx or first_A is not None):
            found[10], found[11], u = per_example_grad_and_u(left, right, lora_B, scaling)
            u = _rows(u)
        else:
            found[10:12] = (left, right) if ctx.ghost_B else per_example_grad(left, right, scaling)
    if wants_dx:
        dx, u = lora_backward(rows, weight, lora_A, lora_B, scaling, u)
        found[0] = dx.view(ctx.x_shape)
    elif u is None and first_A is not None:
        u = rows @ lora_B
    if first_A is not None:
        assert u is not None
        found[7:9] = _hand_over(ctx.ghost_A, first_A, u, _rows(x), scaling)
    if bias_leaf is not None:
        found[12] = _sum_tokens(g, bias_leaf)
    return tuple(found)


_recorded_lora = _differentiable(
    "recorded_lora(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, bool ghost_A,"
    " Tensor? first_A, Tensor? second_A, bool ghost_B, Tensor? first_B, Tensor? second_B, Tensor? bias_leaf)"
    " -> (Tensor, Tensor)",
    _lora_reference,
    _lora_fake,
    _lora_setup,
    _lora_backward,
)


def _linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    return F.linear(x, weight, bias)


def _linear_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, fan_in_fan_out, ghost, first, _, bias_leaf = inputs
    ctx.save_for_backward(x if first is not None else None, weight, first, bias_leaf)
    ctx.fan_in_fan_out, ctx.ghost = fan_in_fan_out, ghost


def _linear_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, first, bias_leaf = ctx.saved_tensors
    dx = g @ weight if ctx.needs_input_grad[0] else None
    taken: tuple[Tensor | None, Tensor | None] = (None, None)
    if first is not None:
        left, right = (x, g) if ctx.fan_in_fan_out else (g, x)
        taken = _hand_over(ctx.ghost, first, left, right, 1.0)
    return dx, None, None, None, None, *taken, None if bias_leaf is None else _sum_tokens(g, bias_leaf)


_recorded_linear = _differentiable(
    "recorded_linear(Tensor x, Tensor weight, Tensor? bias, bool fan_in_fan_out, bool ghost, Tensor? first,"
    " Tensor? second, Tensor? bias_leaf) -> Tensor",
    _linear_reference,
    _linear_fake,
    _linear_setup,
    _linear_backward,
)


def _embedding_reference(ids: Tensor, weight: Tensor, padding_idx: int, leaf: Tensor) -> Tensor:
    return F.embedding(ids, weight)


def _embedding_fake(ids: Tensor, weight: Tensor, padding_idx: int, leaf: Tensor) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.padding_idx = inputs[2]


def _embedding_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    return None, None, None, g.masked_fill((ids == ctx.padding_idx).unsqueeze(-1), 0)


_recorded_embedding = _differentiable(
    "recorded_embedding(Tensor ids, Tensor weight, int padding_idx, Tensor leaf) -> Tensor",
    _embedding_reference,
    _embedding_fake,
    _embedding_setup,
    _embedding_backward,
)
