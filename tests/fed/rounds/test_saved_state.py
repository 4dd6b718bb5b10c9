"""A federation as a checkpoint holds it goes on to the same bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lora_dp.errors import TooFewClients
from lora_dp.fed.rounds.saved_state import checkpoint, restore
from tests.fed.rounds.same_state import same
from tests.fed.rounds.told_clients import begun, failing
from tests.fed.small import PLAIN, make_federation

KINDS = [("average", "none"), ("momentum", "tail"), ("adam", "ema")]


@pytest.mark.parametrize(("optimizer", "averaging"), KINDS)
def test_it_goes_on_where_it_was(optimizer, averaging):
    training = replace(PLAIN, local_steps=1, server_optimizer=optimizer, averaging=averaging, server_learning_rate=0.5)
    whole, before, after = (make_federation("rolora", training) for _ in range(3))
    for federation in (whole, whole, before, before):
        federation.run_round(evaluate=False)
    tensors, numbers = checkpoint(before)
    restore(after, {name: tensor.clone() for name, tensor in tensors.items()}, numbers)
    assert after.rounds_done == 2 and np.array_equal(after.seen, before.seen)
    assert after.optimizer.steps == before.optimizer.steps and after.average.count == before.average.count
    for federation in (whole, after):
        for _ in range(2):
            federation.run_round(evaluate=False)
        federation.load_global_state()
    same(whole, after)
    assert all(whole.workspace.state()[name].equal(tensor) for name, tensor in after.workspace.state().items())
    assert (
        whole.average.held.keys()
        == after.average.held.keys()
        == (whole.server.state.keys() if averaging != "none" else set())
    )


def test_a_checkpoint_of_a_version_without_optimizers_is_read():
    one, other = make_federation("dp-lora", PLAIN), make_federation("dp-lora", PLAIN)
    one.run_round(evaluate=False)
    tensors, numbers = checkpoint(one)
    assert tensors.keys() == one.server.state.keys()
    del numbers["optimizer"], numbers["averaged"]
    restore(other, tensors, numbers)
    same(one, other)


def test_another_models_is_refused():
    one, other = make_federation("dp-lora", PLAIN), make_federation("dp-lora", PLAIN, r=3)
    with pytest.raises(ValueError):
        restore(other, *checkpoint(one))


@pytest.mark.parametrize(("optimizer", "averaging"), KINDS)
def test_a_round_that_does_not_end_moves_neither_moments_nor_averages(optimizer, averaging):
    training = replace(PLAIN, server_optimizer=optimizer, averaging=averaging)
    federation = begun(training=training, answers={0: 1.0, 1: 1.0}, min_clients=2)
    federation.run_round()
    tensors, numbers = checkpoint(federation)
    federation.engine.answers[1] = failing(1)
    with pytest.raises(TooFewClients):
        federation.run_round()
    again, after = checkpoint(federation)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert {**after, "seen": None} == {**numbers, "seen": None}
