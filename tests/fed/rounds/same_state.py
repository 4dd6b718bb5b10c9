"""Whether two federations are in one state."""

import torch

from lora_dp.fed.rounds.federation import Federation


def same(one: Federation, other: Federation) -> None:
    assert one.server.state.keys() == other.server.state.keys()
    for name, tensor in one.server.state.items():
        assert torch.equal(tensor, other.server.state[name]), name
