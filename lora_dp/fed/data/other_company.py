"""Batches in which rows stand elsewhere and beside others: what hangs on a row alone stays the same in all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_dp.fed.data.examples import Batch

# How much larger the inputs of the other company are.
_LOUD = 100.0


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
