"""Options of a comparison that make no grid are refused."""

import math

import pytest

from lora_dp.fed.compare.options import CompareConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1, 1]}, "seeds has 1 twice"),
        ({"epsilons": [8, 8.0]}, "epsilons has 8.0 twice"),
        ({"epsilons": ["none", math.inf]}, "epsilons has none twice"),
        ({"methods": []}, "methods is empty"),
        ({"processes": 0}, "processes must be at least 1"),
    ],
)
def test_grids_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(**options)
