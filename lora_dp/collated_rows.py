"""Where the examples of a collated batch are: along a dimension of a tensor or an array, or in a list with an entry for
each.

Two batches tell, one with all examples of the other twice: widths stay, and what is twice as long goes by example.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from lora_dp.opened import tensor_of

# How deep objects in objects are looked into.
_DEPTH = 4
# The number of an entry of a list, in the names of leaves.
ENTRY = re.compile(r"(?<=\[)\d+(?=\])")
# What each example has: in the first dimension of a tensor, or one by one, with None where it has nothing of the name.
Rows = Tensor | list[Tensor | None]


class Layout(NamedTuple):
    """What of a batch goes by example.

    Attributes:
        axes: by name, along which dimension of a tensor or an array; the first, where nothing is known.
        lists: names of the lists with an entry for each.
    """

    axes: Mapping[str, int] = {}
    lists: frozenset[str] = frozenset()


def leaves(batch: Any, *, lists: bool = True, depth: int = 0) -> list[tuple[str, Any]]:
    """What a batch is made of, by name; of objects, their attributes.

    Args:
        batch: whatever a collate function returns.
        lists: whether the entries of a list of numbers are told apart, or it is one leaf.
        depth: how many objects are around it.
    """
    plain = dict(batch) if hasattr(batch, "keys") else batch
    found = []
    for path, leaf in pytree.tree_flatten_with_path(plain, is_leaf=lambda node: isinstance(node, PackedSequence) or (
            not lists and _are_numbers(node)))[0]:
        name, inner = pytree.keystr(path), _inner(leaf) if depth <= _DEPTH else None
        found += [(name, leaf)] if inner is None else [
            (name + part, value) for part, value in leaves(inner, lists=lists, depth=depth + 1)]
    return found


def _inner(leaf: Any) -> Any:
    """What is within a leaf that holds more; None if it is one by itself."""
    if isinstance(leaf, PackedSequence):
        return pad_packed_sequence(leaf, batch_first=True)
    if isinstance(leaf, Tensor):
        return list(leaf.unbind()) if leaf.is_nested else None
    if isinstance(leaf, np.ndarray):
        return leaf.tolist() if leaf.dtype == object and leaf.ndim else None
    return vars(leaf) if hasattr(leaf, "__dict__") and not hasattr(leaf, "__array__") else None


def _are_numbers(node: Any) -> bool:
    return type(node) in (list, tuple) and all(isinstance(entry, int | float | np.number | np.bool_) for entry in node)


def values(batch: Any) -> dict[str, Tensor]:
    """The tensors and arrays of a batch, its numbers, and its lists of numbers, as tensors."""
    found: dict[str, Tensor] = {}
    for name, leaf in leaves(batch, lists=False):
        if isinstance(leaf, Tensor):
            found[name] = leaf
        elif isinstance(leaf, int | float) or hasattr(leaf, "__array__") or _are_numbers(leaf):
            tensor = tensor_of(np.asarray(leaf))
            if tensor is not None:
                found[name] = tensor
    return found


def lengths(batch: Any) -> dict[str, int]:
    """How many entries each list has."""
    found: dict[str, int] = {}
    for name, _ in leaves(batch, lists=False):
        for entry in ENTRY.finditer(name):
            around = name[: entry.start() - 1]
            found[around] = max(found.get(around, 0), int(entry.group()) + 1)
    return found


def layout_of(base: Any, twice: Any, n: int) -> Layout:
    """The layout of a batch, of which ``base`` holds ``n`` examples and ``twice`` holds them twice."""
    longer = values(twice)
    axes = {name: place for name, tensor in values(base).items() if name in longer
            for place in [_axis(tensor, longer[name], n)] if place is not None}
    few, many = lengths(base), lengths(twice)
    return Layout(axes, frozenset(name for name, length in few.items() if (length, many.get(name)) == (n, 2 * n)))


def _axis(tensor: Tensor, longer: Tensor, n: int) -> int | None:
    sizes = list(zip(tensor.shape, longer.shape, strict=False))
    return sizes.index((n, 2 * n)) if (n, 2 * n) in sizes and tensor.dim() == longer.dim() else None


def by_example(batch: Any, n: int, layout: Layout) -> dict[str, Rows]:
    """What the ``n`` examples of a batch have, by name."""
    found: dict[str, Rows] = {}
    entries: dict[str, dict[int, Tensor]] = {}
    for name, tensor in values(batch).items():
        entry = next((entry for entry in ENTRY.finditer(name) if name[: entry.start() - 1] in layout.lists), None)
        axis = layout.axes.get(name, 0)
        if entry is not None:
            entries.setdefault(f"{name[: entry.start()]}…{name[entry.end():]}", {})[int(entry.group())] = tensor
        elif tensor.dim() > axis and tensor.shape[axis] == n:
            found[name] = tensor.movedim(axis, 0) if axis else tensor  # of sparse ones the first alone
    found.update({name: [of.get(place) for place in range(n)] for name, of in entries.items() if max(of) < n})
    return found
