"""What two passes gave one example is compared."""

import math

import pytest
import torch

from lora_dp.trial_values import differ


@pytest.mark.parametrize(("left", "right", "expected"), [
    ([1.0, -1e9], [1.0 + 1e-5, -1e9], False), ([1.0, -1e9], [1.001, -1e9], True),
    ([1.0, -1e4], [1.0, -1e4 - 2], True), ([1.0, -1e4], [1.0, -1e4 - 0.1], False),
    ([5e5, 2e3], [5e5, 2e3 + 1], True),
    ([100.0, 1e-3], [100.0, 1.01e-3], False), ([-math.inf, 1.0], [-math.inf, 1.0], False)])
def test_large_scores_are_compared_with_themselves(left, right, expected):
    assert differ(torch.tensor(left), torch.tensor(right), masked=True) is expected


@pytest.mark.parametrize(("share", "expected"), [(1e-6, False), (1e-2, True)])
def test_gradients_are_compared_with_the_largest_of_them(share, expected):
    left = torch.tensor([1e6, 1.0])
    assert differ(left, left + torch.tensor([0.0, share * 1e6])) is expected
