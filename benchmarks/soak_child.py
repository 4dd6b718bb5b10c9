"""One process of a soaked run: plants faulty clients and its own death, and writes down what truly leaves a client."""

import dataclasses
import hashlib
import io
import json
import math
import os
import random
import resource
import signal
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lora_dp.errors import TooFewClients
from lora_dp.fed import launch
from lora_dp.fed.config import RunConfig
from lora_dp.fed.rounds import client, federation, local_engine, server_noise
from lora_dp.fed.rounds.client import Trainer
from lora_dp.fed.rounds.messages import Task, Update
from lora_dp.fed.rounds.server_noise import NoisySum
from lora_dp.fed.runs import loop

DONE, ERROR, TOO_FEW = 0, 2, 3
FAULTS = ("raises", "hangs", "sends NaN", "sends other shapes", "sends an absurd norm", "sends nothing")


def planned_fault(seed: int, number: int, clients: int, turns: int) -> tuple[int, int, str] | None:
    """The client that fails in round ``number`` (from 1), its turn and how; the same in every process of a run."""
    rng = random.Random(f"{seed} {number}")
    return (rng.randrange(clients), rng.randrange(turns), rng.choice(FAULTS)) if rng.random() < 0.5 else None


class Record:
    """What leaves a client, a line each, on the disk before it has left; the library's ledger has no part in it."""

    def __init__(self, path: Path, process: int) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._process = process
        self._fsync = os.fsync  # the one without a planted death

    def add(self, tensors: Mapping[str, Tensor], **what: Any) -> None:
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        entry = {"process": self._process, **what, "digest": digest.hexdigest(), "peak": peak}
        os.write(self._file, (json.dumps(entry) + "\n").encode())
        self._fsync(self._file)


def _spoiled(update: Update, kind: str) -> Any:
    name, tensor = next(iter(update.tensors.items()))
    broken: dict[str, Callable[[], Any]] = {
        "sends NaN": lambda: torch.full_like(tensor, math.nan),
        "sends other shapes": lambda: tensor.flatten()[1:],
        "sends an absurd norm": lambda: tensor + 1e6,
    }
    return None if kind == "sends nothing" else Update({**update.tensors, name: broken[kind]()})


def _is_alone(folder: Path) -> bool:
    """Whether the round that has begun has one client only, the others' budgets being spent: then no fault is planted,
    since a run without any client stops, as it should, each time that it is resumed."""
    return len(json.loads((folder / "ledger.jsonl").read_text().splitlines()[-1])["clients"]) == 1


def _plant_clients(job: dict[str, Any], record: Record) -> None:
    """Every turn is recorded as its update leaves; some clients fail."""
    train, mechanism = Trainer.train, client.client_mechanism
    clock = SimpleNamespace(now=0.0)
    # A clock that only a planted hang moves: no honest client is late on a busy machine.
    local_engine.time = SimpleNamespace(monotonic=lambda: clock.now)  # type: ignore[assignment]
    noise: list[float] = []

    def noted(plan: Any, multiplier: float, source: Any) -> Any:
        noise.append(multiplier)
        return mechanism(plan, multiplier, source)

    def soaked(trainer: Trainer, who: int, examples: Any, task: Task, on_step: Callable[[], None]) -> Any:
        if job["outage"] is not None and task.round + 1 >= job["outage"]:
            raise OSError("planted: nobody can be reached")
        fault = planned_fault(job["seed"], task.round + 1, job["options"]["clients"], trainer.method.turns)
        struck = fault is not None and fault[:2] == (who, task.turn) and not _is_alone(Path(job["folder"]))
        kind = fault[2] if fault is not None and struck else None
        seen: list[Any] = []

        def step() -> None:
            clock.now += 1e6 if kind == "hangs" else 0.0
            on_step()

        noise.clear()
        spy = dataclasses.replace(trainer, on_turn=lambda _, optimizer, batches: seen.extend((optimizer, batches)))
        update = train(spy, who, examples, task, step)
        optimizer, batches = seen
        by_example, by_client = trainer.plan.examples_are_protected, trainer.plan.client_adds_noise
        if by_example or by_client:
            record.add(
                update.tensors,
                round=task.round + 1,
                turn=task.turn,
                client=who,
                steps=optimizer.steps_taken - task.round * trainer.training.local_steps if by_example else 1,
                sigma=optimizer.mechanism.noise_multiplier if by_example else noise[-1],
                rate=batches.sample_rate if by_example else 1.0,
            )
        if kind == "raises":
            raise OSError("planted")
        return update if kind is None else _spoiled(update, kind)

    class RecordedSum(NoisySum):
        """The server's own noise, recorded likewise."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._place = args[-2:]

        def result(self, source: Any) -> Any:
            mean = super().result(source)
            index, turn = self._place
            record.add(mean, round=index + 1, turn=turn, client="all", steps=1, sigma=noise[-1], rate=job["rate"])
            return mean

    client.client_mechanism = server_noise.client_mechanism = noted
    Trainer.train, federation.NoisySum = soaked, RecordedSum  # type: ignore[assignment, method-assign, misc]


def _plant_death(count: int) -> None:
    """SIGKILL at the ``count``-th time that a file reaches the disk or takes another's place; odd ones before it."""
    left = [count]

    def fatal(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and count % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            function(*args)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return called

    os.fsync, os.replace = fatal(os.fsync), fatal(os.replace)  # type: ignore[assignment]


def work(job: dict[str, Any], errors: int) -> int:
    """Begins the run of a folder, or goes on with it; returns the status to exit with, the error's text in ``errors``.

    Args:
        job: ``folder`` and ``record`` (paths), ``process`` (its number), ``options`` (of the run), ``rate`` (of
            clients), ``seed`` (of the faults), ``outage`` (round from which nobody can be reached, or None),
            ``dies_at`` (the write that is the last, or None), ``draws`` (whether the curves are drawn).
        errors: a file descriptor.
    """
    folder = Path(job["folder"])
    tempfile.tempdir = str(folder.with_name("temporary"))
    _plant_clients(job, Record(Path(job["record"]), job["process"]))
    if job["dies_at"] is not None:
        _plant_death(job["dies_at"])
    if not job["draws"]:  # drawing takes longer than all the rest
        loop.draw_curves = lambda results, config, path: path.touch()  # type: ignore[assignment]
    console = Console(file=io.StringIO())
    try:
        if (folder / "config.yaml").exists():
            launch.resume(folder, console)
        else:
            launch.run(RunConfig.from_flat({**job["options"], "output": folder}), console)
    except TooFewClients:
        return TOO_FEW
    except BaseException as error:
        os.write(errors, f"{type(error).__name__}: {error}".encode()[:4000])
        return ERROR
    return DONE
