"""Clients that raise, stall or mix examples, in the engine of one process."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from lora_dp.errors import IsolationError
from lora_dp.fed.rounds.local_engine import LocalEngine
from lora_dp.fed.rounds.messages import Reply, Update
from tests.fed.breaking import breaking
from tests.fed.rounds.same_state import same
from tests.fed.small import Doubles, make_examples, make_federation


class Falling(Doubles):
    """Examples that cannot be read any more after some batches."""

    def __init__(self, examples: Doubles, batches: int) -> None:
        self.__dict__.update(examples.__dict__)
        self.left = batches

    def batch(self, indices: Any) -> dict[str, Tensor]:
        self.left -= 1
        if self.left < 0:
            raise OSError("cannot read the photograph of Jane")
        return super().batch(indices)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["la-lora", "dp-lora", "deer", "flat-lora", "flora"])
@pytest.mark.parametrize("batches", [0, 2])
def test_a_client_that_raises_leaves_nothing_behind_in_the_model(method, batches):
    """The next client starts as it would have without it: phases, gradients, perturbations, random numbers."""
    federation, others = make_federation(method), make_federation(method)
    engine = federation.engine
    assert isinstance(engine, LocalEngine)
    engine.parts = [Falling(make_examples(12, 0), batches), *engine.parts[1:]]
    result = federation.run_round()
    others.run_round()
    # It answers as any other, and nobody is told; the others' updates are those of a round in which it did not fail.
    assert result.participants == [0, 1, 2] and result.failed == []
    again, expected = make_federation(method), make_federation(method)
    task = {rank: again.server.task(0, 0, rank) for rank in set(again.ranks)}[again.ranks[0]]
    again.trainer.train(0, Falling(make_examples(12, 0), batches), task)
    for client in (1, 2):
        found = again.trainer.train(client, engine.parts[client], task).tensors
        wanted = expected.trainer.train(client, engine.parts[client], task).tensors
        assert all(tensor.equal(wanted[name]) for name, tensor in found.items())


@pytest.mark.slow
def test_a_client_that_takes_too_long(monkeypatch):
    """Ten seconds a batch, and 15 are allowed: it is told after the second."""
    now, steps = 0.0, 0

    class Slow(Doubles):
        def batch(self, indices: Any) -> dict[str, Tensor]:
            nonlocal now
            now += 10
            return super().batch(indices)

    def on_step() -> None:
        nonlocal steps
        steps += 1

    monkeypatch.setattr("lora_dp.fed.rounds.local_engine.time", SimpleNamespace(monotonic=lambda: now))
    federation, others = make_federation("dp-lora"), make_federation("dp-lora")
    engine = federation.engine
    assert isinstance(engine, LocalEngine)
    slow = Slow.__new__(Slow)
    slow.__dict__.update(engine.parts[1].__dict__)
    engine.parts, engine.timeout = [engine.parts[0], slow, engine.parts[2]], 15
    result = federation.run_round(on_step=on_step)
    assert result.failed == [{"client": 1, "reason": "gave no answer within 15 s"}]
    assert (now, steps) == (20, 7)
    others.run_round([0, 2])
    same(federation, others)


def test_a_model_that_mixes_examples_stops_the_run():
    """That is no accident of one client: nobody's privacy could be kept."""
    federation = make_federation("dp-lora")

    def mixed(update: Update, client: int) -> Reply:
        raise IsolationError("the model mixes examples")

    breaking(federation, {0: mixed})
    with pytest.raises(IsolationError):
        federation.run_round()
    assert federation.rounds_done == 0
