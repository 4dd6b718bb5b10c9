"""Batches in which rows stand elsewhere and beside others: what hangs on a row alone stays the same in all of them."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_dp.fed.data.examples import Batch
from lora_dp.isolation.batches.calls import tensors_in

# How much larger the inputs of the other company are.
_LOUD = 100.0
# Arguments of ops that are tensors and say where groups of rows begin: products of mixed experts, packed sequences.
_GROUPS = frozenset(("offs", "offsets", "batch_sizes", "cum_seq_q", "cum_seq_k", "cu_seqlens_q", "cu_seqlens_k"))


def in_other_company(batch: Batch, others: Batch) -> list[Batch]:
    """The batch itself; moved by a row; every second row beside others, which are louder; copies of its first row.

    Args:
        batch, others: of the same shapes.
    """
    place = torch.arange(len(next(iter(batch.values()))), device=next(iter(batch.values())).device)
    even = place % 2 == 0
    return [
        batch,
        {name: tensor[place.roll(1)] for name, tensor in batch.items()},
        {
            name: torch.where(even.view(-1, *[1] * (tensor.dim() - 1)), tensor, _loud(others[name]))
            for name, tensor in batch.items()
        },
        {name: tensor[place * 0] for name, tensor in batch.items()},
    ]


def rows_stayed(found: Sequence[Tensor]) -> bool:
    """Whether what was found of each row (N, …) is the same to the last bit in all of :func:`in_other_company`."""
    alone, moved, beside, copied = found
    return (
        torch.equal(alone.roll(1, 0), moved)
        and torch.equal(alone[::2], beside[::2])
        and torch.equal(alone[:1], copied[:1])
    )


def _loud(tensor: Tensor) -> Tensor:
    return tensor * _LOUD if tensor.is_floating_point() else tensor


class Ops(TorchDispatchMode):
    """Takes note of each op and the shapes that it works on.

    Args:
        noting: whether it begins at once.

    Attributes:
        grouped: whether one of them was told by a tensor which rows belong together.

    >>> with Ops() as ops:
    ...     _ = torch.zeros(2) + 1
    >>> len(ops.taken()), ops.grouped
    (2, False)
    """

    def __init__(self, *, noting: bool = True) -> None:
        super().__init__()
        self.noting, self.grouped = noting, False
        self._done: list[Hashable] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.noting:
            given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            self.grouped |= any(
                isinstance(value, Tensor) and name in _GROUPS for name, value in {**given, **(kwargs or {})}.items()
            )
            self._done.append((func, *(tensor.shape for tensor in tensors_in((args, kwargs, result)))))
        return result

    def taken(self) -> list[Hashable]:
        """What was done since it was asked for last."""
        done, self._done = self._done, []
        return done
