"""Rows of all examples in one dimension: no value may change with several of the examples."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_dp import IsolationError
from tests.isolation.collation.row_functions import check, data, mixup, normalised, texts

# How the rows of all are returned in one dimension.
FLATTENED: dict[str, Callable[[Tensor], Any]] = {
    "of tokens": lambda x: x.flatten(0, 1),
    "of numbers": lambda x: x.flatten().numpy(),
    "in a dict": lambda x: {"x": x.flatten(0, 1), "y": torch.zeros(len(x))},
    "and last": lambda x: x.flatten(0, 1).t(),
}


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("dress", FLATTENED)
def test_rows_of_all_in_one_dimension_are_told_by_what_changes(dress, n):
    for join in (lambda x: 0.7 * x + 0.3 * x.roll(1, 0), normalised, mixup):
        with pytest.raises(IsolationError, match="joins examples: values in .* change with several of those in the"):
            check(data(n), lambda items, join=join: FLATTENED[dress](join(torch.stack(items))))
    for own in (
        lambda x: x,
        lambda x: x + torch.rand(x.shape),
        lambda x: x * torch.rand(len(x), 1, 1),
        lambda x: x[x[:, 0, 0].argsort()],
        lambda x: x / len(x),
        lambda x: torch.where(x > 1, x, torch.nan),
    ):
        assert check(data(n), lambda items, own=own: FLATTENED[dress](own(torch.stack(items)))) is False


@pytest.mark.parametrize("n", [2, 3, 8, 14])
def test_texts_of_several_lengths_in_one_dimension_are_taken(n):
    def chained(items: list[Tensor]) -> dict[str, Tensor]:  # one part is named by the number of examples
        ends = torch.tensor([0, *map(len, items)]).cumsum(0)
        return {
            "x": torch.cat(items).double().sqrt(),
            "ends": ends,
            "at": ends.double(),
            "first": torch.stack([item[0] for item in items]),
            f"of {len(items)}": torch.ones(3 * len(items)),
        }

    assert check(texts(n), chained) is False


def whole(x: Tensor) -> Tensor:
    return (x.abs() * 1000).long()


def named(x: Tensor) -> list[str]:
    return [f"{float(row.sum()):.3f}" for row in x]


# The same of whole numbers and texts, and in chunks.
PIECES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "whole numbers": (lambda x: whole(x).flatten(), lambda x: (whole(x) + whole(x).roll(1, 0)).flatten()),
    "bytes": (lambda x: whole(x).byte().flatten(), lambda x: (whole(x) + whole(x).roll(1, 0)).byte().flatten()),
    "flags": (lambda x: (x > 1).flatten(), lambda x: ((x > 1) ^ (x > 1).roll(1, 0)).flatten()),
    "two views, cut out": (
        lambda x: torch.cat([x, x.flip(1)]),
        lambda x: torch.cat([torch.cat([x[..., :3], x.roll(1, 0)[..., 3:]], 2), x]),
    ),
    "two texts each": (
        lambda x: named(x) + named(-x),
        lambda x: [left + right for left, right in zip(named(x), named(x.roll(1, 0)), strict=True)] + named(-x),
    ),
    "a text for all": (lambda x: [*named(x), "end"], lambda x: [*named(x), "|".join(named(x))]),
    "chunks": (lambda x: list(x.split(2)), lambda x: [mixup(part) for part in x.split(2)]),
    "halves": (lambda x: list(x.chunk(2)), lambda x: list(mixup(x).chunk(2))),
}


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", PIECES)
def test_whole_numbers_texts_and_chunks_are_told_by_what_changes(name, n):
    own, joined = PIECES[name]
    assert check(data(n), lambda items: own(torch.stack(items))) is False
    with pytest.raises(IsolationError, match="joins examples"):
        check(data(n), lambda items: joined(torch.stack(items)))


@pytest.mark.parametrize("n", [2, 3, 4, 8, 14])
def test_texts_in_one_dimension_that_is_filled_up_are_taken(n):
    """What stands behind a text that is longer moves on, though the whole is as long."""

    def filled(items: list[Tensor]) -> Tensor:
        return torch.nn.functional.pad(torch.cat(items), (0, -sum(map(len, items)) % 16))

    for _ in range(3):
        assert check([*texts(n)[1:], texts(n)[0]], filled) is False


@pytest.mark.parametrize("kept", [("x", "edges", "of", "ends"), ("edges",), ("edges", "nodes"), ("all", "y")])
@pytest.mark.parametrize("n", [2, 3, 4, 8, 14])
def test_graphs_in_one_are_taken(kept, n):
    """Their nodes are counted on; the number of edges is the same for all."""

    def graph(place: int) -> tuple[Tensor, Tensor]:
        draws, size = torch.Generator().manual_seed(place), 3 + place % 3
        return torch.randn(size, 4, generator=draws), torch.randint(size, (2, 5), generator=draws)

    def joined(items: list[Any]) -> dict[str, Any]:
        sizes = torch.tensor([len(x) for x, _ in items])
        ends = torch.cat([torch.tensor([0]), sizes.cumsum(0)])
        found = {
            "x": torch.cat([x for x, _ in items]),
            "ends": ends,
            "nodes": int(sizes.sum()),
            "edges": torch.cat([edges + at for (_, edges), at in zip(items, ends[:-1], strict=True)], 1),
            "of": torch.arange(len(items)).repeat_interleave(sizes),
            "y": sizes,
            "all": torch.block_diag(*[x @ x.t() for x, _ in items]).to_sparse(),
        }
        return {name: found[name] for name in kept}

    for _ in range(3):
        check([graph(place) for place in range(n)], joined)


@pytest.mark.parametrize("n", [3, 4, 8, 14])
def test_graphs_without_nodes_are_taken(n):
    """The number of nodes is no shape, and moves all that comes behind on; by one that is itself counted twice."""

    def graph(place: int) -> tuple[int, Tensor]:
        return 3 + place, torch.randint(3, (2, 5), generator=torch.Generator().manual_seed(place))

    def joined(items: list[Any], factors: tuple[int, ...]) -> dict[str, Any]:
        ends = np.cumsum([0, *(size for size, _ in items)])
        edges = torch.cat([edges + int(at) for (_, edges), at in zip(items, ends[:-1], strict=True)], 1)
        return {
            "edges": torch.cat([edges * factor for factor in factors]),
            **({"nodes": int(ends[-1])} if len(factors) > 1 else {}),
        }

    for factors in ((1,), (1, 2)):  # with their number beside them, edges may be anything
        for _ in range(3):
            assert check([graph(place) for place in range(n)], lambda items, by=factors: joined(items, by)) is False


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_what_says_in_which_place_a_row_is_is_taken(n):
    def counted(items: list[Tensor]) -> dict[str, Any]:
        size = len(items)
        return {
            "x": torch.stack(items),
            "at": torch.arange(size),
            "list": list(range(size)),
            "starts": torch.arange(0, 2 * size, 2),
            "names": [f"row {place}" for place in range(size)],
        }

    assert check(data(n), counted) is False
    check(texts(n)[::-1], lambda items: (pad_sequence(sorted(items, key=len), True), torch.arange(len(items))))


@pytest.mark.parametrize(
    "told",
    [
        lambda x: torch.arange(len(x)) / len(x),
        lambda x: torch.arange(len(x)) * float(x.mean()),
        lambda x: torch.where(torch.arange(len(x)) < 5, torch.arange(len(x)), x.sum()),
        lambda x: x[:, 0, 0].argsort().argsort(),
        lambda x: [f"row {place} of {len(x)}" for place in range(len(x))],
    ],
    ids=["how many", "how large", "sums", "ranks", "names"],
)
def test_what_says_more_than_in_which_place_a_row_is_is_refused(told):
    with pytest.raises(IsolationError, match="joins examples"):
        check(data(8), lambda items: {"x": torch.stack(items), "told": told(torch.stack(items))})
