"""The sum under the server's noise: in float64, of clipped changes, noised once."""

import math

import pytest
import torch

from lora_dp.fed.rounds import server_noise
from lora_dp.fed.rounds.server_noise import NoisySum
from tests.fed.small import make_federation

SERVER = {"unit": "client", "noise_by": "server", "clients": 3, "max_update_norm": 0.5}


class Silent:
    """A mechanism without noise."""

    def release(self, sums):
        assert all(value.dtype == torch.float64 for value in sums)
        return sums


@pytest.fixture
def begun(monkeypatch):
    """A sum of float32 states that begin at zero, without noise; and the start."""
    monkeypatch.setattr(server_noise, "client_mechanism", lambda *_: Silent())
    federation = make_federation("ffa-lora", weighting="equal", **SERVER)
    state = {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in federation.server.state.items()}
    return NoisySum(federation.plan, federation.method, federation.server.layers, state, 0, 0), state


def moved(start, size):
    return {name: tensor + (size if name == "4.bias" else 0.0) for name, tensor in start.items()}


def test_small_changes_beside_a_large_one_are_summed(begun):
    """2,000 changes of 2⁻²⁷ beside one of 1/4: in float32 each of them would vanish."""
    total, start = begun
    assert total.add(moved(start, 0.25), start)
    for _ in range(2000):
        assert total.add(moved(start, 2.0**-27), start)
    mean = total.result(None)
    expected = (0.25 + 2000 * 2.0**-27) / 3
    assert mean["4.bias"].tolist() == pytest.approx([expected] * 3, rel=1e-7)
    assert mean["4.bias"].dtype == torch.float32 and not mean["4.weight"].any()


def test_a_change_is_from_the_clients_own_start_and_clipped_as_a_whole(begun):
    total, start = begun
    own = moved(start, 7.0)
    assert total.add(moved(own, 3.0), own)
    assert total.result(None)["4.bias"].tolist() == pytest.approx([0.5 / math.sqrt(3) / 3] * 3, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_change_that_is_not_finite_adds_nothing(begun, bad):
    total, start = begun
    assert not total.add(moved(start, bad), start)
    assert not total.result(None)["4.bias"].any()
