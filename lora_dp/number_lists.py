"""Lists among a model's arguments with an entry for each example: of numbers, such as lengths of texts, or others."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_dp.opened import put_together, take_apart


class NumberList(Tensor):
    """A list (N,) of a model's arguments, as a tensor int64, or float64 if it holds a float."""


def as_tensors(tree: Any, n: int) -> Any:
    """The same call, taken apart, with its lists of ``n`` numbers as :class:`NumberList`, which follow the examples."""
    def is_list(node: Any) -> bool:
        return isinstance(node, list) and len(node) == n > 0 and all(
            type(entry) is float or (type(entry) is int and abs(entry) < 2**63) for entry in node)

    def one(node: Any) -> Any:
        if not is_list(node):
            return node
        whole = all(type(entry) is int for entry in node)
        return torch.tensor(node, dtype=torch.int64 if whole else torch.float64).as_subclass(NumberList)

    return pytree.tree_map(one, take_apart(tree), is_leaf=is_list)


def has_lists(tree: Any) -> bool:
    """Whether a call has lists of numbers that were made tensors."""
    return any(isinstance(leaf, NumberList) for leaf in pytree.tree_leaves(tree))


def other_lists(tree: Any, n: int, name: str = "") -> list[str]:
    """Names of the lists of ``n`` entries that are no numbers, such as the boxes of each image."""
    if isinstance(tree, list) and len(tree) == n:
        return [name]
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return [found for key, part in inner for found in other_lists(part, n, f"{name}[{key!r}]")]


def as_lists(tree: Any) -> Any:
    """The call as a model takes it."""
    return put_together(pytree.tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, NumberList) else leaf, tree))
