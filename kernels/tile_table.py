"""One launch over many tensors: a table of their addresses and sizes, and which of them a program's tile is part of.

A table is a 1-D int64 tensor: one column after another, each with an entry for every tensor. Its last column holds
the number of each tensor's first tile.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tables that a graph under capture will read, with what they are to hold: the graph's end nobody tells us.
_captured: list[Tensor] = []
_unfilled: list[tuple[Tensor, list[int]]] = []


@triton.jit
def owner_of(first_tiles, count, tile, PADDED: tl.constexpr):
    """Which of ``count`` tensors the tile is part of; PADDED is a power of two, at least ``count``."""
    index = tl.arange(0, PADDED)
    # One load and one sum: a binary search would wait for memory log₂(count) times.
    begun = tl.load(first_tiles + index, mask=index < count, other=tile + 1) <= tile
    return tl.sum(begun.to(tl.int32), 0) - 1


@functools.lru_cache(maxsize=64)
def first_tiles(sizes: tuple[int, ...], block: int) -> tuple[tuple[int, ...], int]:
    """The number of each tensor's first tile, and of all tiles, where a tile has ``block`` elements of one tensor."""
    firsts, tiles = [], 0
    for size in sizes:
        firsts.append(tiles)
        tiles += -(-size // block)
    return tuple(firsts), tiles


def send(table: list[int], device: torch.device) -> Tensor:
    """The table on ``device``, by one copy that never waits for it.

    While a CUDA graph is captured nothing can be copied from ordinary host memory, and nothing runs yet: the table is
    then filled by :func:`fill_captured`, before the first replay.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        held = torch.empty(len(table), dtype=torch.int64, device=device)
        _captured.append(held)
        _unfilled.append((held, table))
        return held
    return torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)


def fill_captured() -> None:
    """Fill the tables of the graphs captured since the last call; call it after each capture."""
    while _unfilled:
        held, table = _unfilled.pop()
        held.copy_(torch.tensor(table, dtype=torch.int64))
