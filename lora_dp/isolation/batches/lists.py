"""Lists among a model's arguments with an entry for each example: of numbers, such as lengths of texts, or of anything
else, such as the texts themselves or the boxes in each image."""

from collections import deque
from collections.abc import Iterator, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_dp.isolation.batches.objects import put_together, take_apart


class NumberList(Tensor):
    """A list (N,) of a model's arguments, as a tensor int64, or float64 if it holds a float."""


class EntrySizes(Tensor):
    """How long the entries of an :class:`EntryList` are, (N,) int64; -1 for those that hold nothing."""


class EntryList:
    """A list of a model's arguments with one entry for each example, of which some examples can be taken.

    Attributes:
        entries: the list, tuple or deque, a dict by number, or an array of what is no number, as it came.
        places: (M,) int64, for each of M examples the place of its entry; that of the first where several are equal.
        sizes: (M,), theirs.
    """

    def __init__(self, entries: Any, places: Tensor, sizes: Tensor):
        self.entries, self.places, self.sizes = entries, places, sizes

    def chosen(self) -> Any:
        """The list of these examples, with tensors of its own."""
        if isinstance(self.entries, np.ndarray):
            return self.entries[self.places.numpy()]
        taken = [pytree.tree_map(_copied, self.entries[place]) for place in self.places.tolist()]
        return dict(enumerate(taken)) if isinstance(self.entries, dict) else type(self.entries)(taken)


pytree.register_pytree_node(
    EntryList,
    lambda node: ([node.places, node.sizes], node.entries),
    lambda tensors, entries: EntryList(entries, *tensors),
    flatten_with_keys_fn=lambda node: (
        [(pytree.MappingKey("places"), node.places), (pytree.MappingKey("sizes"), node.sizes)],
        node.entries,
    ),
)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def as_tensors(tree: Any, n: int, others: set[str] | None = None) -> Any:
    """The same call, taken apart, with its lists of ``n`` entries, which follow the examples, as :class:`NumberList` or
    :class:`EntryList`.

    Args:
        tree, n: the call with a batch of ``n`` examples, which may be none.
        others: names of lists that follow no examples, since they were of another length once; those of this call join.
    """
    tree, others = take_apart(tree), set() if others is None else others
    # The tuple of positional arguments is no list among them, nor is the call.
    call = {id(part) for part in (tree, *tree[:1]) if type(part) is tuple} if isinstance(tree, tuple) else set()
    if n:
        others |= _of_another_length(tree, n, call)
    return _lists_as_tensors(tree, n, others, "", call)


def _lists_as_tensors(tree: Any, n: int, others: Set[str], above: str, call: Set[int] = frozenset()) -> Any:
    def is_entries(node: Any) -> bool:
        return id(node) not in call and _is_list(node) and len(node) == n > 0

    def one(path: Any, node: Any) -> Any:
        if not is_entries(node):
            return node
        name = above + pytree.keystr(path)
        if name not in others and isinstance(node, list) and all(map(_is_number, node)):
            whole = all(type(entry) is int for entry in node)
            return torch.tensor(node, dtype=torch.int64 if whole else torch.float64).as_subclass(NumberList)
        if name not in others and not _of_whole_batch(node, n):
            entries = list(node.values()) if isinstance(node, dict) else list(node)
            return EntryList(
                node,
                torch.tensor(_first_places(entries)),
                torch.tensor([_size(entry) for entry in entries]).as_subclass(EntrySizes),
            )
        if isinstance(node, np.ndarray):
            return node
        return pytree.tree_map_with_path(
            lambda path, part: _lists_as_tensors(part, n, others, name + pytree.keystr(path)),
            node,
            is_leaf=lambda part: part is not node,
        )

    return pytree.tree_map_with_path(one, tree, is_leaf=is_entries)


def _is_list(node: Any) -> bool:
    """Whether it may have an entry for each example: texts come as a tuple, too, from torch's collate function."""
    if isinstance(node, np.ndarray):  # of numbers they are tensors by now
        return node.ndim > 0
    if type(node) is tuple and len(node) == 2 and any(isinstance(part, int | float | Tensor) for part in node):
        return False  # a height and a width, rather, or cosines and sines
    return type(node) in (list, tuple, deque) or (type(node) is dict and list(node) == list(range(len(node))) != [])


def _is_number(entry: Any) -> bool:
    return type(entry) is float or (type(entry) is int and abs(entry) < 2**63)


def _first_places(entries: list[Any]) -> list[int]:
    """For each entry the place of the first that equals it, so that examples of one name are known."""
    firsts: dict[Any, int] = {}
    return [
        firsts.setdefault((type(entry), entry), place) if isinstance(entry, str | bytes | int) else place
        for place, entry in enumerate(entries)
    ]


def _size(entry: Any) -> int:
    """How much an entry holds, by which a model pads it; -1 for nothing."""
    return (
        sum(
            len(part) if isinstance(part, str | bytes) else part.numel() if isinstance(part, Tensor) else 1
            for part in _parts(entry)
        )
        or -1
    )


def _parts(tree: Any) -> Iterator[Any]:
    """What stands in lists and dicts, but None."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for part in tree:
            yield from _parts(part)
    elif tree is not None:
        yield tree


def _of_whole_batch(entries: Any, n: int) -> bool:
    """Whether every tensor in them has rows of all examples, so that they are layers, say, and not the examples'."""
    tensors = [part for part in _parts(entries) if isinstance(part, Tensor)]
    return bool(tensors) and all(tensor.dim() and len(tensor) == n for tensor in tensors)


def has_lists(tree: Any) -> bool:
    """Whether a call has lists that were made tensors."""
    return any(
        isinstance(node, EntryList | NumberList)
        for node in pytree.tree_leaves(tree, is_leaf=lambda node: isinstance(node, EntryList))
    )


def _of_another_length(tree: Any, n: int, call: Set[int]) -> set[str]:
    """Names of the lists in a call, taken apart, that have not ``n`` entries."""

    def is_other(node: Any) -> bool:
        return id(node) not in call and _is_list(node) and len(node) != n

    return {
        pytree.keystr(path) for path, node in pytree.tree_flatten_with_path(tree, is_leaf=is_other)[0] if is_other(node)
    }


def other_lists(tree: Any, n: int, name: str = "") -> list[str]:
    """Names of the lists of ``n`` entries that are still there, whose tensors have rows of all examples themselves."""
    if isinstance(tree, list) and len(tree) == n:
        return [name]
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return [found for key, part in inner for found in other_lists(part, n, f"{name}[{key!r}]")]


def as_lists(tree: Any) -> Any:
    """The call as a model takes it."""

    def one(node: Any) -> Any:
        if isinstance(node, EntryList):
            return node.chosen()
        return node.tolist() if isinstance(node, NumberList) else node

    return put_together(pytree.tree_map(one, tree, is_leaf=lambda node: isinstance(node, EntryList)))
