"""The few examples of a batch that are collated again: unusual ones are among them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lora_dp import IsolationError
from lora_dp.isolation.collation.few_examples import unusual
from tests.isolation.collation.collate_functions import SHARED, beside, check, labelled, mixup


def test_one_unusual_example_among_equal_ones_is_enough():
    """In a batch of equal examples mixing them shows nowhere else."""
    x = torch.zeros(21, 8)
    x[:, 0] = 1
    x[-1, 0] = -1e6
    with pytest.raises(IsolationError, match="collate function joins examples"):
        check(TensorDataset(x), mixup, 21)


def test_one_of_a_rare_class_is_among_those_that_are_tried():
    """Weights of classes change with hardly any other example; others are unusual otherwise."""

    def weighed(items: list[Any]) -> Any:
        found = beside(SHARED["of each class"])(items)
        return {**found, "first": found["x"][:, 0], "second": found["x"][:, 1]}

    for rare in range(0, 40, 3):
        with pytest.raises(IsolationError, match="which has no entry for each example"):
            check(labelled(40, rare), weighed, 40)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (torch.tensor([1, 1, 0, 1, 2]), {2, 4}),
        (torch.tensor([[1, 5], [2, 2], [0, 9], [3, 3], [4, 4]]), {1, 2}),  # of their sums
        ([torch.tensor(row) for row in ([1, 5], [2, 2], [0, 9], [3, 3], [4, 4])], {1, 2}),
        ([{} if x is None else {"x": torch.tensor(x)} for x in (0.5, 0.7, None, 0.6, 0.6)], {1, 2}),
        ([torch.tensor([2048, x], dtype=torch.float16) for x in (1, 0, 1, 1, 0.5)], {0, 1}),
        ({"x": [torch.zeros(2), torch.ones(2), torch.zeros(2)], "y": torch.zeros(5, 0)}, set()),
    ],
    ids=["labels", "rows", "a list", "missing", "halves", "nothing by example"],
)
def test_examples_with_the_least_or_the_most_of_something_are_unusual(batch, found):
    assert unusual(batch, 5) == found


def test_one_longer_text_is_among_those_that_are_tried():
    """A sum in the mask's own type would be rounded to 256 tokens."""

    def counted(items: list[Tensor]) -> dict[str, Any]:
        mask = torch.stack(items)
        return {"mask": mask, "it": 1 / (1 + int((mask[:, 256] > 0).sum()))}

    for rare in range(1, 40, 4):
        masks = [(torch.arange(260) < (257 if i == rare else 256)).bfloat16() for i in range(40)]
        with pytest.raises(IsolationError, match="which has no entry for each example"):
            check(masks, counted, 40)  # type: ignore[arg-type]
