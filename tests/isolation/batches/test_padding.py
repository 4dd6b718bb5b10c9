"""What is padding in a batch, by masks, ignored labels and runs of one value; and less of it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_dp.isolation.batches.calls import take
from lora_dp.isolation.batches.padding import cut, narrowed, telling_masks, used_tokens
from tests.isolation.batches.call_values import N, zeros


def padded(*lengths: int, width: int = 9, left: bool = False, fill: int = 0) -> Tensor:
    """Numbers from 1 on, all of them different, and ``fill`` beyond each length."""
    ids = torch.arange(1, len(lengths) * width + 1).view(len(lengths), width)
    used = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    return ids.where(used.flip(1) if left else used, torch.tensor(fill))


def first_cuts(tree: Any, n: int, **options: Any) -> list[tuple[int, list[int], int, slice]]:
    return [(parts[0].place, parts[0].rows, parts[0].tokens, parts[0].kept) for parts in narrowed(tree, n, **options)]


def test_a_mask_that_has_told_of_padding_tells_that_there_is_none() -> None:
    """A text that begins with one word twice, in a batch of texts of one length."""
    ids = padded(9, 9)
    ids[1, 1] = ids[1, 0]
    tree = {"attention_mask": torch.ones_like(ids), "ids": ids}
    assert first_cuts(tree, 2) == [(1, [1], 9, slice(2, 9))]  # always of ones, it says nothing
    assert telling_masks(tree, 2) == set()
    [name] = telling_masks({**tree, "attention_mask": (padded(9, 4) != 0).long()}, 2)
    assert first_cuts(tree, 2, masks={name}) == []
    assert first_cuts({"ids": ids}, 2, masks={name}) != []


def test_padding_is_found_by_masks_labels_and_runs():
    """At either end; rows are the two that have most of it, or the one that has any."""
    right, left = (1, [1, 2], 9, slice(0, 4)), (1, [1, 2], 9, slice(5, 9))
    for at_left, expected in ((False, right), (True, left)):
        ids = padded(9, 4, 3, 6, left=at_left)
        for tree, by_runs in (
            ({"attention_mask": (ids != 0).long()}, False),
            ({"attention_mask": ids != 0}, False),
            ({"labels": ids.where(ids != 0, -100)}, False),
            ({"ids": ids}, True),
            ({"ids": ids.where(ids != 0, 7)}, True),
        ):
            assert first_cuts(tree, N, by_runs=by_runs) == [expected]
            assert first_cuts(take(tree, [0, 1], N), 2, by_runs=by_runs) == [(1, [1], 9, expected[3])]
        assert first_cuts({"ids": ids}, N, by_runs=False) == []
    assert first_cuts({"ids": padded(9, 4, 3, 6)}, N) == [right]
    assert first_cuts({"ids": padded(9, 7, 7, 9)}, N) == [(1, [1, 2], 9, slice(0, 7))]


def test_every_padded_example_comes_without_any_padding():
    """Beside itself, but for those that have none in the company of another."""

    def rows(*lengths: int) -> list[tuple[list[int], slice]]:
        mask = (padded(*lengths) != 0).long()
        return [(parts[0].rows, parts[0].kept) for parts in narrowed({"attention_mask": mask}, len(mask), each=True)]

    assert rows(9, 4, 3, 6) == [([1, 2], slice(0, 4)), ([2, 2], slice(0, 3)), ([3, 3], slice(0, 6))]
    assert rows(9, 4, 4, 6) == [([1, 2], slice(0, 4)), ([3, 3], slice(0, 6))]
    assert rows(9, 4, 9, 9) == [([1], slice(0, 4))] and rows(9, 9, 9, 9) == []


def test_what_is_no_padding():
    """A word that one text ends in twice, borders that all have, rows without any token, tables, numbers."""
    one = padded(9, 9, 9, 9)
    one[2, -3:] = 50
    assert first_cuts({"ids": one}, N) == [] == first_cuts({"ids": one[1:]}, 3)
    one[1, -1] = 50  # another ends in that word, once
    assert first_cuts({"ids": one}, N) == []
    one[1, -2:] = 50
    assert first_cuts({"ids": one}, N) == [(1, [1, 2], 9, slice(0, 7))]
    assert first_cuts({"ids": padded(5, 5, 5, 5)}, N) == []
    assert first_cuts({"ids": padded(8, 9, 9, 9)}, N) == []
    mask = (padded(9, 0, 7, 9) != 0).long()
    assert first_cuts({"attention_mask": mask}, N) == [(1, [2], 9, slice(0, 7))]
    assert first_cuts({"attention_mask": (padded(9, 9, 9, 9) != 0).long()}, N) == []
    for tree in (
        {"table": padded(9, 4, 3, 6, 2)},
        {"x": zeros(N)},
        {"x": zeros(N, 0)},
        {"text": "mask"},
        {"attention_mask": zeros(N, 0)},
        {"labels": torch.full((N, 3), -100.0)},
        {"x": torch.rand(N, 1)},
    ):
        assert first_cuts(tree, N) == []


@pytest.mark.parametrize(
    "tree",
    [
        {"ids": padded(9, 4, 3, 6, fill=-100)},
        {"labels": padded(9, 4, 3, 6, fill=-100).float()},
        {"labels": padded(9, 4, 3, 6, fill=-100).unsqueeze(2)},
        {"masks": padded(9, 4, 3, 6).unsqueeze(2)},
    ],
)
def test_only_labels_of_tokens_are_ignored(tree):
    assert first_cuts(tree, N, by_runs=False) == []


def test_masks_tell_more_than_runs_do():
    """Where a mask shows padding, no run of words is taken for some; where it is all ones, it tells nothing."""
    ids = padded(9, 4, 3, 6)
    assert first_cuts({"ids": ids, "mask_of_examples": torch.tensor([1, 0, 1, 1])}, N) == [(1, [1, 2], 9, slice(0, 4))]
    for mask, expected in ((padded(9, 9, 8, 9), [slice(0, 8)]), (torch.ones(N, 9), [slice(0, 4)])):
        found = first_cuts({"ids": ids, "attention_mask": (mask != 0).long()}, N)
        assert [kept for _, _, _, kept in found] == expected
    images = {"pixels": torch.rand(N, 3, 8, 8), "pixel_mask": torch.ones(N, 8, 8)}
    images["pixel_mask"][1:, :, 5:] = 0
    images["pixel_mask"][3, :, 4:] = 0
    assert (2, [1, 2], 8, slice(0, 5)) in first_cuts(images, N) or (2, [1, 3], 8, slice(0, 5)) in first_cuts(images, N)


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("left", [False, True])
def test_padding_of_images_is_found_in_every_dimension(place, left):
    x = 1 + torch.rand(N, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    for row, border in ((1, 3), (3, 1)):
        x[row].narrow(place - 1, 0 if left else 8 - border, border).zero_()
    assert first_cuts({"x": x}, N) == [(place, [1, 3], 8, slice(1, 8) if left else slice(0, 7))]
    x[:].narrow(place, 0 if left else 5, 3).zero_()
    assert first_cuts({"x": x}, N) == []


def test_padding_of_images_is_what_most_of_them_end_in():
    x = 1 + torch.rand(N, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    x[1:3, :, :, 7:], x[3, :, :, 6:] = 0, 5
    assert first_cuts({"x": x}, N) == [(3, [1, 2], 8, slice(0, 7))]


def test_a_part_has_what_is_left_for_models_that_take_some_lengths_only():
    tree = {"ids": padded(40, 3, 5, 20, width=40), "attention_mask": (padded(40, 3, 5, 20, width=40) != 0).long()}
    (parts,) = list(narrowed(tree, N))
    assert [part.kept.stop for part in parts] == [5, 6, 8, 16] and {part.tokens for part in parts} == {40}
    assert parts[0].mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert torch.equal(parts[0].call["ids"], tree["ids"][[1, 2], :5])
    long = {"attention_mask": (padded(300, 100, 130, 299, width=300) != 0).long()}
    assert [part.kept.stop for part in next(iter(narrowed(long, N)))] == [130, 136, 144, 192]


def test_what_goes_with_a_tensor_is_cut_with_it():
    tree = {
        "ids": torch.rand(N, 9),
        "features": torch.rand(N, 9, 9),
        "attention_mask": torch.rand(N, 9),
        "mask_of_pairs": torch.rand(N, 1, 9, 9),
        "mask_of_both": torch.rand(N, 9, 9),
        "heads": torch.rand(N, 2, 9),
        "other": torch.rand(N, 8),
        "table": torch.rand(9, 3),
        "number": 9,
    }
    found = cut(tree, "['ids']", 1, 9, slice(2, 7))
    assert {name: tuple(leaf.shape) for name, leaf in found.items() if isinstance(leaf, Tensor)} == {
        "ids": (N, 5),
        "features": (N, 5, 9),
        "attention_mask": (N, 5),
        "mask_of_pairs": (N, 1, 5, 5),
        "mask_of_both": (N, 5, 5),
        "heads": (N, 2, 9),
        "other": (N, 8),
        "table": (9, 3),
    }
    assert torch.equal(found["features"], tree["features"][:, 2:7]) and found["number"] == 9
    assert torch.equal(found["mask_of_pairs"], tree["mask_of_pairs"][:, :, 2:7, 2:7])
    found = cut(tree, "['heads']", 2, 9, slice(0, 4))
    assert found["heads"].shape == (N, 2, 4) and found["features"].shape == (N, 4, 4)
    # Of the tensor itself, the dimension that was padded alone.
    assert cut({"x": torch.rand(N, 9, 9)}, "['x']", 2, 9, slice(0, 4))["x"].shape == (N, 9, 4)


def test_which_tokens_are_used_is_what_masks_and_labels_say():
    ids = padded(9, 4, 3, 6)
    assert used_tokens({"ids": ids}, N) is None  # a run of one word says nothing here
    for tree in ({"ids": ids, "attention_mask": (ids != 0).long()}, {"labels": ids.where(ids != 0, -100)}):
        found = used_tokens(tree, N)
        assert found is not None and torch.equal(found, ids != 0)


def test_copies_of_one_example_have_padding_where_it_ends_in_one_word():
    """What all rows have is a border, unless all rows are the same example."""
    assert first_cuts({"ids": torch.tensor([[1, 2, 0, 0, 0]] * 2)}, 2) == [(1, [0, 1], 5, slice(0, 2))]
    assert first_cuts({"ids": torch.tensor([[1, 2, 0, 0, 0], [3, 2, 0, 0, 0]])}, 2) == []


def test_runs_of_whole_numbers_alone_may_be_asked_for():
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]])
    found = list(narrowed({"ids": ids, "x": ids.float()}, 3, by_runs="whole numbers"))
    assert [lengths[0].name for lengths in found] == ["['ids']"]


@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, torch.nan])
def test_padding_is_any_one_value(value):
    x = torch.randn(3, 6, 4)
    for row, length in enumerate((6, 3, 2)):
        x[row, length:] = value
    assert first_cuts({"x": x}, 3)[0] == (1, [1, 2], 6, slice(0, 3))
