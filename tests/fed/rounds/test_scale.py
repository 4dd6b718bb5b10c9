"""What clients cost the server: while they wait, nothing but some numbers; while they are combined, no more for many
than for few."""

import functools
import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.messages import Reply, Task, Update
from tests.fed.small import make_examples, make_federation

SERVER: dict[str, Any] = {"unit": "client", "noise_by": "server", "delta": 0.01, "weighting": "equal", "epsilon": 8.0}


class Prepared:
    """An engine whose clients answer at once, with fresh tensors; it notes how many answers are alive."""

    def __init__(self, federation: Federation) -> None:
        self.method = federation.method
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0

    def train(self, tasks: Iterable[tuple[int, Task]], on_step: Callable[[], None]) -> Iterator[Reply]:
        for client, task in tasks:
            tensors = {
                name: tensor + 0.01 * (client % 7)
                for name, tensor in task.state.items()
                if not name.endswith(".merged") and self.method.trains(name, task.round, task.turn)
            }
            self.alive.add(tensors["4.weight"])
            self.most = max(self.most, len(self.alive))
            yield Reply(client, Update(tensors))


def federation_of(clients: int, method: str, **options: Any) -> Federation:
    federation = make_federation(method, sizes=[12] * clients, **options)
    federation.engine = Prepared(federation)
    return federation


def peak(call: Callable[[], Any]) -> int:
    """Most bytes that tensors held at once, above those before; from the allocations that torch's profiler sees."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = most = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {}) for method in ("la-lora", "deer", "flora", "flexlora", "lora-fair", "galore")),
        ("dp-lora", SERVER),
        ("flora", SERVER),
    ],
    ids=lambda value: value if isinstance(value, str) else "server noise" if value else "plain",
)
def test_combining_many_clients_takes_no_more_memory_than_a_few(method, options):
    """Their tensors are added up one by one; stacks of low rank are, too, once they are larger than the matrix.

    Both are more clients than the record of updates keeps.
    """
    peaks = {}
    for clients in (40, 120):
        federation = federation_of(clients, method, **options)
        federation.run_round(range(clients))  # what is made once
        peaks[clients] = peak(functools.partial(federation.run_round, range(clients), evaluate=False))
        engine = federation.engine
        assert isinstance(engine, Prepared)
        # The one that has just come, and the one before it.
        assert 1 <= engine.most <= 2
    assert peaks[120] <= peaks[40] * 1.05


@pytest.mark.slow
def test_an_idle_client_is_a_few_numbers():
    """Size, count, rank, and what it has seen: no tensors, no adapters."""
    traced = {}
    for clients in (100, 10_100):
        template = make_federation("la-lora", epsilon=None)
        sizes = [12] * clients
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        federation = Federation(template.trainer, template.engine, sizes, make_examples(5, 99))
        traced[clients] = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert len(federation.server.state) == len(template.server.state)
    assert (traced[10_100] - traced[100]) / 10_000 <= 64


@pytest.mark.slow
def test_ten_thousand_clients_of_which_a_few_are_drawn():
    """A round's time goes with those who take part: no list of tasks, no state is made for the others."""
    federation = make_federation("la-lora", sizes=[12] * 10_000, epsilon=None)
    federation.engine = engine = Prepared(federation)
    federation._per_round = 5
    result = federation.run_round()
    assert result.participants is not None and len(result.participants) == 5
    assert engine.most <= 2 and (federation.seen >= 0).sum() == 5
