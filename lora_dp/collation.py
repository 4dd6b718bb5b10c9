"""Does a loader's batch hold each example by itself? A trial of its collate function.

A few examples of a drawn batch are collated again without the others: their rows must be what they were, but for
padding. Rows are what :mod:`lora_dp.collated_rows` finds, in tensors, arrays and lists. Mixup, features normalised over
the batch and examples joined in any other way give other rows. What comes beside the rows and has one shape in every
batch, such as a mean, must stay when one example is another. Where the data set or the collate function draws at
random, both times the same seed is used, on batches of one size; then only the first example is compared, before which
nothing else is drawn.

What gives other values under one seed draws from a generator of its own, or remembers what it was given before. Both
are refused: one example more moves the others. A generator of its own that the operating system seeds would be
harmless, but cannot be told from one whose seed is public.
"""

import random
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_dp.batch_parts import without_nan
from lora_dp.collated_rows import ENTRY, Layout, Rows, by_example, layout_of, leaves, lengths
from lora_dp.loss_graph import IsolationError
from lora_dp.own_generators import own_generators, states
from lora_dp.seeded import other_states, seeded, torch_states

_MOST = 4
# So often the same examples are collated again under one seed: what draws now and then may draw alike once.
_REPEATS = 3
_RELATIVE = 1e-5
_SEEDS = 8
# One batch in so many is tried although one of its kind was before; nobody can tell which.
_LATER = 1000
_REMEDY = (
    "draw from the default generators of torch, NumPy or Python, or from a generator that is made anew for each "
    "example from its index or from such a draw")
_OWN_GENERATOR = (
    "The data set or collate function draws from a generator of its own ({}), so that one example more shifts the "
    f"draws of all others, for everybody to see who knows its seed: {_REMEDY}.")
_CHANGES = (
    "The same examples are others in {} when they are fetched again under one seed, so the data set or collate "
    f"function draws from a generator of its own or remembers other examples: {_REMEDY}, and return nothing that "
    "changes by itself, such as the time.")
_INSTEAD = (
    "(mixup, or a statistic of the batch). Change each example by itself, in the data set, and leave the collate "
    "function to stack and pad.")


def drawn_for_test() -> bool:
    """Whether this batch is tried in secret."""
    return secrets.randbelow(_LATER) == 0


def check_collation(dataset: Any, collate: Callable[[Any], Any], indices: Sequence[int], batch: Any) -> bool:
    """Collate some examples of a batch without the others.

    The random state of torch, NumPy and Python is left as it was.

    Args:
        dataset: map-style.
        collate: of the loader.
        indices: of the batch's examples, in order.
        batch: what the loader made of them.

    Returns:
        Whether the width of the padding depends on the other examples of a batch.

    Raises:
        IsolationError: an example's rows change with the others, or from call to call under one seed; or a number
            that belongs to no example changes with one of them.
    """
    n = len(indices)
    if n < 2:
        return False
    # Several choices: what joins neighbours may leave the company of an example as it was in one of them; and of two
    # examples, both show that one is drawn for the other.
    parts = [list(range(1, n)), list(range(n - 1)), list(range(n))] if n <= _MOST else [
        list(range(_MOST)), sorted({0, n // 3, 2 * n // 3, n - 1})]
    few = _few(dataset, collate, indices, batch)
    found = [_compare_part(dataset, collate, indices, batch, part, few.layout) for part in parts]
    _check_shared(few)
    _check_flattened(few)
    return any(found)


class _Few(NamedTuple):
    """A few examples of a batch.

    Attributes:
        some, others: their indices, and those of all others.
        collated: makes a batch of indices, under one seed or another.
        base, twice: the batch of them, and that of each of them twice.
        layout: of both.
    """

    some: list[int]
    others: list[int]
    collated: Callable[..., Any]
    base: Any
    twice: Any
    layout: Layout


def _few(dataset: Any, collate: Callable[[Any], Any], indices: Sequence[int], batch: Any) -> _Few:
    n, seed = len(indices), secrets.randbits(31)
    m = min(_MOST, n)
    unusual = _unusual(batch, n)
    places = sorted(random.SystemRandom().sample(range(n), n), key=lambda place: place in unusual)
    some, others = [indices[place] for place in places[:m]], [indices[place] for place in places[m:][::-1]]

    def collated(chosen: list[int], seed: int = seed) -> Any:
        with seeded(seed):
            items = _fetched(dataset, chosen)
        with seeded(seed):  # however much was drawn for the examples
            return collate(items)

    base, twice = collated(some), collated(some * 2)
    return _Few(some, others, collated, base, twice, layout_of(base, twice, m))


def _check_shared(few: _Few) -> None:
    """What belongs to no example is compared where one of few examples is another and all shapes stay: what follows
    from the number of examples or from widths is then the same."""
    some, others, collated, base, twice, _ = few
    # With all of them twice, widths stay: what then has another shape are rows, be it of some examples alone.
    m, found, lists, longer = len(some), _numbers(twice), _lists(base), _lists(twice)
    shared = {name: leaf for name, leaf in _numbers(base).items() if name in found
              and leaf.shape == found[name].shape and lists[ENTRY.sub("", name)] == longer[ENTRY.sub("", name)]}
    if not shared:
        return
    again = _numbers(collated(some))  # one that changes by itself, such as a time, tells of nobody
    shared = {name: leaf for name, leaf in shared.items() if name in again and _alike(leaf, again[name])}
    for number in range(max(m, min(len(others), 2 * _MOST))):
        place = number % m
        other = others[number % len(others)] if others else some[place - 1]
        changed = collated([*some[:place], other, *some[place + 1:]])
        if _shapes(changed) != _shapes(base):
            continue
        found = _numbers(changed)
        if moved := [name for name, leaf in shared.items() if name in found
                     and found[name].shape == leaf.shape and not _equal(leaf, found[name])]:
            raise IsolationError(
                f"The collate function joins examples: {moved[0] or 'the batch'}, which has no entry for each example, "
                "changes with those in the batch (a mean, or weights of its classes). Take it from public data, or "
                "leave the collate function to stack and pad.")


def _check_flattened(few: _Few) -> None:
    """Where the rows of all examples lie in one dimension, nobody knows whose is which; but where shapes stay, no value
    may change with one example and with another, too."""
    m, longer, known = len(few.some), _numbers(few.twice), by_example(few.base, len(few.some), few.layout)
    values = {name: leaf for name, leaf in _numbers(few.base).items()
              if name in longer and leaf.shape != longer[name].shape and name not in known}
    if not values:
        return
    # What is drawn may be drawn for another example; and what is sorted stands in another's place.
    drawn, turned = few.collated(few.some, secrets.randbits(31)), few.collated(few.some[1:] + few.some[:1])
    values = {name: leaf for name, leaf in values.items()
              if _stands(name, leaf, drawn) and not _stands(name, leaf, turned)}
    touched = {name: torch.zeros(leaf.shape, dtype=torch.bool) for name, leaf in values.items()}
    for place in range(m):
        other = few.others[place % len(few.others)] if few.others else few.some[place - 1]
        changed = few.collated([*few.some[:place], other, *few.some[place + 1:]])
        if _shapes(changed) != _shapes(few.base):
            continue
        found = _numbers(changed)
        for name, leaf in values.items():
            moved = ~_close(leaf, found[name]).cpu()
            if bool((moved & touched[name]).any()):
                raise IsolationError(
                    f"The collate function joins examples: values in {name or 'the batch'} change with several of "
                    f"those in the batch {_INSTEAD}")
            touched[name] |= moved


def _stands(name: str, leaf: Tensor, batch: Any) -> bool:
    """Whether a batch has the same of this name."""
    other = _numbers(batch).get(name)
    return other is not None and _alike(leaf, other)


def _unusual(batch: Any, n: int) -> set[int]:
    """Examples with the least and the most of anything: one of a rare class, say."""
    layout = Layout(lists=frozenset(name for name, length in lengths(batch).items() if length == n))
    sums = [rows.double().reshape(n, -1).sum(1).tolist() if isinstance(rows, Tensor) else [
                0.0 if row is None else float(row.double().sum()) for row in rows]
            for rows in by_example(batch, n, layout).values() if not isinstance(rows, Tensor) or rows.numel()]
    return {place for each in sums for place in (each.index(min(each)), each.index(max(each)))}


def _lists(batch: Any) -> Counter[str]:
    """How many entries a list has, by what they are called without their numbers."""
    return Counter(ENTRY.sub("", name) for name, _ in leaves(batch))


def _numbers(batch: Any) -> dict[str, Tensor]:
    """What is of floating point in a batch."""
    found = {name: torch.as_tensor(leaf, dtype=torch.float64) if _is_number(leaf) else leaf
             for name, leaf in leaves(batch)}
    return {name: leaf for name, leaf in found.items() if isinstance(leaf, Tensor) and leaf.is_floating_point()}


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, float) or (
        isinstance(leaf, np.ndarray | np.generic) and np.issubdtype(leaf.dtype, np.floating))


def _shapes(batch: Any) -> list[tuple[str, Any]]:
    return [(name, tuple(leaf.shape)) for name, leaf in leaves(batch) if isinstance(leaf, Tensor | np.ndarray)]


def _compare_part(
    dataset: Any, collate: Callable[[Any], Any], indices: Sequence[int], batch: Any, part: list[int], layout: Layout
) -> bool:
    some, n, m = [indices[place] for place in part], len(indices), len(part)
    first = secrets.randbits(31)  # what mixes now and then is found in time if nobody knows the seed

    drew = False

    def collated(seed: int, chosen: list[int]) -> Any:
        nonlocal drew
        with seeded(seed):
            before = torch_states(), other_states()
            made = collate(_fetched(dataset, chosen))
            drew |= before != (torch_states(), other_states())
            return made

    found = collated(first, some)
    generators = own_generators(dataset, collate)
    before = states(generators)
    for _ in range(_REPEATS):
        again = collated(first, some)
        # One that is seeded anew by each example's index ends in one state both times.
        after = states(generators)
        if moved := [name for name in before if after[name] != before[name]]:
            kind = type(generators[moved[0]])
            raise IsolationError(_OWN_GENERATOR.format(f"{moved[0]}, a {kind.__module__}.{kind.__name__}"))
        if (leaf := _first_other(found, again, m, layout)) is not None:
            raise IsolationError(_CHANGES.format(leaf or "the batch"))
    if not drew:
        def sorts() -> bool:
            few = list(indices[:_MOST])
            return _sorts(collated(first, few), collated(first, few[1:] + few[:1]), len(few), layout)

        return _compare(batch, found, list(zip(part, range(m), strict=True)), n, m, layout, sorts=sorts)
    # At random: the first example in two companies of one size. What a seed mixes it with may be itself, so several.
    others = [index for index in indices if index != some[0]] * _MOST
    alone, company = [some[0]] * _MOST, [some[0], *others[: _MOST - 1]]
    return any([
        _compare(collated(seed, alone), collated(seed, company), [(0, 0)], _MOST, _MOST, layout, widths_count=False)
        for seed in range(first, first + _SEEDS)])


def _fetched(dataset: Any, indices: Sequence[int]) -> Any:
    many = getattr(dataset, "__getitems__", None)
    return many(list(indices)) if callable(many) else [dataset[index] for index in indices]


def _same(left: Any, right: Any, n: int, layout: Layout) -> bool:
    return _first_other(left, right, n, layout) is None


def _first_other(left: Any, right: Any, n: int, layout: Layout) -> str | None:
    """Where two batches differ."""
    a, b = by_example(left, n, layout), by_example(right, n, layout)
    names = sorted(a.keys() | b.keys())
    return next((name for name in names if name not in a or name not in b or not _alike(a[name], b[name])), None)


def _alike(left: Rows | None, right: Rows | None) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and _equal(left, right)
    if isinstance(left, list) and isinstance(right, list):
        return all(map(_alike, left, right))
    return left is right  # an example has nothing of this name in both


def _equal(left: Tensor, right: Tensor) -> bool:
    right = right.to(left.device)
    if not left.is_floating_point():
        return torch.equal(left, right)
    return bool(_close(left, right).all())


def _close(left: Tensor, right: Tensor) -> Tensor:
    return torch.isclose(left, right.to(left), rtol=_RELATIVE, atol=0, equal_nan=True)


def _sorts(batch: Any, rotated: Any, n: int, layout: Layout) -> bool:
    """Whether the order in which examples are given makes no difference: they are put into another, by length say."""
    several = any(not _alike(row, rows[0]) for rows in by_example(batch, n, layout).values() for row in rows)
    return several and _same(batch, rotated, n, layout)


def _compare(
    whole: Any, part: Any, places: list[tuple[int, int]], n: int, m: int, layout: Layout, *,
    widths_count: bool = True, sorts: Callable[[], bool] = lambda: False,
) -> bool:
    """Whether widths differ; raises where rows do, unless the collate function ``sorts`` and they are elsewhere."""
    varies, others, pairs = False, by_example(part, m, layout), []
    for name, left in by_example(whole, n, layout).items():
        right = others.get(name)
        if right is None or (isinstance(left, Tensor) and isinstance(right, Tensor) and left.dim() != right.dim()):
            continue
        if any(_size(left[i]) != _size(right[j]) for i, j in places):
            varies = True
            if not widths_count:
                continue  # masks that were drawn for another width are others
        pairs.append((name, left, right))

    def other(i: int, j: int) -> str | None:
        return next((name or "the batch" for name, left, right in pairs if not _padded_alike(left[i], right[j])), None)

    moved = [(where, i, j) for i, j in places if (where := other(i, j)) is not None]
    # A place that has its example already is no other's: else one example could stand in two rows.
    kept = {i for i, _ in places} - {i for _, i, _ in moved}
    free = set(range(n)) - kept if moved and sorts() else set()
    for where, _, j in moved:
        found = next((place for place in sorted(free) if other(place, j) is None), None)
        if found is None:
            raise IsolationError(
                f"The collate function joins examples: an example's rows in {where} change with the others in its "
                f"batch {_INSTEAD}")
        free.remove(found)
    return varies


def _size(row: Tensor | None) -> torch.Size | None:
    return None if row is None else row.shape


def _padded_alike(left: Tensor | None, right: Tensor | None) -> bool:
    """Equal where both have values, at the start or the end, and one value in all that one has more."""
    if left is None or right is None or left.shape == right.shape or left.dim() != right.dim():
        return _alike(left, right)
    smaller = [min(a, b) for a, b in zip(left.shape, right.shape, strict=True)]
    for at_end in (False, True):
        cut = tuple(slice(-size, None) if at_end and size else slice(0, size) for size in smaller)
        if _equal(left[cut], right[cut]) and all(_is_padding(tensor, cut) for tensor in (left, right)):
            return True
    return False


def _is_padding(tensor: Tensor, cut: tuple[slice, ...]) -> bool:
    rest = torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device)
    rest[cut] = False
    values = without_nan(tensor[rest])
    return not values.numel() or bool((values == values[0]).all())
