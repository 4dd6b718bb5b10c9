"""Poisson sampling: each example joins each step's batch independently with the sample rate.

It is what the accounting assumes (amplification by sampling; Mironov, Talwar and Zhang 2019, arXiv 1908.10530).
A shuffled pass over the data is not that.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler


class UniformSource(Protocol):
    """Where uniform draws come from (``lora_dp.privacy.randomness``)."""

    def uniform(self, n: int) -> Tensor:
        """``n`` independent values in [0, 1), float64."""
        ...


class PoissonSampler(Sampler[list[int]]):
    """Batches of indices; a batch may be empty.

    Args:
        size: number of examples.
        sample_rate: probability of each example, in (0, 1].
        steps: batches in one iteration.
        source: of uniform draws. Amplification holds only while the draws stay secret.
    """

    def __init__(self, size: int, sample_rate: float, steps: int, source: UniformSource):
        self.size, self.sample_rate, self.steps, self.source = size, sample_rate, steps, source

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield self.draw()

    def draw(self) -> list[int]:
        """The indices of one batch, ascending."""
        return torch.nonzero(self.source.uniform(self.size) < self.sample_rate).flatten().tolist()
