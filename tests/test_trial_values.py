"""What two passes gave one example is compared."""

import math

import pytest
import torch

from lora_dp.trial_values import differ


@pytest.mark.parametrize(("left", "right", "expected"), [
    ([1.0, -1e9], [1.0 + 1e-5, -1e9], False), ([1.0, -1e9], [1.001, -1e9], True),
    ([1.0, -1e4], [1.0, -1e4 - 2], True), ([1.0, -1e4], [1.0, -1e4 - 0.1], False),
    ([5e5, 2e3], [5e5, 2e3 + 1], True), ([100.0, 1e-3], [100.0, 2e-3], False),
    ([-math.inf, 1.0], [-math.inf, 1.0], False), ([5.0, -1e4], [5.1, -1e4], True),
    ([5.0, -1e9], [5.001, -1e9], True)])
def test_large_scores_are_compared_with_themselves(left, right, expected):
    assert differ(torch.tensor(left), torch.tensor(right), masked=True) is expected


def test_scores_of_a_model_whose_weights_have_grown_round_each_other():
    scores = [-0.3364410400390625, -7408.07861328125, -4704.8388671875, 1601.9840087890625]
    assert not differ(torch.tensor(scores), torch.tensor([-0.3361968994140625, *scores[1:]]), masked=True)
    assert differ(torch.tensor(scores), torch.tensor([-0.33, *scores[1:]]), masked=True)


@pytest.mark.parametrize(("share", "expected"), [(1e-6, False), (1e-2, True)])
def test_gradients_are_compared_with_the_largest_of_them(share, expected):
    left = torch.tensor([-1e6, 1.0])
    assert differ(left, left + torch.tensor([0.0, share * 1e6])) is expected


def test_another_shape_or_another_infinity_is_a_difference():
    assert differ(torch.zeros(2), torch.zeros(3)) and differ(torch.zeros(2), torch.zeros(2, 1))
    assert differ(torch.tensor([math.inf, 1.0]), torch.tensor([1.0, 1.0]))
