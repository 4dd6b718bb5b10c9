"""Names in a collated batch that come and go with the examples: what is there for all of them as soon as one has it,
and entries that are called by their example.

An argument that a model is given only in some batches switches what becomes of all their examples.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lora_dp.errors import IsolationError
from lora_dp.isolation.collation.few_examples import Few
from lora_dp.isolation.collation.row_equality import alike, padded_alike
from lora_dp.isolation.collation.rows import Layout, layout_of, lengths, lists_around, values

# What is drawn to be there, or not, is so under one of these seeds.
_SEEDS = 4
_TRIED = 16


def arguments(batch: Any) -> frozenset[Any]:
    """What a model is given of a batch: the keys of a mapping or the places of a tuple that have something."""
    entries = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, tuple) else ()
    return frozenset(name for name, entry in entries if entry is not None)


def check_names(few: Few) -> None:
    """Compare what batches of one example each, and of all these, call by name.

    Raises:
        IsolationError: a name that goes by example is there for some examples alone, or an example's own entry changes
            with the others.
    """
    # Unusual ones first: one of them may be the only one that has something.
    found = {index: few.collated([index] * 2) for index in [*few.others, *few.some][:_TRIED]}
    names = {index: _names(batch) for index, batch in found.items()}
    owners = {name: [index for index in names if name in names[index]] for each in names.values() for name in each}
    some = {
        name: (having[0], next(index for index in names if name not in names[index]))
        for name, having in owners.items()
        if len(having) < len(names)
    }
    joined = _Joined(few.collated)
    for name, (one, other) in some.items():
        if joined.says(name, one, other):
            raise IsolationError(
                f"The collate function joins examples: {name}, which has rows of all examples, is there with some "
                "examples alone. Return it for every batch, with zeros for an example that has none."
            )
    _check_own(few.collated, {name: owners[name][0] for name in some if len(owners[name]) == 1}, found)


class _Joined:
    """Whether a name goes by example in batches of two examples, by which of them has it alone."""

    def __init__(self, collated: Callable[..., Any]):
        self._collated = collated
        self._layouts: dict[tuple[int, ...], Layout] = {}

    def says(self, name: str, one: int, other: int) -> bool:
        if not self._is_by_example(name, [one, one]) or not self._is_by_example(name, [one, one, one]):
            return False
        # Rows of those alone that have it are of another number in one of these; drawn, it is there or not by chance.
        mixed = [[one, other, other], [one, one, other]]
        return (
            all(self._is_by_example(name, some) for some in mixed)
            or not any(name in _names(self._collated(some)) for some in mixed)
        ) and all(
            name in _names(self._collated([one] * 2, seed)) and name not in _names(self._collated([other] * 2, seed))
            for seed in range(_SEEDS)
        )

    def _is_by_example(self, name: str, some: list[int]) -> bool:
        key = tuple(some)
        if key not in self._layouts:
            self._layouts[key] = layout_of(self._collated(some), self._collated(some * 2), len(some))
        layout = self._layouts[key]
        # What an entry holds beside others is its example's own.
        return name in {*layout.axes, *layout.lists} and layout.lists.isdisjoint(lists_around(name))


def _names(batch: Any) -> set[str]:
    return {*values(batch, alone=True), *lengths(batch)}


def _check_own(collated: Callable[..., Any], own: dict[str, int], found: dict[int, Any]) -> None:
    """What is called by an example, such as by its number, is the same beside the others."""
    together = values(collated(list(found)), alone=True) if own else {}
    for name in own.keys() & together.keys():
        index = own[name]
        left, entries = values(found[index], alone=True)[name], lengths(found[index])

        def has_it(batch: Any, name: str = name, left: Tensor = left, entries: dict[str, int] = entries) -> bool:
            right, lists = values(batch, alone=True).get(name), lengths(batch)
            return (
                right is not None
                and alike(left, right)
                and all(lists.get(around) == entries[around] for around in lists_around(name))
            )

        # Rows of all who have it are more of two; what is drawn is other under another seed.
        again = [collated([index] * 4), *(collated([index] * 2, seed) for seed in range(_SEEDS))]
        if all(map(has_it, again)) and not padded_alike(left, together[name]):
            raise IsolationError(
                f"The collate function joins examples: {name}, which one example alone has, changes with the others in "
                "its batch. Leave the collate function to stack and pad."
            )
