"""A few examples of a batch, usual ones, which are collated again alone and with the others, unusual ones first."""

import functools
import random
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_dp.isolation.collation.rows import Layout, layout_of, lengths, rows_by_example, values
from lora_dp.isolation.seeding import seeded

INSTEAD = (
    "(mixup, or a statistic of the batch). Change each example by itself, in the data set, and leave the collate "
    "function to stack and pad."
)
# So many of them.
MOST = 4


class Few(NamedTuple):
    """A few examples of a batch.

    Attributes:
        some, others: their indices, and those of all others.
        collated: makes a batch of indices, under one seed or another.
        size: the shapes of an example, as the data set has it.
        base, twice: the batch of them, and that of each of them twice.
        layout: of both.
    """

    some: list[int]
    others: list[int]
    collated: Callable[..., Any]
    size: Callable[[int], Any]
    base: Any
    twice: Any
    layout: Layout


def a_few(dataset: Any, collate: Callable[[Any], Any], indices: Sequence[int], batch: Any) -> Few:
    """Of a batch that was collated of these indices, at random."""
    n, seed = len(indices), secrets.randbits(31)
    m = min(MOST, n)
    odd = unusual(batch, n)
    places = sorted(random.SystemRandom().sample(range(n), n), key=lambda place: place in odd)
    some, others = [indices[place] for place in places[:m]], [indices[place] for place in places[m:][::-1]]

    def collated(chosen: list[int], seed: int = seed) -> Any:
        with seeded(seed):
            items = fetched(dataset, chosen)
        with seeded(seed):  # however much was drawn for the examples
            return collate(items)

    @functools.cache
    def size(index: int) -> Any:
        with seeded(seed):
            return shapes(fetched(dataset, [index])[0])

    base, twice = collated(some), collated(some * 2)
    return Few(some, others, collated, size, base, twice, layout_of(base, twice, m))


def unusual(batch: Any, n: int) -> set[int]:
    """Examples with the least and the most of anything: one of a rare class, say."""
    layout = Layout(lists=frozenset(name for name, length in lengths(batch).items() if length == n))
    sums = [
        rows.double().reshape(n, -1).sum(1).tolist()
        if isinstance(rows, Tensor)
        else [0.0 if row is None else float(row.double().sum()) for row in rows]
        for rows in rows_by_example(batch, n, layout).values()
        if not isinstance(rows, Tensor) or rows.numel()
    ]
    return {place for each in sums for place in (each.index(min(each)), each.index(max(each)))}


def shapes(batch: Any) -> dict[str, torch.Size]:
    """Of what a batch holds, by name."""
    return {name: leaf.shape for name, leaf in values(batch).items()}


def fetched(dataset: Any, indices: Sequence[int]) -> Any:
    """What a collate function is given."""
    many = getattr(dataset, "__getitems__", None)
    return many(list(indices)) if callable(many) else [dataset[index] for index in indices]
