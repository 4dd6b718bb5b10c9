"""Tensors among a model's arguments that belong to no example: positions, a causal mask, embeddings of the classes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lora_dp.isolation.batches.lists import as_lists


class Table:
    """A tensor among the arguments that belongs to no example; as no tensor, it is left as it is where examples are
    taken, replaced or doubled.

    Attributes:
        tensor: what the model is given.
        free: its dimensions that follow no width of the examples.
    """

    def __init__(self, tensor: Tensor, free: frozenset[int]):
        self.tensor, self.free = tensor, free


def set_apart(tree: Any, tables: Mapping[str, frozenset[int]]) -> Any:
    """The same call with those named as :class:`Table`."""

    def one(path: Any, leaf: Any) -> Any:
        free = tables.get(pytree.keystr(path))
        return leaf if free is None or not isinstance(leaf, Tensor) else Table(leaf, free)

    return pytree.tree_map_with_path(one, tree) if tables else tree


def put_back(tree: Any) -> Any:
    """The call as a model takes it."""
    return as_lists(pytree.tree_map(lambda leaf: leaf.tensor if isinstance(leaf, Table) else leaf, tree))
