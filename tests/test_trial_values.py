"""What two passes gave one example is compared."""

import math

import pytest
import torch

from lora_dp.trial_values import differ


@pytest.mark.parametrize(("left", "right", "expected"), [
    ([1.0, -1e9], [1.0 + 1e-5, -1e9], False), ([1.0, -1e9], [1.001, -1e9], True),
    ([1.0, -1e4], [1.0, -1e4 - 2], True), ([1.0, -1e4], [1.0, -1e4 - 0.1], False),
    ([5e5, 2e3], [5e5, 2e3 + 1], True), ([-math.inf, 1.0], [-math.inf, 1.0], False)])
def test_large_scores_are_compared_with_themselves(left, right, expected):
    assert differ(torch.tensor(left), torch.tensor(right), masked=True) is expected
