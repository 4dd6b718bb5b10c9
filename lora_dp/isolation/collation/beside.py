"""What a collate function returns beside the rows of examples: what belongs to all of them, and rows of all in one
dimension."""

import secrets
from typing import Any

import torch
from torch import Tensor

from lora_dp.errors import IsolationError
from lora_dp.isolation.collation.few_examples import INSTEAD, MOST, Few, shapes
from lora_dp.isolation.collation.row_equality import alike, close
from lora_dp.isolation.collation.rows import lengths, lists_around, values

# Examples among which one of a size is looked for.
_LOOK = 16
# An index, and no number that stands for a text, is below.
_INDEX = 2**40


def check_shared(few: Few) -> None:
    """What belongs to no example is compared where one of few examples is another and all shapes stay: what follows
    from the number of examples or from widths is then the same."""
    some, others, collated, base, twice = few.some, few.others, few.collated, few.base, few.twice
    # With all of them twice, widths stay: what then has another shape are rows, be it of some examples alone.
    m, longer, grown = len(some), values(twice), _grown(base, twice)
    shared = {
        name: leaf
        for name, leaf in values(base).items()
        if leaf.is_floating_point()
        and name in longer
        and leaf.shape == longer[name].shape
        and grown.isdisjoint(lists_around(name))
    }
    if not shared:
        return
    again = values(collated(some))  # what changes by itself, such as a time, tells of nobody
    steady = {
        name: close(leaf, again[name])
        for name, leaf in shared.items()
        if name in again and leaf.shape == again[name].shape
    }
    for number in range(max(m, min(len(others), 2 * MOST))):
        place = number % m
        other = others[number % len(others)] if others else some[place - 1]
        changed = collated([*some[:place], other, *some[place + 1 :]])
        if shapes(changed) != shapes(base):
            continue
        found = values(changed)
        if moved := [
            name
            for name, stays in steady.items()
            if name in found
            and found[name].shape == stays.shape
            and bool((stays & ~close(shared[name], found[name])).any())
        ]:
            raise IsolationError(
                f"The collate function joins examples: {moved[0] or 'the batch'}, which has no entry for each example, "
                "changes with those in the batch (a mean, or weights of its classes). Take it from public data, or "
                "leave the collate function to stack and pad."
            )


def check_flattened(few: Few) -> None:
    """Where the rows of all examples lie in one dimension, nobody knows whose is which; but where shapes stay, no value
    may change with one example and with another, too, nor may values of one row.

    Raises:
        IsolationError: they do.
    """
    m, base, longer = len(few.some), values(few.base), values(few.twice)
    grown = _grown(few.base, few.twice)
    rows = {
        name: leaf
        for name, leaf in base.items()
        if name in longer
        and not few.layout.is_by_example(name)
        and (leaf.shape != longer[name].shape or not grown.isdisjoint(lists_around(name)))
    }
    if not rows:
        return
    # What is drawn may be drawn for another example; and what is sorted stands in another's place.
    drawn = few.collated(few.some, secrets.randbits(31))
    rows = {name: leaf for name, leaf in rows.items() if _stands(name, leaf, drawn)}
    if few.others or m > 2:  # of two alone, a mixture is the same both ways; and in their order none takes both places
        turned = few.collated(few.some[1:] + few.some[:1])
        rows = {name: leaf for name, leaf in rows.items() if not _stands(name, leaf, turned)}
    owners = {name: torch.full(leaf.shape, -1) for name, leaf in rows.items()}
    for place in range(m):
        other = _of_one_size(few, place)
        if other is None:
            continue
        changed = few.collated([*few.some[:place], other, *few.some[place + 1 :]])
        if shapes(changed) != shapes(few.base) or _moves_on(few, changed):
            continue
        found = values(changed)
        for name, leaf in rows.items():
            if _is_joined(leaf.cpu(), found[name].cpu(), owners[name], longer[name], place):
                raise IsolationError(
                    f"The collate function joins examples: values in {name or 'the batch'} change with several of "
                    f"those in the batch {INSTEAD}"
                )


def _is_joined(leaf: Tensor, found: Tensor, owners: Tensor, longer: Tensor, place: int) -> bool:
    """Whether another example than this one, which was changed, has what changed; ``owners`` is written to."""
    moved = ~close(leaf, found)
    if not leaf.is_floating_point() and leaf.dtype != torch.bool and bool(moved.any()):
        # Indices go on where the ones before end: those behind move by one number.
        steps = found.long() - leaf.long()
        kinds, counts = steps[moved].unique(return_counts=True)
        step = kinds[counts.argmax()]
        moved &= (steps != step) | (abs(int(step)) > _INDEX)
    if bool((moved & (owners >= 0)).any()):
        return True
    owners[moved] = place
    if leaf.dim() != longer.dim() or leaf.shape == longer.shape or not leaf.numel():
        return False
    axis = next(axis for axis, size in enumerate(leaf.shape) if size != longer.shape[axis])
    by_row = owners.movedim(axis, 0).reshape(leaf.shape[axis], -1)
    least = torch.where(by_row < 0, place, by_row).amin(1)
    return bool((least < by_row.amax(1)).any())


def _of_one_size(few: Few, place: int) -> int | None:
    """An example for another's place that is as long, also where the batch is padded or cut to a length."""
    known = [*few.others[place:], *few.others[:place]] or [few.some[place - 1]]
    size = few.size(few.some[place])
    return next((other for other in known[:_LOOK] if few.size(other) == size), None)


def _stands(name: str, leaf: Tensor, batch: Any) -> bool:
    """Whether a batch has the same of this name."""
    other = values(batch).get(name)
    return other is not None and alike(leaf, other)


def _grown(base: Any, twice: Any) -> set[str]:
    """Lists that have not as many entries in both."""
    longer = lengths(twice)
    return {name for name, length in lengths(base).items() if longer.get(name) != length}


def _moves_on(few: Few, changed: Any) -> bool:
    """Whether numbers or offsets, which go by no example, tell of a length that shapes do not show."""
    found = values(changed)
    for name, leaf in values(few.base).items():
        if leaf.is_floating_point() or leaf.dtype == torch.bool or few.layout.is_by_example(name):
            continue
        told = leaf.dim() == 0 or (_are_offsets(leaf) and _are_offsets(found[name]))
        if told and not alike(leaf, found[name]):
            return True
    return False


def _are_offsets(leaf: Tensor) -> bool:
    return leaf.dim() == 1 and leaf.numel() > 0 and int(leaf[0]) == 0 and bool((leaf[1:] >= leaf[:-1]).all())
