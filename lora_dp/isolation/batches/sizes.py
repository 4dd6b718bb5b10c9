"""What the sizes of a model's arguments tell from batch to batch: which tensors are tables that belong to no example,
what is padded to another width, whether the number of examples is another.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree


class Seen(NamedTuple):
    """What is known of the arguments of one call.

    Attributes:
        tables: name of each argument that is a table, and which of its dimensions follow no width of the examples.
        varied: name and dimension of what examples hold, where it has been of several sizes.
        number: whether there have been several numbers of examples.
        lists: names of the lists that were of another length than the batch, and hold no entry for each example.
        masks: names of those that have shown padding in a batch that was tried.
        sideways: name of each tensor in which another dimension than the first, which comes with it, was as long as
            every batch so far, of several numbers of examples.
    """

    tables: Mapping[str, frozenset[int]]
    varied: frozenset[tuple[str, int]]
    number: bool
    lists: set[str]
    masks: set[str]
    sideways: Mapping[str, int]


class Sizes:
    """Remembers them by the names of the arguments.

    A tensor whose first dimension was once another than the number of examples has no entry for each of them. It is a
    *table* if that dimension stays while the number changes, or follows a width of the examples: positions (T,), a
    causal mask (T, T), embeddings of the classes (K, d). All else that has no entry for each example may hold rows of
    all examples, such as the patches of their images.

    Attributes:
        lists: names of the lists that were once of another length than the batch.
        masks: names of those that have shown padding in a batch that was tried.
    """

    def __init__(self) -> None:
        self.lists: set[str] = set()
        self.masks: set[str] = set()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._firsts: dict[str, set[int]] = {}
        self._beside: dict[str, set[int]] = {}
        self._apart: set[str] = set()
        self._free: dict[str, set[int]] = {}
        self._rows: set[str] = set()
        self._varied: set[tuple[str, int]] = set()
        self._numbers: set[int] = set()
        # By the name of a tensor, which of its other dimensions have been as long as each batch, and of which numbers.
        self._follow: dict[str, tuple[set[int], set[int]]] = {}

    def look(self, call: Any, n: int) -> Seen:
        """Take up the sizes of a call with ``n`` examples, which may be none, and say what is known by now."""
        shapes = {
            pytree.keystr(path): tuple(leaf.shape)
            for path, leaf in pytree.tree_flatten_with_path(call)[0]
            if isinstance(leaf, Tensor) and leaf.dim()
        }
        tables: dict[str, frozenset[int]] = {}
        if n:
            self._numbers.add(n)
            for name, shape in shapes.items():
                widths = {size for other, its in shapes.items() if other != name and its[0] == n for size in its[1:]}
                if self._is_table(name, shape, n, widths):
                    free = self._free.setdefault(name, set())
                    free.update(place for place, size in enumerate(shape) if size not in widths)
                    tables[name] = frozenset(free)
                elif shape[0] == n:
                    self._compare(name, shape)
        sideways = {
            name: place
            for name, shape in shapes.items()
            if n and shape[0] != n
            for place in self._following(name, shape, n)
        }
        return Seen(tables, frozenset(self._varied), len(self._numbers) > 1, self.lists, self.masks, sideways)

    def _following(self, name: str, shape: tuple[int, ...], n: int) -> set[int]:
        same = {place for place, size in enumerate(shape) if size == n}
        places, numbers = self._follow.get(name, (same, set()))
        self._follow[name] = places & same, numbers | {n}
        return places & same if len(numbers | {n}) > 1 else set()

    def _is_table(self, name: str, shape: tuple[int, ...], n: int, widths: set[int]) -> bool:
        first = shape[0]
        if first == 1:  # for all examples, or of the only one
            return False
        firsts, numbers = self._firsts.setdefault(name, set()), self._beside.setdefault(name, set())
        if first != n:
            self._apart.add(name)
        stays = firsts == {first} and bool(numbers - {n})
        if first not in {n} | widths and firsts - {first}:
            self._rows.add(name)
        firsts.add(first)
        numbers.add(n)
        return name not in self._rows and name in self._apart and (stays or first in widths)

    def _compare(self, name: str, shape: tuple[int, ...]) -> None:
        before = self._shapes.setdefault(name, shape)
        if len(before) == len(shape):
            self._varied.update((name, place) for place in range(1, len(shape)) if before[place] != shape[place])
