"""Cyclic Poisson sampling: examples are split into b groups, and step t draws from group t mod b alone (BandMF).

Two turns of an example are then b steps apart at least, as correlated noise wants
(:mod:`lora_dp.privacy.correlated_noise`). Within its group every example is drawn by a coin of its own, whose rate is b
times that of a plain run: batches are as large, and sampling amplifies still (Choquette-Choo et al. 2023, arXiv
2306.08153, algorithm 2).

Which example is in which group is drawn once, at random and not by what it holds. The groups need not be secret; the
coins must be.
"""

from collections.abc import Sequence

from torch import Tensor

from lora_dp.privacy.sampling import PoissonSampler, UniformSource


def split_into_groups(size: int, count: int, source: UniformSource) -> list[Tensor]:
    """``count`` groups of the indices below ``size``, drawn at random: (about size / count,) int64 each, ascending.

    >>> import torch
    >>> from lora_dp.privacy.randomness import SeededSource
    >>> groups = split_into_groups(10, 3, SeededSource(0))
    >>> [len(group) for group in groups], sorted(torch.cat(groups).tolist()) == list(range(10))
    ([4, 3, 3], True)
    """
    order = source.uniform(size).argsort()
    return [order[place::count].sort().values for place in range(count)]


class CyclicSampler(PoissonSampler):
    """Batches of indices, each of one group; a batch may be empty.

    Args:
        groups: of indices; see :func:`split_into_groups`.
        sample_rate: probability of each example of a group whose turn it is, in (0, 1].
        steps: batches in one iteration.
        source: of uniform draws.
        first: number of the first step, which says whose turn it is.

    >>> import torch
    >>> from lora_dp.privacy.randomness import SeededSource
    >>> groups = [torch.tensor([0, 2]), torch.tensor([1, 3])]
    >>> list(CyclicSampler(groups, 1.0, 3, SeededSource(0), first=1))
    [[1, 3], [0, 2], [1, 3]]
    """

    def __init__(self, groups: Sequence[Tensor], sample_rate: float, steps: int, source: UniformSource, first: int):
        super().__init__(sum(map(len, groups)), sample_rate, steps, source)
        self.groups, self._step = groups, first

    def draw(self) -> list[int]:
        """The indices of the next step's batch, ascending."""
        members = self.groups[self._step % len(self.groups)]
        self._step += 1
        drawn: list[int] = members[self.source.uniform(len(members)) < self.sample_rate].tolist()
        return drawn
