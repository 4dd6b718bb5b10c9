"""Averages of updates: exact, in any order, and none of them kept."""

import gc
import itertools
import weakref

import pytest
import torch
from torch import Tensor

from lora_dp.fed.methods import METHODS, WeightedAverage, get_method
from tests.fed.small import make_federation, products

SETTINGS = (
    {},
    {"epsilon": None},
    {"unit": "client", "weighting": "equal"},
    {"unit": "client", "noise_by": "client", "weighting": "equal"},
)
RANKS = {"r": 4, "ranks": (2, 1, 4)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [*itertools.product(METHODS, SETTINGS), *((name, RANKS) for name in METHODS if METHODS[name].ranks_may_differ)],
)
def test_a_round_does_not_depend_on_the_order_of_the_clients(method, settings):
    states = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        federation = make_federation(method, **settings)
        federation.run_round(order)
        states.append({**federation.server.state, **products(federation.server.state)})
    for state in states[1:]:
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, states[0][name], rtol=1e-9, atol=1e-12)


def test_weighted_average_is_exact_and_keeps_dtypes():
    average = WeightedAverage()
    average.add({"x": torch.tensor([1.0, 2.0]), "h": torch.tensor([2.0], dtype=torch.bfloat16)}, 3)
    average.add({"x": torch.tensor([5.0, -2.0]), "h": torch.tensor([6.0], dtype=torch.bfloat16)}, 1)
    result = average.result()
    assert result["x"].tolist() == [2.0, 1.0] and result["h"].tolist() == [3.0]
    assert (result["x"].dtype, result["h"].dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_aggregation_streams(method):
    """No update is kept: what is alive after hundreds of them is bounded by the model."""
    made = get_method(method)
    layers = make_federation(method).server.layers
    average = made.aggregation()
    generator = torch.Generator().manual_seed(0)
    alive = []
    for _ in range(300):
        update = {"4.weight": torch.randn(3, 6, generator=generator)}
        for layer, (d_out, d_in) in layers.shapes.items():
            update[f"{layer}.lora_A"] = torch.randn(2, d_in, generator=generator)
            update[f"{layer}.lora_B"] = torch.randn(d_out, 2, generator=generator)
        alive += [weakref.ref(tensor) for tensor in update.values()]
        average.add(made.contribution(update, layers), 1)
        del update
    gc.collect()
    assert not any(reference() is not None for reference in alive)
    held = sum(t.numel() for t in _tensors(average))
    assert held <= 2 * (18 + sum(d_out * d_in + 2 * (d_out + d_in) for d_out, d_in in layers.shapes.values()))


def _tensors(value):
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for each in value.values() for t in _tensors(each)]
    if isinstance(value, list):
        return [t for each in value for t in _tensors(each)]
    return _tensors(vars(value)) if hasattr(value, "__dict__") else []


def test_an_average_refuses_what_does_not_belong_together():
    average = WeightedAverage()
    with pytest.raises(RuntimeError, match="at least one client"):
        average.result()
    average.add({"x": torch.zeros(2)}, 1)
    with pytest.raises(ValueError, match="these differ: x, y"):
        average.add({"y": torch.zeros(2)}, 1)
    with pytest.raises(ValueError, match="must be positive"):
        average.add({"x": torch.zeros(2)}, 0)
