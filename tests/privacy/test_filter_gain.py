"""The energy that filters leave of white noise, against the whole matrix of the filter."""

import math

import pytest
import torch

from lora_dp import GaussianFilter, LaplacianFilter
from lora_dp.privacy.filter_gain import filter_gain


@pytest.mark.parametrize(
    "low_pass", [GaussianFilter(0.0), GaussianFilter(0.5), GaussianFilter(1.3), LaplacianFilter(0.7)], ids=repr
)
@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (1, 9), (4, 5), (6, 6), (2, 13), (3, 4)])
def test_the_gain_is_that_of_the_whole_matrix(low_pass, shape):
    # F column by column: what becomes of every unit matrix.
    columns = torch.stack(
        [low_pass(unit.view(shape)).flatten() for unit in torch.eye(math.prod(shape), dtype=torch.float64)]
    )
    assert filter_gain(low_pass, shape) == pytest.approx(float(columns.square().sum()) / len(columns), rel=1e-12)


def test_the_gain_of_a_wide_factor_is_cheap():
    # The whole matrix would have 4e9 entries.
    assert 0.2 < filter_gain(GaussianFilter(1.0), (16, 65536)) < 0.3
