"""Whether what an example has in two batches is the same: but for a few roundings, and for padding."""

import torch
from torch import Tensor

from lora_dp.isolation.batches.calls import without_nan
from lora_dp.isolation.collation.rows import Rows

_RELATIVE = 1e-5


def alike(left: Rows | None, right: Rows | None) -> bool:
    """Whether both have the same, and as much."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and _equal(left, right)
    if isinstance(left, list) and isinstance(right, list):
        return all(map(alike, left, right))
    return left is right  # an example has nothing of this name in both


def _equal(left: Tensor, right: Tensor) -> bool:
    return bool(close(left, right).all())


def close(left: Tensor, right: Tensor) -> Tensor:
    """Which values are the same, of two tensors of one shape."""
    right = right.to(left.device)
    if not left.is_floating_point():
        return left == right
    return torch.isclose(left, right.to(left), rtol=_RELATIVE, atol=0, equal_nan=True)


def padded_alike(left: Tensor | None, right: Tensor | None) -> bool:
    """Equal where both have values, at the start or the end, and one value in all that one has more."""
    if left is None or right is None or left.shape == right.shape or left.dim() != right.dim():
        return alike(left, right)
    smaller = [min(a, b) for a, b in zip(left.shape, right.shape, strict=True)]
    for at_end in (False, True):
        cut = tuple(slice(-size, None) if at_end and size else slice(0, size) for size in smaller)
        if _equal(left[cut], right[cut]) and all(_is_padding(tensor, cut) for tensor in (left, right)):
            return True
    return False


def _is_padding(tensor: Tensor, cut: tuple[slice, ...]) -> bool:
    rest = torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device)
    rest[cut] = False
    values = without_nan(tensor[rest])
    return not values.numel() or bool((values == values[0]).all())
