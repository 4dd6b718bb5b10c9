"""Data sets that hold one example twice, as far as torch's own wrappers tell."""

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
    _, first = np.unique(items := _items(dataset, {}), return_index=True)
    repeated = np.setdiff1d(np.arange(len(items)), first)
    return int(repeated[0]) if len(repeated) else None


def _items(dataset: Any, known: dict[int, int]) -> np.ndarray:
    """What each index of a data set stands for: the data set that has it, by number, and its index there."""
    if isinstance(dataset, Subset):
        inner = _items(dataset.dataset, known)
        return inner[np.asarray(dataset.indices, np.int64)]
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([_items(part, known) for part in dataset.datasets])
    own = known.setdefault(id(dataset), len(known)) * _MOST
    if isinstance(dataset, list | tuple) and not any(isinstance(item, _EQUAL) for item in dataset):
        places = {id(item): place for place, item in reversed(list(enumerate(dataset)))}
        return own + np.array([places[id(item)] for item in dataset], np.int64)
    selected = _selected(dataset)
    return own + (np.arange(len(dataset), dtype=np.int64) if selected is None else selected)


def _selected(dataset: Any) -> np.ndarray | None:
    """Rows that a data set of ``datasets`` takes of its table, where these are not all in order."""
    indices: Any = getattr(dataset, "_indices", None)
    return indices.column(0).to_numpy().astype(np.int64) if hasattr(indices, "column") else None
