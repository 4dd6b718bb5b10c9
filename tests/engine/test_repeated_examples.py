"""Data sets that hold one example twice."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

from lora_dp import PrivacyEngine
from lora_dp.engine.repeated_examples import first_repeated
from tests.models import assert_refuses, mlp

A, B = TensorDataset(torch.zeros(5)), TensorDataset(torch.zeros(3))
LONG, SHORT = TensorDataset(torch.zeros(300)), TensorDataset(torch.zeros(100))


@pytest.mark.parametrize(
    ("dataset", "first"),
    [
        (A, None),
        (Subset(A, [0, 4, 2]), None),
        (Subset(A, range(5)), None),
        (ConcatDataset([A, B]), None),
        (ConcatDataset([LONG, SHORT]), None),
        (ConcatDataset([Subset(A, [0, 1]), Subset(A, [2, 3])]), None),
        (random_split(A, [2, 3])[0], None),
        (Subset(A, torch.tensor([3, 1])), None),
        (Subset(A, []), None),
        (Subset(A, [0, 4, 0]), 2),
        (Subset(A, [4, -1]), 1),
        (ConcatDataset([A, B, A]), 8),
        (ConcatDataset([A, B, B]), 8),
        (Subset(Subset(A, [1, 1, 2]), [0, 2]), None),
        (Subset(Subset(A, [1, 1, 2]), [0, 2, 1]), 2),
        (ConcatDataset([Subset(A, [0, 1]), Subset(A, [2, 1])]), 3),
        (Subset(ConcatDataset([A, B, A]), [0, 5, 8]), 2),
    ],
)
def test_the_first_that_has_come_before_is_found(dataset: Dataset[Any], first: int | None) -> None:
    found = first_repeated(dataset)
    assert found == first and type(found) in (int, type(None))


@pytest.mark.parametrize("dataset", [Subset(A, [0, 1, 1]), ConcatDataset([A, A])])
def test_an_example_that_would_count_twice_is_refused(dataset: Dataset[Any]) -> None:
    model = mlp()
    assert_refuses(
        ValueError,
        "holds an example twice (index ",
        lambda: PrivacyEngine("rdp").make_private(
            model=model,
            optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
            data_loader=DataLoader(dataset, batch_size=2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        ),
    )


ROWS = [(torch.zeros(2), row % 2) for row in range(5)]


@pytest.mark.parametrize(
    ("dataset", "first"),
    [
        (ROWS, None),
        (tuple(ROWS), None),
        (ROWS + ROWS[1:2], 5),
        ([*ROWS, *ROWS], 5),
        ([3, 3, 4], None),
        (ConcatDataset([ROWS, ROWS]), 5),
        (Subset(ROWS + ROWS[:1], [5, 1]), None),
        (Subset(ROWS + ROWS[:1], [5, 0]), 1),
    ],
)
def test_a_list_that_holds_an_object_twice(dataset: Any, first: int | None) -> None:
    assert first_repeated(dataset) == first


class Augmented(Dataset[Any]):
    """Of rows, perhaps changed."""

    def __init__(self, rows: Any, transform: Any = None):
        self.rows, self.train_transform = rows, transform

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(2)


class Unequal:
    def __eq__(self, other: object) -> bool:
        raise LookupError


class Slotted(Dataset[Any]):
    """Has no attributes to compare."""

    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows = [1, 2, 3]

    __len__ = Augmented.__len__
    __getitem__ = Augmented.__getitem__


def frame(*values: int) -> Any:
    return pytest.importorskip("pandas").DataFrame({"x": values})


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ([("a.png", 0), ("b.png", 1)], [("a.png", 0), ("b.png", 1)], True),
        (["a.png"], ["b.png"], False),
        (torch.arange(6).view(3, 2), torch.arange(6).view(3, 2), True),
        (torch.zeros(3, 2), torch.eye(3, 2), False),
        (torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]), False),
        (torch.zeros(3), torch.zeros(4), False),
        (torch.zeros(3), torch.zeros(3, dtype=torch.float64), False),
        (torch.zeros(()), torch.zeros(()), True),
        (np.arange(3), np.arange(3), True),
        (np.arange(3), np.array([0, 1, 1]), False),
        (np.zeros(3), [0, 0, 0], False),
        (np.zeros((0, 2)), np.zeros((0, 2)), True),
        (np.zeros((0, 2)), np.zeros((0, 3)), False),
        ((torch.ones(3), torch.zeros(3)), (torch.ones(3), torch.zeros(3)), True),
        ((torch.ones(3), torch.zeros(3)), (torch.ones(3), torch.ones(3)), False),
        ([torch.ones(3)] * 2, [torch.ones(3)] * 3, False),
        ({"x": torch.ones(3)}, {"x": torch.ones(3)}, True),
        ({"x": torch.ones(3)}, {"x": torch.zeros(3)}, False),
        ({"x": torch.ones(3)}, {"y": torch.ones(3)}, False),
        (Unequal(), Unequal(), False),
        (math.sin, math.cos, False),
        (math.sin, math.sin, True),
        (frame(1, 2, 3), frame(1, 2, 3), True),
        (frame(1, 2, 3), frame(1, 2, 4), False),
    ],
)
def test_data_sets_that_differ_in_their_transforms_alone_are_one(one: Any, other: Any, alike: bool) -> None:
    """As a training set is joined with itself, augmented."""
    both = ConcatDataset([Augmented(one), Augmented(other, torch.flip)])
    assert first_repeated(both) == (3 if alike else None)


def test_data_sets_of_other_classes_or_attributes_are_others() -> None:
    plain, more, other = Augmented([1]), Augmented([1]), Keyed()
    more.fold = 2  # type: ignore[attr-defined]
    other.__dict__ = {"rows": [1], "train_transform": None}
    other.__class__.__len__ = Augmented.__len__  # type: ignore[attr-defined]
    try:
        assert first_repeated(ConcatDataset([plain, more, other])) is None  # type: ignore[list-item]
        assert first_repeated(ConcatDataset([more, plain, plain])) == 6
    finally:
        del other.__class__.__len__  # type: ignore[attr-defined]
    assert first_repeated(ConcatDataset([Slotted(), Slotted()])) is None
    same = Slotted()
    assert first_repeated(ConcatDataset([same, same])) == 3


def test_one_folder_of_images_under_two_transforms(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    for number in range(4):
        (tmp_path / str(number % 2)).mkdir(exist_ok=True)
        Image.new("L", (2, 2), number).save(tmp_path / str(number % 2) / f"{number}.png")
    folder = torchvision.datasets.ImageFolder
    both = ConcatDataset([folder(str(tmp_path)), folder(str(tmp_path), transform=torchvision.transforms.ToTensor())])
    assert first_repeated(both) == 4
    assert first_repeated(Subset(both, [0, 1, 6, 7])) is None


@pytest.mark.parametrize("column", ["numbers", "texts", "lists", "nothing"])
def test_rows_that_are_joined_twice(column: str) -> None:
    datasets = pytest.importorskip("datasets")
    values = {
        "numbers": list(range(10)),
        "texts": [f"t{row}" for row in range(10)],
        "lists": [[float(row)] * 3 for row in range(10)],
        "nothing": [None] * 10,
    }[column]
    rows = datasets.Dataset.from_dict({"x": values, "y": [row % 2 for row in range(10)]})
    odd = rows.filter(lambda row: row["y"] == 1)
    joined = datasets.concatenate_datasets
    assert first_repeated(joined([rows, odd])) == first_repeated(rows.repeat(2)) == 10
    assert first_repeated(ConcatDataset([rows, odd])) == first_repeated(joined([rows, odd.select([4])])) == 10
    assert first_repeated(joined([rows, odd]).shuffle(seed=0)) is not None
    assert first_repeated(joined([rows.select(range(4)), rows.select(range(4, 10))])) is None
    assert first_repeated(joined([rows.select(range(4)), rows.select(range(3, 10))])) == 4
    more = datasets.Dataset.from_dict({"x": values, "y": [0] * 10})
    assert first_repeated(joined([rows, more])) is first_repeated(ConcatDataset([rows, more])) is None
    assert first_repeated(ConcatDataset([A, B, rows, more, LONG])) is None
    assert first_repeated(ConcatDataset([rows.select(range(4)), rows.select([4, 5])])) is None


def test_rows_of_no_column_or_none_at_all() -> None:
    datasets = pytest.importorskip("datasets")
    for kind in ("int64", "string"):
        none = datasets.Dataset.from_dict({"x": []}, features=datasets.Features({"x": datasets.Value(kind)}))
        assert first_repeated(none) is None and first_repeated(ConcatDataset([A, none, none])) is None
    rows = datasets.Dataset.from_dict({"x": []})
    assert first_repeated(rows) is None and first_repeated(rows.remove_columns("x")) is None
    assert first_repeated(ConcatDataset([rows, rows])) is None


def test_rows_that_are_selected_twice() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": list(range(6))})
    few = rows.select([4, 5])
    assert first_repeated(rows) is None and first_repeated(rows.shuffle(seed=0)) is None and first_repeated(few) is None
    assert first_repeated(rows.select([0, 3, 1, 3])) == 3
    assert first_repeated(datasets.interleave_datasets([rows, few], stopping_strategy="all_exhausted")) is not None


class Keyed(Dataset[Any]):
    """Of no length, by names."""

    def __getitem__(self, key: str) -> Tensor:
        return torch.zeros(2)


class Vast(Dataset[Any]):
    def __len__(self) -> int:
        return 2**50

    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(2)


def test_a_subset_by_names_or_of_a_vast_data_set_is_looked_at_without_it() -> None:
    assert first_repeated(Subset(Keyed(), ["a", "b"])) is None  # type: ignore[arg-type]
    assert first_repeated(Subset(Keyed(), [3, 4, 3])) == 2
    assert first_repeated(Subset(Vast(), [3, 4, 5])) is None and first_repeated(Subset(Vast(), [3, 4, -1, 4])) == 3
