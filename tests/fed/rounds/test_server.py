"""The server: whom it draws, what it sends, and the updates that it refuses."""

import math

import numpy as np
import pytest
import torch

from lora_dp.fed.methods import Layers, factor, get_method
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.server import Server, draw_clients, nbytes
from tests.fed.tiny_runs import tiny


@pytest.mark.slow
def test_only_what_changed_travels():
    federation = Federation.from_config(tiny(method="ffa-lora"))
    state = federation.server.state
    whole = nbytes(state)
    trained = nbytes({name: tensor for name, tensor in state.items() if factor(name) != "A"})
    first, second = federation.run_round([0, 1]), federation.run_round([0])
    assert (first.bytes_up, first.bytes_down) == (2 * trained, 2 * whole)
    # The shared A was sent once and for all.
    assert (second.bytes_up, second.bytes_down) == (trained, trained)


def test_the_server_refuses_what_does_not_fit():
    server = Server({"x": torch.zeros(2)}, Layers({}, 1), get_method("la-lora"))
    for wrong in ({"y": torch.zeros(2)}, {"x": torch.zeros(3)}):
        with pytest.raises(ValueError, match="does not fit"):
            server.apply(wrong)
    assert server.version == 0


def test_clients_are_drawn_uniformly_without_replacement():
    rng = np.random.default_rng(0)
    counts = np.zeros(5)
    for _ in range(2000):
        drawn = draw_clients([0, 1, 2, 4], 2, rng)
        assert len(set(drawn)) == 2
        counts[drawn] += 1
    assert counts[3] == 0
    # Each of four is drawn with probability 1/2: a deviation of 22.4, five of them allowed.
    assert np.all(np.abs(counts[[0, 1, 2, 4]] - 1000) < 5 * math.sqrt(2000 / 4))
