"""LoRA's backward to its input: u = g B and dx = g W0 + s · u A."""

from torch import Tensor

from lora_dp.ops.registry import define


def _reference(
    g: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    # Few rows rather than few columns, as in the forward.
    u = (lora_B.t() @ g.t()).t()
    if weight is None:
        return (u @ lora_A).mul_(scaling), u
    return (g @ weight).addmm_(u, lora_A, alpha=scaling), u


def _fake(
    g: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    return g.new_empty((g.shape[0], lora_A.shape[1])), g.new_empty((lora_B.shape[1], g.shape[0])).t()


_op = define(
    "lora_backward(Tensor g, Tensor? weight, Tensor lora_A, Tensor lora_B, float scaling) -> (Tensor, Tensor)",
    _reference, _fake)


def lora_backward(
    g: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Gradient to the input, and u on the way.

    Args:
        g: (rows, d_out), the gradient of the output.
        weight: (d_out, d_in), or None when only the adapter's update was computed.
        lora_A: (r, d_in).
        lora_B: (d_out, r).
        scaling: s.

    Returns:
        dx (rows, d_in) and u (rows, r), in the dtype of ``g``.
    """
    dx, u = _op(g, weight, lora_A, lora_B, scaling)
    return dx, u
