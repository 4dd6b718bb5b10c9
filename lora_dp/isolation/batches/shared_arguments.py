"""What of a model's arguments all examples of a batch share: numbers, settings, tables, and which arguments are given.

It is the same in every batch, or it may follow what the batch holds, and then each example meets the others by it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from lora_dp.errors import IsolationError
from lora_dp.isolation.batches.tables import Table

# In the place of a keyword argument that a call is not given.
ABSENT = object()
# In the place of one with rows of the examples, which are not kept.
_ROWS = object()


class Keyword(str):
    """The name of a keyword argument as a whole, rather than of a part of one."""

    __slots__ = ()


def shared_in(tree: Any, n: int) -> dict[str, Any]:
    """By name, what has no entry for each of ``n`` examples, and no rows of all of them."""
    return {
        pytree.keystr(path): leaf.tensor if isinstance(leaf, Table) else leaf
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]
        if not _is_rows(leaf, n)
    }


def _is_rows(leaf: Any, n: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and (leaf.shape[0] != 1 or n == 1)


def with_shared(call: Any, values: Mapping[str, Any]) -> Any:
    """The same call (args, kwargs, …) with these in place of its own, by name; or with a :class:`Keyword` more, or
    without one that is to be ``ABSENT``."""

    def one(path: Any, leaf: Any) -> Any:
        value = values.get(pytree.keystr(path), leaf)
        own = leaf.tensor if isinstance(leaf, Table) else leaf
        if all(isinstance(each, Tensor) and each.is_floating_point() for each in (value, own)):
            value = value.to(own.dtype)  # trials may be in another precision
        return Table(value, leaf.free) if isinstance(leaf, Table) and isinstance(value, Tensor) else value

    args, kwargs, *rest = pytree.tree_map_with_path(one, call)
    kwargs.update({name: value for name, value in values.items() if isinstance(name, Keyword)})
    return args, {name: value for name, value in kwargs.items() if value is not ABSENT}, *rest


class SharedArguments:
    """Remembers what was shared in the first batch that held it, by name."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._given: dict[str, Any] | None = None
        self._keywords: set[str] = set()

    def changed(self, call: Any, n: int) -> dict[str, Any]:
        """What this batch of ``n`` examples shares that was another in an earlier one: as it was there.

        Raises:
            IsolationError: an argument with rows of the examples is given in some batches of several and not in others.
        """
        found = {}
        for name, value in shared_in(call, n).items():
            before = self._values.setdefault(name, _kept(value))
            if not _same(before, value):
                found[name] = before
        if n < 2:
            return found
        given = {
            name: _ROWS if any(_is_rows(leaf, n) for leaf in pytree.tree_leaves(value)) else value
            for name, value in _given(call[1], "[1]")
        }
        if self._given is None:
            self._given, self._keywords = given, set(call[1])
        for name in sorted(given.keys() ^ self._given.keys()):
            earlier = self._given.get(name, ABSENT)
            if earlier is _ROWS or given.get(name) is _ROWS:
                raise IsolationError(
                    f"The argument {name} is given in some batches and not in others, so that what one example has "
                    "decides for all how the model computes: give it in every batch, with a value of its own (zeros, "
                    "say) for examples that have none."
                )
            found |= {Keyword(key): earlier for key in call[1].keys() | self._keywords if name == f"[1][{key!r}]"}
        return found


def _given(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What a call has in dicts and objects, at any depth, that is not None, by name."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if value is not None:
                yield f"{name}[{key!r}]", value
                yield from _given(value, f"{name}[{key!r}]")


def _kept(value: Any) -> Any:
    """What stays as it is when the user's changes."""
    if isinstance(value, set | np.ndarray):
        return value.copy()
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        # Of another shape nothing can be put in its place.
        return before.shape != now.shape or _equal(before.as_subclass(Tensor), now.as_subclass(Tensor))
    if type(before) is not type(now):
        return False
    if isinstance(before, np.ndarray):
        return np.array_equal(before, now)
    return before is now or bool(before == now)


def _equal(before: Tensor, now: Tensor) -> bool:
    now = now.to(before.device)
    return before.dtype == now.dtype and bool(((before == now) | ((before != before) & (now != now))).all())
