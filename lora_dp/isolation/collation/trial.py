"""Does a loader's batch hold each example by itself? A trial of its collate function.

A few examples of a drawn batch are collated again without the others: their rows must be what they were, but for
padding. Rows are what :mod:`lora_dp.isolation.collation.rows` finds, in tensors, arrays and lists. Mixup, features
normalised over the batch and examples joined in any other way give other rows. What comes beside the rows and has one
shape in every batch, such as a mean, must stay when one example is another; and what has rows may not come and go with
examples. Where the data set or the collate function draws at random, both times the same seed is used, on batches of
one size; then only the first example is compared, before which nothing else is drawn.

What gives other values under one seed draws from a generator of its own, or remembers what it was given before. Both
are refused: one example more moves the others. A generator of its own that the operating system seeds would be
harmless, but cannot be told from one whose seed is public.
"""

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_dp.errors import IsolationError
from lora_dp.isolation.collation.beside import check_flattened, check_shared
from lora_dp.isolation.collation.few_examples import INSTEAD, MOST, a_few, fetched
from lora_dp.isolation.collation.names import check_names
from lora_dp.isolation.collation.own_generators import own_generators, states
from lora_dp.isolation.collation.row_equality import alike, padded_alike
from lora_dp.isolation.collation.rows import Layout, rows_by_example, texts
from lora_dp.isolation.seeding import other_states, seeded, torch_states

# So often the same examples are collated again under one seed: what draws now and then may draw alike once.
_REPEATS = 3
_SEEDS = 8
# One batch in so many is tried although one of its kind was before; nobody can tell which.
_LATER = 1000
_REMEDY = (
    "draw from the default generators of torch, NumPy or Python, or from a generator that is made anew for each "
    "example from its index or from such a draw"
)
_OWN_GENERATOR = (
    "The data set or collate function draws from a generator of its own ({}), so that one example more shifts the "
    f"draws of all others, for everybody to see who knows its seed: {_REMEDY}."
)
_CHANGES = (
    "The same examples are others in {} when they are fetched again under one seed, so the data set or collate "
    f"function draws from a generator of its own or remembers other examples: {_REMEDY}, and return nothing that "
    "changes by itself, such as the time."
)


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
    parts = (
        [list(range(1, n)), list(range(n - 1)), list(range(n))]
        if n <= MOST
        else [list(range(MOST)), sorted({0, n // 3, 2 * n // 3, n - 1})]
    )
    few = a_few(dataset, collate, indices, batch)
    found = [_compare_part(dataset, collate, indices, batch, part, few.layout) for part in parts]
    check_names(few)
    check_shared(few)
    check_flattened(few)
    return any(found)


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
            made = collate(fetched(dataset, chosen))
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
        changing = _others(found, again, m, layout)
        if leaf := [name for name in changing if name not in texts(found, layout)]:
            raise IsolationError(_CHANGES.format(leaf[0] or "the batch"))
        layout = layout._replace(passed=layout.passed | set(changing))  # a time as text, which no model reads
    if not drew:

        def sorts() -> bool:
            few = list(indices[:MOST])
            return _sorts(collated(first, few), collated(first, few[1:] + few[:1]), len(few), layout)

        def numbered(name: str) -> bool:
            whole, own = rows_by_example(batch, n, layout)[name], rows_by_example(found, m, layout)[name]
            return all(alike(left, right) for left, right in zip(own, whole, strict=False)) and all(
                alike(rows_by_example(collated(first, [index] * size), size, layout).get(name), rows)
                for index in some
                for size, rows in ((m, own), (n, whole))
            )

        places = list(zip(part, range(m), strict=True))
        return _compare(batch, found, places, n, m, layout, sorts=sorts, numbered=numbered)
    # At random: the first example in two companies of one size. What a seed mixes it with may be itself, so several.
    others = [index for index in indices if index != some[0]] * MOST
    alone, company = [some[0]] * MOST, [some[0], *others[: MOST - 1]]
    return any(
        [
            _compare(collated(seed, alone), collated(seed, company), [(0, 0)], MOST, MOST, layout, widths_count=False)
            for seed in range(first, first + _SEEDS)
        ]
    )


def _same(left: Any, right: Any, n: int, layout: Layout) -> bool:
    return not _others(left, right, n, layout)


def _others(left: Any, right: Any, n: int, layout: Layout) -> list[str]:
    """Where two batches differ."""
    a, b = rows_by_example(left, n, layout), rows_by_example(right, n, layout)
    names = sorted(a.keys() | b.keys())
    return [name for name in names if name not in a or name not in b or not alike(a[name], b[name])]


def _sorts(batch: Any, rotated: Any, n: int, layout: Layout) -> bool:
    """Whether the order in which examples are given makes no difference: they are put into another, by length say."""
    several = any(not alike(row, rows[0]) for rows in rows_by_example(batch, n, layout).values() for row in rows)
    return several and _same(batch, rotated, n, layout)


def _compare(
    whole: Any,
    part: Any,
    places: list[tuple[int, int]],
    n: int,
    m: int,
    layout: Layout,
    *,
    widths_count: bool = True,
    sorts: Callable[[], bool] = lambda: False,
    numbered: Callable[[str], bool] = lambda name: False,
) -> bool:
    """Whether widths differ; raises where rows do, unless the collate function ``sorts`` and they are elsewhere, or
    only ``numbered`` them: whatever example is in a place has the same there."""
    varies, others, pairs = False, rows_by_example(part, m, layout), []
    for name, left in rows_by_example(whole, n, layout).items():
        right = others.get(name)
        if right is None or (isinstance(left, Tensor) and isinstance(right, Tensor) and left.dim() != right.dim()):
            continue
        if any(_size(left[i]) != _size(right[j]) for i, j in places):
            varies = True
            if not widths_count:
                continue  # masks that were drawn for another width are others
        pairs.append((name, left, right))

    def other(i: int, j: int) -> str | None:
        return next((name or "the batch" for name, left, right in pairs if not padded_alike(left[i], right[j])), None)

    if any(other(i, j) is not None for i, j in places):
        pairs = [(name, left, right) for name, left, right in pairs if not numbered(name)]
    moved = [(where, i, j) for i, j in places if (where := other(i, j)) is not None]
    # A place that has its example already is no other's: else one example could stand in two rows.
    kept = {i for i, _ in places} - {i for _, i, _ in moved}
    free = set(range(n)) - kept if moved and sorts() else set()
    for where, _, j in moved:
        found = next((place for place in sorted(free) if other(place, j) is None), None)
        if found is None:
            raise IsolationError(
                f"The collate function joins examples: an example's rows in {where} change with the others in its "
                f"batch {INSTEAD}"
            )
        free.remove(found)
    return varies


def _size(row: Tensor | None) -> torch.Size | None:
    return None if row is None else row.shape
