"""Where a Gaussian filter runs along a matrix, and how far it reaches: one rule for kernels, native code and torch.

The filter is :class:`lora_dp.privacy.filtering.GaussianFilter` (LA-LoRA, arXiv 2602.19926). Needs no Triton.
"""

import math
from collections.abc import Sequence


def filter_reach(strength: float) -> int:
    """How many entries to either side a Gaussian of this standard deviation, in entries, reaches (0: no filter)."""
    return math.ceil(4 * strength)


def filtered_dimension(shape: Sequence[int]) -> int:
    """The longer dimension of a matrix, 0 or 1, the last of equal ones: a filter runs along it."""
    rows, columns = shape
    return int(columns >= rows)


def filtered_places(shape: Sequence[int]) -> tuple[int, int]:
    """Stride and length of that dimension, where the matrix is contiguous."""
    rows, columns = shape
    return (1, columns) if filtered_dimension(shape) else (columns, rows)
