"""Whether an example's rows are the same in two batches: but for padding, and for roundings."""

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import TensorDataset

from lora_dp import IsolationError
from lora_dp.isolation.collation.row_equality import padded_alike
from lora_dp.isolation.collation.trial import check_collation
from tests.isolation.collation.collate_functions import Texts, check, mixup, padded, padded_left
from tests.models import examples


@pytest.mark.parametrize("n", [3, 8])
def test_missing_values_hide_no_mixture(n):
    """A value that is not equal to itself is no sign of chance."""
    x = examples(24)[0]
    x[:, 2] = torch.nan
    with pytest.raises(IsolationError, match="collate function joins examples"):
        check(TensorDataset(x), mixup, n)


def padded_and_joined(items: list[Tensor]) -> Tensor:
    ids = pad_sequence(items, True)
    return ids + ids.roll(1, 0)


def padded_with_the_longest(items: list[Tensor]) -> Tensor:
    longest = max(items, key=len)
    return torch.stack([torch.cat([item, longest[len(item) :]]) for item in items])


@pytest.mark.parametrize(
    "collate",
    [
        padded_and_joined,
        padded_with_the_longest,
        lambda items: padded_and_joined([item.float() for item in items]).flip(1),
    ],
)
def test_what_joins_examples_of_several_lengths_is_refused(collate):
    for n in (3, 8):
        with pytest.raises(IsolationError, match="collate function joins examples"):
            check(Texts(), collate, n)


def test_what_an_example_has_in_one_batch_alone_is_no_padding():
    row = torch.ones(2)
    assert [padded_alike(*pair) for pair in ((row, None), (None, row), (None, None), (row, row))] == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("collate", [padded, padded_left])
def test_an_empty_text_is_padded_like_any_other(collate):
    texts = [torch.arange(0), torch.arange(1, 4), torch.arange(0)]
    assert not check_collation(texts, collate, range(3), collate(texts))
    assert check_collation(texts, collate, [0, 1], collate(texts[:2]))
