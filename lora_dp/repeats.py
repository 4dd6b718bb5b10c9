"""Data sets that hold one example twice, as far as wrappers and lists tell."""

from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

# Of which Python may keep one object for equal ones.
_EQUAL = (int, float, str, bytes)
# More examples than a data set has.
_MOST = 2**40


def first_repeated(dataset: Any) -> int | None:
    """The least index under which an example comes that has come before; None where there is none.

    A Subset with an index twice, a ConcatDataset of one data set twice, as by oversampling, a list that holds an object
    twice, and rows that ``datasets`` selects twice. What a data set of one's own gives twice is not seen.
    """
    if not isinstance(dataset, Subset | ConcatDataset | list | tuple) and _selected(dataset) is None:
        return None
    try:
        items = _items(dataset, None, {})
    except (TypeError, ValueError, IndexError):  # keys that are no numbers, or no length
        return None
    _, first = np.unique(items, return_index=True)
    repeated = np.setdiff1d(np.arange(len(items)), first)
    return int(repeated[0]) if len(repeated) else None


def _items(dataset: Any, chosen: np.ndarray | None, known: dict[int, int]) -> np.ndarray:
    """What ``chosen`` indices of a data set, or all, stand for: the data set that has it, by number, and its index
    there."""
    if isinstance(dataset, Subset):
        indices = np.asarray(dataset.indices, np.int64)
        return _items(dataset.dataset, indices if chosen is None else indices[chosen], known)
    if chosen is None:
        chosen = np.arange(len(dataset), dtype=np.int64)
    if (chosen < 0).any():
        chosen = chosen % len(dataset)
    if isinstance(dataset, ConcatDataset):
        found, ends = np.empty_like(chosen), np.asarray(dataset.cumulative_sizes)
        places = np.searchsorted(ends, chosen, side="right")
        for place, part in enumerate(dataset.datasets):
            here = places == place
            found[here] = _items(part, chosen[here] - (ends[place - 1] if place else 0), known)
        return found
    own = known.setdefault(id(dataset), len(known)) * _MOST
    if isinstance(dataset, list | tuple) and not any(isinstance(item, _EQUAL) for item in dataset):
        place_of = {id(item): place for place, item in enumerate(dataset)}
        return own + np.array([place_of[id(dataset[place])] for place in chosen], np.int64)
    selected = _selected(dataset)
    return own + (chosen if selected is None else selected[chosen])


def _selected(dataset: Any) -> np.ndarray | None:
    """Rows that a data set of ``datasets`` takes of its table, where these are not all in order."""
    indices: Any = getattr(dataset, "_indices", None)
    return indices.column(0).to_numpy().astype(np.int64) if hasattr(indices, "column") else None
