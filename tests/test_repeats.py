"""Data sets that hold one example twice."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

from lora_dp import PrivacyEngine
from lora_dp.repeats import first_repeated
from tests.models import assert_refuses, mlp

A, B = TensorDataset(torch.zeros(5)), TensorDataset(torch.zeros(3))
LONG, SHORT = TensorDataset(torch.zeros(300)), TensorDataset(torch.zeros(100))


@pytest.mark.parametrize(("dataset", "first"), [
    (A, None), (Subset(A, [0, 4, 2]), None), (Subset(A, range(5)), None), (ConcatDataset([A, B]), None),
    (ConcatDataset([LONG, SHORT]), None),
    (ConcatDataset([Subset(A, [0, 1]), Subset(A, [2, 3])]), None), (random_split(A, [2, 3])[0], None),
    (Subset(A, torch.tensor([3, 1])), None), (Subset(A, []), None),
    (Subset(A, [0, 4, 0]), 2), (Subset(A, [4, -1]), 1), (ConcatDataset([A, B, A]), 8), (ConcatDataset([A, B, B]), 8),
    (Subset(Subset(A, [1, 1, 2]), [0, 2]), None), (Subset(Subset(A, [1, 1, 2]), [0, 2, 1]), 2),
    (ConcatDataset([Subset(A, [0, 1]), Subset(A, [2, 1])]), 3), (Subset(ConcatDataset([A, B, A]), [0, 5, 8]), 2)])
def test_the_first_that_has_come_before_is_found(dataset: Dataset[Any], first: int | None) -> None:
    found = first_repeated(dataset)
    assert found == first and type(found) in (int, type(None))


@pytest.mark.parametrize("dataset", [Subset(A, [0, 1, 1]), ConcatDataset([A, A])])
def test_an_example_that_would_count_twice_is_refused(dataset: Dataset[Any]) -> None:
    model = mlp()
    assert_refuses(
        ValueError, "holds an example twice (index ", lambda: PrivacyEngine("rdp").make_private(
            model=model, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
            data_loader=DataLoader(dataset, batch_size=2), noise_multiplier=1.0, max_grad_norm=1.0))


ROWS = [(torch.zeros(2), row % 2) for row in range(5)]


@pytest.mark.parametrize(("dataset", "first"), [
    (ROWS, None), (tuple(ROWS), None), (ROWS + ROWS[1:2], 5), ([*ROWS, *ROWS], 5), ([3, 3, 4], None),
    (ConcatDataset([ROWS, ROWS]), 5), (Subset(ROWS + ROWS[:1], [5, 1]), None), (Subset(ROWS + ROWS[:1], [5, 0]), 1)])
def test_a_list_that_holds_an_object_twice(dataset: Any, first: int | None) -> None:
    assert first_repeated(dataset) == first


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
