"""Of which kind a batch is, by what could mix its examples; and which of its examples to try that on."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from lora_dp.isolation.batches.calls import even, groups_of, is_by_example, is_index, named_leaves, of_whole_batch
from lora_dp.isolation.batches.lists import EntrySizes
from lora_dp.isolation.batches.padding import runs_of
from lora_dp.isolation.batches.tables import Table

# Names of integer arguments that say of each token or example what it counts for.
_LABELS = ("label", "position", "target")
# Numbers in the name of a group of examples, at most.
_NAME = 8
# And in a row of which one number by itself may be the name.
_NAMES = 4


def structure(tree: Any, n: int) -> Hashable:
    """What of a batch decides which code runs on it: equal for two batches in which the same could mix.

    Names, dtypes and dimensions (each size up to a factor of two), whether labels are ignored or masked and evenly so,
    whether numbers of examples are all equal, or some of them, what is switched, and, where tensors hold rows of all
    examples together, whether those that may describe the grouping are even.
    """
    described: list[Hashable] = []
    leaves, ragged = named_leaves(tree), bool(of_whole_batch(tree, n))
    # A mask tells of padding by itself.
    runs = not any("mask" in name and is_by_example(leaf, n) and leaf.dim() == 2 for name, leaf in leaves)
    for name, leaf in leaves:
        if isinstance(leaf, Table):
            described.append((name, "table", leaf.tensor.dtype, *(size.bit_length() for size in leaf.tensor.shape)))
            continue
        if not isinstance(leaf, Tensor):
            described.append((name, type(leaf).__name__, _setting(leaf)))
            continue
        sizes = ["n" if size == n and place == 0 else size.bit_length() for place, size in enumerate(leaf.shape)]
        described.append((name, leaf.dtype, tuple(sizes), _setting(leaf), *_evenness(name, leaf, n, ragged, runs)))
    return tuple(described)


def _evenness(name: str, leaf: Tensor, n: int, ragged: bool, runs: bool) -> tuple[Hashable, ...]:
    if ragged and not is_by_example(leaf, n) and is_index(leaf):
        # Whose rows are in another order is another case, though all have as many.
        return *map(even, groups_of(leaf)), bool((leaf.diff() >= 0).all())
    if not is_by_example(leaf, n) or not leaf.numel():
        return ()
    if leaf.dim() == 2 and _marks(name, leaf):
        used = leaf.reshape(n, -1).double().sum(1)
        return bool((leaf == 1).all()), even(used)
    if leaf.dim() > 2 and "mask" in name:
        return (even((leaf == leaf.max()).reshape(n, -1).sum(1)),)
    ends = [(int(run.max()).bit_length(), even(run)) for run in runs_of(leaf)] if runs else []
    return bool(_shares(name, leaf, n)), *ends, *_whole_numbers(name, leaf, n, ragged)


def _whole_numbers(name: str, leaf: Tensor, n: int, ragged: bool) -> tuple[Hashable, ...]:
    if leaf.is_floating_point() or leaf.dtype == torch.bool or leaf.dim() > 2:
        return ()
    # Labels that are ignored; and lengths, by which a model trims or packs.
    counted = leaf >= 0
    ignored = bool(counted.all()), even(counted.reshape(n, -1).sum(1))
    return (*ignored, _reach(name, leaf), even(leaf) if ragged or leaf.dim() == 1 else None)


def _shares(name: str, leaf: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
    """Where several examples have the same session, patient or query by name, in all numbers or in one of a few: which
    of the names each has, and how many have it. Nothing where entries by example are no names: masks, places in a text,
    labels of tokens, more numbers than a name has."""
    labels = any(word in name for word in _LABELS) and (leaf.dim() > 1 or "position" in name)
    if not 0 < leaf.numel() <= n * _NAME or labels or (leaf.dim() == 2 and _marks(name, leaf)):
        return []
    rows = leaf.reshape(n, -1)
    columns = rows.split(1, dim=1) if 1 < rows.shape[1] <= _NAMES and not rows.is_floating_point() else ()
    found = [part.unique(dim=0, return_inverse=True, return_counts=True)[1:] for part in (rows, *columns)]
    # A number that all have in common names nobody, unless it is the only one.
    return [(own, counts) for place, (own, counts) in enumerate(found) if (place and 1) < len(counts) < n]


def _marks(name: str, leaf: Tensor) -> bool:
    """Whether it says of each token how much it counts."""
    return any(word in name for word in ("mask", "weight")) or (
        (leaf.is_floating_point() or leaf.dtype == torch.bool) and bool(((leaf == 0) | (leaf == 1)).all())
    )


def _has_reach(name: str, leaf: Tensor) -> bool:
    """A position beyond an example's tokens is passed over."""
    return "position" in name and leaf.dim() == 1


def _reach(name: str, leaf: Tensor) -> int | None:
    return int(leaf.max()) if _has_reach(name, leaf) else None


def extremes(tree: Any, n: int) -> set[int]:
    """Examples with the least and the most of every integer entry: of unequal groups, the largest is among them."""
    found: set[int] = set()
    for _, leaf in named_leaves(tree):
        if is_by_example(leaf, n) and not leaf.is_floating_point() and leaf.dtype != torch.bool and leaf.numel():
            # Of sizes of a grid, the product counts.
            sizes = leaf.reshape(n, -1)
            for value in (sizes.sum(1), sizes.prod(1)):
                found |= {int(value.argmin()), int(value.argmax())}
        elif isinstance(leaf, Tensor) and is_index(leaf):
            for value in groups_of(leaf):
                found |= {place for place in (int(value.argmin()), int(value.argmax())) if place < n}
    return found


def chosen(tree: Any, n: int, most: int) -> list[int]:
    """Examples for a trial, at most ``most``: two that may be of one group, where labels or positions are unusual, two
    of one class, the shortest, the longest, and the first and last; and two more that may be of one group otherwise."""
    unusual, usual = [], []
    groups: list[tuple[Tensor, Tensor]] = []
    classes: list[tuple[Tensor, Tensor]] = []
    for name, leaf in named_leaves(tree):
        if is_by_example(leaf, n):
            (classes if any(word in name for word in _LABELS) else groups).extend(_shares(name, leaf, n))
        if is_by_example(leaf, n) and not leaf.is_floating_point() and any(word in name for word in _LABELS):
            entries = leaf.reshape(n, -1)
            counts = (entries >= 0).sum(1)
            if not even(counts):
                unusual.append(int(counts.argmin()))
                usual.append(int(counts.argmax()))
            if _has_reach(name, leaf):
                unusual.append(int(leaf.argmax()))
    lengths = _lengths(tree, n)
    if lengths is not None:
        unusual.append(int(lengths.argmin()))
        usual.append(int(lengths.argmax()))
    # Two of the smallest groups first; and where there are more than fit, those first that a loss may pass over.
    groups.sort(key=lambda group: -len(group[1]))
    together = [place for group in groups[:1] for place in _two_of(group)]
    of_a_class = [place for group in classes for place in _two_of(group)]
    found = list(dict.fromkeys([*together, *unusual, *of_a_class, *usual, 0, n - 1, *range(n)]))[:most]
    for group in groups[1:2]:
        if len(group[0][found].unique()) == len(found):  # no two of one group yet
            found += _two_of(group)
    return sorted(set(found))


def _two_of(group: tuple[Tensor, Tensor]) -> list[int]:
    """Two examples of the largest of some groups."""
    own, counts = group
    return (own == counts.argmax()).nonzero()[:2, 0].tolist()


def _lengths(tree: Any, n: int) -> Tensor | None:
    for name, leaf in named_leaves(tree):
        if is_by_example(leaf, n) and ("mask" in name and leaf.dim() == 2 or isinstance(leaf, EntrySizes)):
            return leaf.as_subclass(Tensor) if leaf.dim() == 1 else (leaf != 0).sum(1)
    # Padding that no mask shows.
    for _, leaf in named_leaves(tree):
        if is_by_example(leaf, n) and leaf.numel() and (runs := runs_of(leaf)):
            longest = torch.stack(runs).amax(0)
            if not even(longest):
                return leaf.shape[1] - longest
    return None


def _setting(leaf: Any) -> bool | str | None:
    if isinstance(leaf, bool | str):
        return leaf
    return bool(leaf) if isinstance(leaf, Tensor) and leaf.dim() == 0 and leaf.dtype == torch.bool else None
