"""Lists of numbers among a model's arguments, one for each example, such as the lengths of texts."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class NumberList(Tensor):
    """A list (N,) of a model's arguments, as a tensor int64, or float64 if it holds a float."""


def as_tensors(tree: Any, n: int) -> Any:
    """The same call with its lists of ``n`` numbers as :class:`NumberList`, so that they are taken apart by example."""
    def is_list(node: Any) -> bool:
        return isinstance(node, list) and len(node) == n > 0 and all(
            type(entry) is float or (type(entry) is int and abs(entry) < 2**63) for entry in node)

    def one(node: Any) -> Any:
        if not is_list(node):
            return node
        whole = all(type(entry) is int for entry in node)
        return torch.tensor(node, dtype=torch.int64 if whole else torch.float64).as_subclass(NumberList)

    return pytree.tree_map(one, tree, is_leaf=is_list)


def as_lists(tree: Any) -> Any:
    """The call as a model takes it."""
    return pytree.tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, NumberList) else leaf, tree)
