"""What all private layers refuse, and what of them is in a state."""

import pytest
import torch
from torch import nn

from lora_dp import DPLinear, DPLoRALinear
from tests.models import assert_refuses, mlp
from tests.support import make_private


def test_recorder_is_no_part_of_the_state():
    model = mlp()
    names = list(model.state_dict())
    make_private(model, batch_size=4)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("module", [nn.Conv1d(7, 5, 1), nn.Bilinear(7, 7, 5), nn.Identity()])
def test_what_is_not_linear_is_refused(module):
    assert_refuses(TypeError, f"got {type(module).__name__}", lambda: DPLoRALinear.from_linear(module, r=2))
    assert_refuses(TypeError, f"got {type(module).__name__}", lambda: DPLinear.from_linear(module))


def test_training_a_part_outside_the_private_model_is_refused():
    model = mlp()
    make_private(model, batch_size=4)
    assert_refuses(RuntimeError, "outside the model that was made private", lambda: model[0](torch.randn(4, 6)))
