"""Options of the model and of how the embedded one is made: out of range they are refused."""

import pytest

from lora_dp.fed.models.options import PretrainConfig
from lora_dp.fed.models.pretrain import pretrain


@pytest.mark.parametrize("setting", [{"epochs": 0}, {"batch_size": 0}])
def test_refuses_settings_out_of_range(setting):
    with pytest.raises(ValueError, match="must be at least 1"):
        pretrain(PretrainConfig(**setting))
