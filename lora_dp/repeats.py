"""Data sets that hold one example twice, as far as torch's own wrappers tell."""

from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

# More examples than a data set has.
_MOST = 2**40


def first_repeated(dataset: Any) -> int | None:
    """The least index under which an example comes that has come before; None where there is none.

    A Subset with an index twice, and a ConcatDataset of one data set twice, as by oversampling. What a data set of
    one's own, or another library's, holds twice is not seen.
    """
    if not isinstance(dataset, Subset | ConcatDataset):
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
    return known.setdefault(id(dataset), len(known)) * _MOST + np.arange(len(dataset), dtype=np.int64)
