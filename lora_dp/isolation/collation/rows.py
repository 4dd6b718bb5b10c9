"""Where the examples of a collated batch are: along a dimension of a tensor or an array, or in a list with an entry for
each.

Two batches tell, one with all examples of the other twice: widths stay, and what is twice as long goes by example.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lora_dp.isolation.collation.leaves import are_texts, as_tensor, leaves, stands_alone

# The number of an entry of a list, in the names of leaves.
ENTRY = re.compile(r"(?<=\[)\d+(?=\])")
# What each example has: in the first dimension of a tensor, or one by one, with None where it has nothing of the name.
Rows = Tensor | list[Tensor | None]


class Layout(NamedTuple):
    """What of a batch goes by example.

    Attributes:
        axes: by name, along which dimension of a tensor or an array; the first, where nothing is known.
        lists: names of the lists with an entry for each.
        others: names of what goes by no example.
        passed: names of rows that are passed over.
    """

    axes: Mapping[str, int] = {}
    lists: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    passed: frozenset[str] = frozenset()

    def is_by_example(self, name: str) -> bool:
        """Whether a leaf of this name is known to be."""
        return name in self.axes or any(around in self.lists for around in (name, *lists_around(name)))


def lists_around(name: str) -> Iterator[str]:
    """The names of the lists in which a leaf is."""
    return (name[: entry.start() - 1] for entry in ENTRY.finditer(name))


def values(batch: Any, *, alone: bool = False) -> dict[str, Tensor]:
    """What a batch holds, as tensors.

    Args:
        batch: whatever a collate function returns.
        alone: whether texts that are in no list of texts are wanted too.
    """
    found = {name: as_tensor(leaf) for name, leaf in leaves(batch) if alone or not stands_alone(leaf)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def lengths(batch: Any) -> dict[str, int]:
    """How many entries each list has, but those of numbers."""
    found: dict[str, int] = {}
    for name, leaf in leaves(batch):
        for entry in ENTRY.finditer(name):
            around = name[: entry.start() - 1]
            found[around] = max(found.get(around, 0), int(entry.group()) + 1)
        if are_texts(leaf):
            found[name] = len(leaf)
    return found


def layout_of(base: Any, twice: Any, n: int) -> Layout:
    """The layout of a batch, of which ``base`` holds ``n`` examples and ``twice`` holds them twice."""
    longer, few, many = values(twice), lengths(base), lengths(twice)
    found = {name: _axis(tensor, longer[name], n) for name, tensor in values(base).items() if name in longer}
    axes = {name: place for name, place in found.items() if place is not None}
    lists = frozenset(name for name, length in few.items() if (length, many.get(name)) == (n, 2 * n))
    return Layout(axes, lists, frozenset(found.keys() - axes.keys()))


def _axis(tensor: Tensor, longer: Tensor, n: int) -> int | None:
    sizes = list(zip(tensor.shape, longer.shape, strict=False))
    return sizes.index((n, 2 * n)) if (n, 2 * n) in sizes and tensor.dim() == longer.dim() else None


def rows_by_example(batch: Any, n: int, layout: Layout) -> dict[str, Rows]:
    """What the ``n`` examples of a batch have, by name."""
    found: dict[str, Rows] = {}
    entries: dict[str, dict[int, Tensor]] = {}
    for name, place, leaf in _placed(batch, layout):
        axis = layout.axes.get(name, 0)
        if name in layout.passed or (tensor := as_tensor(leaf)) is None:
            continue
        if place is not None:
            entries.setdefault(name, {})[place] = tensor
        elif not stands_alone(leaf) and name not in layout.others and tensor.dim() > axis and tensor.shape[axis] == n:
            found[name] = tensor.movedim(axis, 0)
    found.update({name: [of.get(place) for place in range(n)] for name, of in entries.items() if max(of) < n})
    return found


def texts(batch: Any, layout: Layout) -> set[str]:
    """By which of these names examples have texts."""
    return {
        name
        for name, place, leaf in _placed(batch, layout)
        if place is not None and (are_texts(leaf) or stands_alone(leaf))
    }


def _placed(batch: Any, layout: Layout) -> Iterator[tuple[str, int | None, Any]]:
    """Leaves by name, and of which example's entry in a list they are."""
    for name, leaf in leaves(batch):
        if name in layout.lists and are_texts(leaf):
            yield from ((f"{name}[…]", place, text) for place, text in enumerate(leaf))
            continue
        entry = next((entry for entry in ENTRY.finditer(name) if name[: entry.start() - 1] in layout.lists), None)
        yield (
            (name, None, leaf)
            if entry is None
            else (f"{name[: entry.start()]}…{name[entry.end() :]}", int(entry.group()), leaf)
        )
