"""LoRA's backward to its input: u = g B and dx = g W0 + s · u A."""

from torch import Tensor

from lora_dp.ops.registry import define


def _reference(
    g: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, u: Tensor | None
) -> tuple[Tensor, Tensor]:
    if u is None:
        # Few rows rather than few columns, as in the forward.
        u = (lora_B.t() @ g.t()).t()
        found = u.contiguous()
    else:
        found = u.new_empty(0)
    if weight is None:
        return (u @ lora_A).mul_(scaling), found
    return (g @ weight).addmm_(u, lora_A, alpha=scaling), found


def _kernel(
    g: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, u: Tensor | None
) -> tuple[Tensor, Tensor]:
    from lora_dp.kernels.adapted_product import adapted_product
    from lora_dp.kernels.launching import MAX_RANK
    from lora_dp.kernels.low_rank_update import add_low_rank_
    from lora_dp.kernels.skinny_product import skinny_product

    if lora_A.shape[0] > MAX_RANK:
        return _reference(g, weight, lora_A, lora_B, scaling, u)
    if u is None and weight is not None:
        # The forward's shape of work: W0ᵀ for W0, Bᵀ for A, Aᵀ for B.
        return adapted_product(g, weight.t(), None, lora_B.t(), lora_A.t(), scaling)
    given, u = u, skinny_product(g, lora_B.t()) if u is None else u
    if weight is None:
        dx = (u @ lora_A).mul_(scaling)
    else:
        dx = g @ weight
        add_low_rank_(dx, u, lora_A.t(), scaling)
    return dx, u if given is None else u.new_empty(0)


def _fake(
    g: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, u: Tensor | None
) -> tuple[Tensor, Tensor]:
    found = g.new_empty((g.shape[0], lora_B.shape[1])) if u is None else g.new_empty(0)
    return g.new_empty((g.shape[0], lora_A.shape[1])), found


_op = define(
    "lora_backward(Tensor g, Tensor? weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? u)"
    " -> (Tensor, Tensor)",
    _reference,
    _fake,
    kernel=_kernel,
)


def lora_backward(
    g: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, u: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient to the input, and u on the way.

    Args:
        g: (rows, d_out), the gradient of the output.
        weight: (d_out, d_in), or None when only the adapter's update was computed.
        lora_A: (r, d_in).
        lora_B: (d_out, r).
        scaling: the factor s of the adapter.
        u: g B (rows, r), where it is known already.

    Returns:
        dx (rows, d_in) and u (rows, r), in the dtype of ``g``.
    """
    dx, found = _op(g, weight, lora_A, lora_B, scaling, u)
    return dx, found if u is None else u
