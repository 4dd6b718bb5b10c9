"""Canaries in gradients: as many as there are numbers of their own."""

import pytest

from lora_dp.fed.auditing.clients import ClientCanaries
from lora_dp.fed.auditing.gradients import most_gradients
from tests.fed.auditing.small_runs import CLIENTS, SMALL, opened


@pytest.mark.parametrize("features", ["own", "unit"])
def test_canaries_have_numbers_of_their_own(features):
    """What centres and scales features is no step's to train."""
    game = opened({**SMALL, "features": features})
    shapes = {name: value.numel() for name, value in game.job.trainer.workspace.state().items()}
    shapes = {name: size for name, size in shapes.items() if ".feature_" not in name and ".class_" not in name}
    head = sum(n for name, n in shapes.items() if "lora_" not in name)
    a = sum(n for name, n in shapes.items() if name.endswith("lora_A"))
    b = sum(n for name, n in shapes.items() if name.endswith("lora_B"))
    assert most_gradients(game) == head + min(a, b)
    with pytest.raises(ValueError, match="count must lie between 1 and"):
        ClientCanaries(opened(CLIENTS), 10**6)
