"""Per-example gradients of a lookup table, by the rows that each example looked up: never (N, rows, d)."""

from typing import NamedTuple

import torch
from torch import Tensor


class ExampleRows(NamedTuple):
    """The per-example gradients of a table by the rows that each example looked up, added up in float64.

    Terms of one row may cancel: a norm is of these very values only if they are what is clipped and summed.

    Attributes:
        examples: (K,) int64, whose row it is.
        rows: (K,) int64, which row of the table; each pair of example and row comes once.
        values: (K, d) float64.
        n: examples.
        shape: of the table.
    """

    examples: Tensor
    rows: Tensor
    values: Tensor
    n: int
    shape: torch.Size

    @classmethod
    def of(cls, ids: Tensor, gradient: Tensor, shape: torch.Size) -> "ExampleRows":
        """From ids (N, T) and the gradient (N, T, d), any floating dtype, of what was looked up in a table (·, d)."""
        n = len(ids)
        keys = ids + torch.arange(n, device=ids.device).unsqueeze(1) * shape[0]
        distinct, place = keys.flatten().unique(return_inverse=True)
        values = gradient.new_zeros((len(distinct), shape[1]), dtype=torch.float64)
        values.index_add_(0, place, gradient.double().flatten(0, 1))
        return cls(distinct // shape[0], distinct % shape[0], values, n, shape)

    def norms(self) -> Tensor:
        """‖Gᵢ‖ for every example: (N,), float64."""
        return self.values.new_zeros(self.n).index_add_(0, self.examples, self.values.square().sum(1)).sqrt()

    def weighted_sum(self, coefficients: Tensor) -> Tensor:
        """Σᵢ cᵢ Gᵢ in the table's shape, float64; an example with cᵢ = 0 adds exactly nothing."""
        own = coefficients.double()[self.examples].unsqueeze(1)
        weighted = (self.values * own).masked_fill_(own == 0, 0)
        return self.values.new_zeros(self.shape).index_add_(0, self.rows, weighted)
