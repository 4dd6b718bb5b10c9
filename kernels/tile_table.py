"""One launch over many tensors: a table of their addresses and sizes, and which of them a program's tile is part of.

A table is a 1-D int64 tensor: one column after another, each with an entry for every tensor. Its last column holds
the number of each tensor's first tile.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

# Entries that the launches of one graph may have in all.
_CAPACITY = 1 << 16


class CapturedTables:
    """Where the tables of a graph under capture lie: outside the graph's own memory, which its replays write over."""

    def __init__(self, device: torch.device):
        self._held = torch.empty(_CAPACITY, dtype=torch.int64, device=device)
        self._entries: list[int] = []

    def place(self, table: list[int]) -> Tensor:
        begin = len(self._entries)
        # Each table begins at a multiple of 128 bytes, as a tensor of its own would.
        self._entries += table + [0] * (-len(table) % 16)
        if len(self._entries) > _CAPACITY:
            raise RuntimeError("The graph has too many tables of tensors: capture fewer steps in one graph.")
        return self._held[begin : begin + len(table)]

    def fill(self) -> None:
        self._held[: len(self._entries)].copy_(torch.tensor(self._entries, dtype=torch.int64))


_capturing: CapturedTables | None = None


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

    Raises:
        RuntimeError: a CUDA graph is being captured outside :func:`captured_tables`.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if _capturing is None:
            raise RuntimeError("Capture this launch inside captured_tables(), which fills its table afterwards.")
        return _capturing.place(table)
    return torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)


@contextlib.contextmanager
def captured_tables(device: torch.device) -> Iterator[CapturedTables]:
    """Around the capture of a CUDA graph: its launches' tables, filled at the end, to be kept as long as the graph.

    Nothing can be copied from ordinary host memory while a graph is captured, and nothing runs yet.
    """
    global _capturing
    tables = _capturing = CapturedTables(device)
    try:
        yield tables
        tables.fill()
    finally:
        _capturing = None
