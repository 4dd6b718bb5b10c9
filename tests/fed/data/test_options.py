"""Options of the data: out of range they are refused."""

import pytest

from lora_dp.fed.data.options import DataConfig


@pytest.mark.parametrize("settings", [{"validation_fraction": 1.0}, {"max_length": 0}])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        DataConfig(**settings)
