"""Data sets that hold one example twice, as far as wrappers and lists, and the data sets of libraries, tell."""

from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

# Of which Python may keep one object for equal ones.
_EQUAL = (int, float, str, bytes)
# More examples than a data set has.
_MOST = 2**40


def first_repeated(dataset: Any) -> int | None:
    """The least index under which an example comes that has come before; None where there is none.

    A Subset with an index twice; a ConcatDataset of one data set twice, as by oversampling, or of two that differ in
    their transforms alone, as by augmentation; a list that holds an object twice; and rows that ``datasets`` selects,
    repeats or concatenates. Copies of an example are not seen, nor what a data set gives under two of its own indices.
    """
    if not isinstance(dataset, Subset | ConcatDataset | list | tuple) and _columns(dataset) is None:
        return None
    try:
        items = _items(dataset, None, _Numbers())
    except (TypeError, ValueError, IndexError):  # keys that are no numbers, or no length
        return None
    ordered = np.sort(items)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return None
    places = np.flatnonzero(np.isin(items, twice))
    _, first = np.unique(items[places], return_index=True)
    return int(np.delete(places, first)[0])


class _Numbers:
    """A number for each data set, and for each piece of a table."""

    def __init__(self) -> None:
        self._datasets: list[Any] = []
        self._pieces: dict[int, int] = {}

    def of(self, dataset: Any) -> int:
        number = next((number for number, other in enumerate(self._datasets) if _alike(dataset, other)), None)
        if number is None:
            number = len(self._datasets)
            self._datasets.append(dataset)
        return 2 * number * _MOST

    def of_piece(self, address: int) -> int:
        return (2 * self._pieces.setdefault(address, len(self._pieces)) + 1) * _MOST


def _items(dataset: Any, chosen: np.ndarray | None, numbers: _Numbers) -> np.ndarray:
    """What ``chosen`` indices of a data set, or all, stand for: the data set that has it, by number, and its index
    there."""
    if isinstance(dataset, Subset):
        indices = np.asarray(dataset.indices, np.int64)
        return _items(dataset.dataset, indices if chosen is None else indices[chosen], numbers)
    if chosen is None:
        chosen = np.arange(len(dataset), dtype=np.int64)
    if (chosen < 0).any():
        chosen = chosen % len(dataset)
    if isinstance(dataset, ConcatDataset):
        found, ends = np.empty_like(chosen), np.asarray(dataset.cumulative_sizes)
        places = np.searchsorted(ends, chosen, side="right")
        for place, part in enumerate(dataset.datasets):
            here = places == place
            found[here] = _items(part, chosen[here] - (ends[place - 1] if place else 0), numbers)
        return found
    if (columns := _columns(dataset)) is not None:
        rows, selected = _rows(columns[0].chunks, numbers), dataset._indices
        return rows[chosen if selected is None else selected.column(0).to_numpy()[chosen]]
    own = numbers.of(dataset)
    if isinstance(dataset, list | tuple) and not any(isinstance(item, _EQUAL) for item in dataset):
        place_of = {id(item): place for place, item in enumerate(dataset)}
        return own + np.array([place_of[id(dataset[place])] for place in chosen], np.int64)
    return own + chosen


def _columns(dataset: Any) -> list[Any] | None:
    """Columns of a data set of ``datasets`` that hold anything; None of another, or if there are none."""
    table: Any = getattr(dataset, "_data", None) if hasattr(dataset, "_indices") else None
    columns = table.columns if hasattr(table, "columns") else []
    return [column for column in columns if str(column.type) != "null"] or None


def _rows(chunks: list[Any], numbers: _Numbers) -> np.ndarray:
    """A number for each row of a column, by where it lies in memory."""
    found = [np.empty(0, np.int64)]
    for chunk in chunks:
        address = next((buffer.address for buffer in chunk.buffers() if buffer is not None), id(chunk))
        found.append(numbers.of_piece(address) + chunk.offset + np.arange(len(chunk), dtype=np.int64))
    return np.concatenate(found)


def _alike(one: Any, other: Any) -> bool:
    """Whether two data sets are one, or hold the same and differ in their transforms alone."""
    if one is other:
        return True
    if type(one) is not type(other) or not getattr(one, "__dict__", None):
        return False
    mine, its = (
        {name: value for name, value in vars(each).items() if "transform" not in name.lower()} for each in (one, other)
    )
    return mine.keys() == its.keys() and all(_equal(value, its[name]) for name, value in mine.items())


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor | np.ndarray):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        # Most differ in their first number.
        return bool((one.reshape(-1)[:1] == other.reshape(-1)[:1]).all() and (one == other).all())
    if hasattr(one, "equals"):  # data frames
        return bool(one.equals(other))
    try:
        return bool(one == other)
    except Exception:  # there are tensors or arrays within, or whatever it says to that
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(_equal(value, other[name]) for name, value in one.items())
        return isinstance(one, list | tuple) and len(one) == len(other) and all(map(_equal, one, other))
