"""The round loop against the number of clients: its time, what idle clients hold, and what it adds to training.

The model is tiny and random, so that the loop is as large a part of a round as it can be; the last benchmark takes the
default run's model and settings.
"""

import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.memory import peak_bytes
from lora_dp.fed.config import RunConfig
from lora_dp.fed.data.examples import ImageExamples
from lora_dp.fed.methods import factor, get_method
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.engines import Engine
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.ledgers import LOG, AheadLog
from lora_dp.fed.rounds.local_engine import LocalEngine
from lora_dp.fed.rounds.local_training import LocalTraining
from lora_dp.fed.rounds.messages import Reply, Task, Update, Workspace
from lora_dp.fed.rounds.privacy_plan import PrivacyPlan
from lora_dp.fed.rounds.setup import open_job
from lora_dp.nn.layers import DPLinear
from lora_dp.nn.lora_linear import DPLoRALinear

CLIENTS = [10, 100, 1_000, 10_000]
EXAMPLES = 32
WIDTH, RANK = 64, 4


class Prepared:
    """An engine whose clients have always done their work already: what is left is the loop alone."""

    def __init__(self, update: dict[str, Tensor]) -> None:
        self._update = update

    def train(self, tasks: Iterable[tuple[int, Task]], on_step: Callable[[], None]) -> Iterator[Reply]:
        for client, _ in tasks:
            yield Reply(client, Update({name: tensor.clone() for name, tensor in self._update.items()}, EXAMPLES))


class Bare(Trainer):
    """A trainer that keeps the time of its turns."""

    seconds: list[float] = []

    def train(self, *args: Any, **kwargs: Any) -> Update:
        start = time.perf_counter()
        update = super().train(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)
        return update


def _trainer(clients: int) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        DPLoRALinear(WIDTH, WIDTH, r=RANK),
        nn.ReLU(),
        DPLoRALinear(WIDTH, WIDTH, r=RANK),
        nn.ReLU(),
        DPLinear.from_linear(nn.Linear(WIDTH, 10)),
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("5.") or factor(name) is not None)
    training = LocalTraining("sgd", 0.1, 1.0, None, 0.0, EXAMPLES // 2, local_steps=2)
    method = get_method("la-lora")
    plan = PrivacyPlan(
        8.0,
        1e-5,
        "rdp",
        "example",
        "server",
        1.0,
        1.0,
        "flat",
        EXAMPLES // 2,
        2,
        method.turns,
        10**4,
        10**4,
        1.0,
        clients,
    )
    return Trainer(Workspace(model), method, training, plan, seed=0)


def _examples() -> ImageExamples:
    pixels = torch.randint(0, 256, (EXAMPLES, 1, 8, 8), dtype=torch.uint8)
    return ImageExamples(pixels, torch.randint(0, 10, (EXAMPLES,)), (0.5,), (0.5,))


def _federation(clients: int, folder: Path, trained: bool = False) -> Federation:
    trainer, examples = _trainer(clients), _examples()
    engine: Engine = LocalEngine(trainer, [examples] * clients)
    if not trained:
        task = Task(0, 0, RANK, trainer.workspace.state())
        engine = Prepared(trainer.train(0, examples, task).tensors)
    federation = Federation(trainer, engine, [EXAMPLES] * clients, examples)
    federation.log = AheadLog(folder / LOG)
    return federation


def _idle_bytes(clients: int) -> int:
    """What Python and NumPy hold for a federation; tensors are those of the model and the global state, whatever the
    number of clients."""
    trainer, examples, sizes = _trainer(clients), _examples(), [EXAMPLES] * clients
    engine = Prepared({})
    Federation(trainer, engine, [EXAMPLES], examples)  # what is found once for all
    gc.collect()
    tracemalloc.start()
    try:
        federation = Federation(trainer, engine, sizes, examples)
        held, _ = tracemalloc.get_traced_memory()
        del federation
        return held
    finally:
        tracemalloc.stop()


@pytest.fixture(autouse=True)
def on_a_cpu(device: str) -> None:
    if device != "cpu":
        pytest.skip("the loop runs on a CPU")


@pytest.mark.parametrize("clients", CLIENTS)
def test_loop(clients: int, rounds: int, tmp_path: Path, benchmark: Any) -> None:
    federation = _federation(clients, tmp_path)
    benchmark.group = "round of the loop alone"
    benchmark.pedantic(federation.run_round, kwargs={"evaluate": False}, rounds=rounds, warmup_rounds=1)
    idle = _idle_bytes(clients)
    peak = peak_bytes(lambda: federation.run_round(evaluate=False), "cpu")
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(
        federation="loop", clients=clients, idle_bytes=idle, peak_bytes=peak, threads=torch.get_num_threads()
    )
    print(
        f"\n{clients} clients: {median * 1e3:.2f} ms a round, {median / clients * 1e6:.0f} µs a client; idle "
        f"{idle / 1e3:.1f} kB, {idle / clients:.0f} B a client; tensors at most {peak / 1e3:.1f} kB in a round"
    )


@pytest.mark.parametrize("clients", CLIENTS)
def test_training(clients: int, rounds: int, tmp_path: Path, benchmark: Any) -> None:
    federation = _federation(clients, tmp_path, trained=True)
    benchmark.group = "round with training"
    benchmark.pedantic(
        federation.run_round,
        kwargs={"evaluate": False},
        rounds=max(1, min(rounds, 2_000 // clients)),
        warmup_rounds=int(clients <= 100),
    )
    # Not of the largest: the profiler keeps each allocation.
    peak = peak_bytes(lambda: federation.run_round(evaluate=False), "cpu") if clients <= 1_000 else None
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(
        federation="training", clients=clients, peak_bytes=peak, threads=torch.get_num_threads()
    )
    tensors = "" if peak is None else f"; tensors at most {peak / 1e3:.1f} kB"
    print(f"\n{clients} clients: {median:.3f} s a round, {median / clients * 1e3:.2f} ms a client{tensors}")


def test_overhead(rounds: int, tmp_path: Path, benchmark: Any) -> None:
    """The default run with 100 clients: all of a round but the turns of its clients, against these turns."""
    config = RunConfig.from_flat({"clients": 100, "device": "cpu"})
    job = open_job(config)
    bare = Bare(**vars(job.trainer))
    federation = Federation(
        bare, LocalEngine(bare, [job.examples(client) for client in range(100)]), job.sizes, job.validation
    )
    federation.log = AheadLog(tmp_path / LOG)
    inside: list[float] = []

    def noted() -> None:
        Bare.seconds.clear()
        federation.run_round(evaluate=False)
        inside.append(sum(Bare.seconds))

    benchmark.group = "overhead at 100 clients"
    benchmark.pedantic(noted, rounds=min(rounds, 3), warmup_rounds=1)
    whole = benchmark.stats.stats.data
    overheads = [a / b - 1 for a, b in zip(whole, inside[-len(whole) :], strict=True)]
    overhead = statistics.median(overheads)
    benchmark.extra_info.update(federation="overhead", clients=100, overhead=overhead, threads=torch.get_num_threads())
    print(
        f"\n100 clients, default run: {statistics.median(whole):.2f} s a round, of which the loop takes "
        f"{overhead:.2%} of the training ({min(overheads):.2%} to {max(overheads):.2%})"
    )
    assert overhead <= 0.02
