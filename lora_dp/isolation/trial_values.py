"""What two trial passes gave one example: whether it is the same, but for rounding."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 2e-2
Gradients = Mapping[str, list[Tensor]]
T = TypeVar("T")

# What a layer whose gradient vanishes has left of it, relative to the largest gradient of all layers.
_ROUNDING = 1e-3
# A score that is larger stands for nothing, perhaps: it is no measure for those beside it.
_LARGE = 1e3
# Unless it is above 0, in a model whose weights have grown: this part of it may have been rounded off any other.
_GROWN = 1 / 64

# By more than this share of its length an example's gradient is another one; in half precision, whose rounding
# switches many units of a ReLU, by more than that.
_CHOSEN, _CHOSEN_HALF = 1 / 16, 1 / 4


def tolerance(dtype: torch.dtype) -> float:
    """Up to which share of the largest value two values of this dtype are taken for the same.

    Under autocast values of float32 are made of half ones.
    """
    if dtype == torch.float32 and any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        return _HALF_TOLERANCE
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)


def rows_of(tensor: Tensor, n: int) -> Tensor:
    """Example-major grouping, as the layers do it: (N, everything else)."""
    return tensor.reshape(n, -1)


def differ(left: Tensor, right: Tensor, least: float = 0.0, *, masked: bool = False) -> bool:
    """Whether they differ by more than rounding, of values that are at least as large as ``least``.

    Args:
        left, right: of the same example, in two passes.
        masked: whether numbers may be among them that stand for nothing, such as the -1e9 of a class that is masked:
            large ones are compared with themselves alone, and hide nothing beside them, or only rounding if above 0.
    """
    if left.shape != right.shape:
        return True
    # What others made NaN or infinite is changed; what was so by itself hides nothing beside it.
    finite = left.isfinite()
    if not torch.equal(finite, right.isfinite()):
        return True
    left, right = left[finite], right[finite]
    if not left.numel():
        return False
    if not left.is_floating_point():
        return not torch.equal(left, right)
    sizes = left.abs()
    scale = sizes.max()
    if masked:
        ordinary = sizes < _LARGE
        scale = torch.where(ordinary, sizes[ordinary].max() if bool(ordinary.any()) else sizes, sizes)
        scale = torch.maximum(scale, left.max() * _GROWN)
    return bool(((left - right).abs() > tolerance(left.dtype) * scale.clamp(min=least)).any())


def least_of(gradients: Gradients, i: int, n: int) -> float:
    """A layer whose gradient for example i is smaller than this beside those of other layers has rounding alone."""
    return _ROUNDING * max(
        (largest(rows_of(gradient, n)[i]) for found in gradients.values() for gradient in found), default=0.0
    )


def is_another(
    left: Gradients, right: Gradients, some: Sequence[int], n: int, scales: tuple[float, float] = (1, 1)
) -> int | None:
    """An example whose gradient at a layer is another among ``n`` than among ``some`` of them; None if there is none.

    By the length of the difference: among very many numbers some unit of a ReLU is near enough to zero to be switched
    by rounding, while an example that others displace loses all of its gradient, or much of it.

    Args:
        left: of all examples.
        right: of ``some`` of them, in their order.
        n: number of all.
        scales: what the first and the second are multiplied by, to be alike.
    """
    pairs = [
        (rows_of(one, n)[some].double() * scales[0], rows_of(other, len(some)).double() * scales[1], one.dtype)
        for _, one, other in pairs_of(left, right)
    ]
    least = _ROUNDING * max((float(_lengths(one).max()) for one, _, _ in pairs), default=0.0)
    for one, other, dtype in pairs:
        if one.shape != other.shape:
            return some[0]
        off, size = _lengths(other - one), _lengths(one).clamp(min=least)
        changed = (off > _share(dtype) * size) | (one.isfinite() != other.isfinite()).any(1)
        if bool(changed.any()):
            return some[int(changed.nonzero()[0])]
    return None


def _lengths(rows: Tensor) -> Tensor:
    """Of each row, by its finite numbers."""
    return rows.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).norm(dim=1)


def _share(dtype: torch.dtype) -> float:
    return _CHOSEN if tolerance(dtype) < _ROUNDING else _CHOSEN_HALF


def largest(values: Tensor) -> float:
    """Of those that are finite."""
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def pairs_of(left: Gradients, right: Gradients) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The gradients of two passes at the same layers, in order, with the layer's name."""
    return (
        (name, one, other)
        for name, found in left.items()
        for one, other in zip(found, right.get(name, []), strict=False)
    )


def calls_in_both(left: Sequence[tuple[str, T]], right: Sequence[tuple[str, T]]) -> Iterator[tuple[str, T, T]]:
    """What two passes have of the same call of the same layer, with its name: one may have left some out."""
    others: dict[str, deque[T]] = {}
    for name, value in right:
        others.setdefault(name, deque()).append(value)
    for name, value in left:
        if others.get(name):
            yield name, value, others[name].popleft()


def sum_of(loss: Tensor) -> Tensor:
    """A loss, or the sum of those of single examples."""
    return loss if loss.dim() == 0 else loss.sum()
