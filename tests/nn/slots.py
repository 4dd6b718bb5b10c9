"""Slots of one parameter, and the sums that they must come to."""

import torch
from torch import Tensor, nn

from lora_dp.nn.per_example import Slot
from lora_dp.ops.clipped_sum import clipped_sum_kept
from lora_dp.ops.per_example_grad import per_example_grad
from tests.support import assert_close


def slot_of(shape: tuple[int, ...], n: int, method: str, dtype: torch.dtype = torch.float32) -> Slot:
    return Slot("layer.weight", nn.Parameter(torch.zeros(shape, dtype=dtype)), n, method)


def give(slot: Slot, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """As one use of the parameter in backward would."""
    ghost, first, second = slot.receive(left, left.shape[2], right.shape[2], scale)
    found = (left, right) if ghost else per_example_grad(left, right, scale)
    torch.autograd.backward([first, second], list(found))


def weighted_sum(slot: Slot, coefficients: Tensor) -> Tensor:
    return slot.recomputed_sum(coefficients) if slot.kept is None else clipped_sum_kept(slot.kept, coefficients)


def check(slot: Slot, gradients: Tensor, relative: float = 1e-5) -> None:
    """Norms and weighted sum against the per-example gradients (N, p, q) in float64."""
    coefficients = torch.linspace(0, 1, slot.n)
    assert_close(slot.norms().square(), gradients.square().sum((1, 2)), relative)
    expected = torch.einsum("n,npq->pq", coefficients.double(), gradients)
    assert_close(weighted_sum(slot, coefficients), expected, relative)


def outer(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    return scale * torch.einsum("ntp,ntq->npq", left.double(), right.double())
