"""Replies that break on their way from a client to the server."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.messages import Reply, Task, Update

Break = Callable[[Update, int], Reply | None]


def change(tensors: Callable[[dict[str, Tensor]], Any]) -> Callable[[Update, int], Reply]:
    return lambda update, client: Reply(client, replace(update, tensors=tensors(dict(update.tensors))))


def one(new: Callable[[Tensor], Any], name: str = "4.weight") -> Callable[[Update, int], Reply]:
    return change(lambda tensors: {**tensors, name: new(tensors[name])})


def put(value: float) -> Callable[[Tensor], Tensor]:
    """One number of a tensor replaced."""

    def changed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[1] = value
        return tensor

    return changed


# What a client does wrong, and what is said of it.
FAULTS: dict[str, tuple[Break, str]] = {
    "NaN": (one(put(math.nan)), "sent values that are not finite"),
    "infinity": (one(put(-math.inf)), "sent values that are not finite"),
    "overflow": (one(put(1e200)), "sent values that are not finite|sent a change of norm"),
    "absurd norm": (one(lambda tensor: tensor + 1e3), "sent a change of norm .*, above 100[0-9.]+"),
    "shape": (one(lambda tensor: tensor.t().contiguous()), r"sent 4.weight with shape \(6, 3\) for \(3, 6\)"),
    "scalar": (one(lambda tensor: tensor.sum()), r"sent 4.weight with shape \(\) for"),
    "no tensor": (one(lambda tensor: tensor.tolist()), "sent 4.weight with shape"),
    "dtype": (one(lambda tensor: tensor.half()), "sent 4.weight as torch.float16"),
    "integers": (one(lambda tensor: tensor.long()), "sent 4.weight as torch.int64"),
    "complex": (one(lambda tensor: tensor.to(torch.complex128)), "sent 4.weight as torch.complex128"),
    "name missing": (
        change(lambda tensors: {n: t for n, t in tensors.items() if n != "4.bias"}),
        "sent other tensors than were asked for: 4.bias",
    ),
    "name added": (change(lambda tensors: {**tensors, "4.extra": torch.zeros(2)}), "sent other tensors .*: 4.extra"),
    "name of another kind": (change(lambda tensors: {**tensors, 7: torch.zeros(2)}), "sent other tensors .*: 7"),
    "no tensors": (change(lambda tensors: None), "sent nothing"),
    "no names": (change(lambda tensors: {}), "sent other tensors"),
    "nothing": (lambda update, client: Reply(client, None), "sent nothing"),
    "something else": (lambda update, client: Reply(client, "an update"), "sent nothing"),  # type: ignore[arg-type]
    "no reply": (lambda update, client: None, "sent nothing"),
    "failure": (lambda update, client: Reply(client, None, "raised OSError", "disk full"), "raised OSError"),
}


class Breaking:
    """An engine beneath which some replies break on their way; ``turn`` None is every turn."""

    def __init__(self, engine: Any, broken: dict[int, Break], turn: int | None = None):
        self.engine, self.broken, self.turn = engine, broken, turn
        self.asked: list[tuple[int, int, int]] = []

    def train(self, tasks: Iterable[tuple[int, Task]], on_step: Callable[[], None]) -> Iterator[Reply]:
        turns: dict[int, int] = {}

        def noted() -> Iterator[tuple[int, Task]]:
            for client, task in tasks:
                turns[client] = task.turn
                self.asked.append((task.round, task.turn, client))
                yield client, task

        for reply in self.engine.train(noted(), on_step):
            if reply.client in self.broken and self.turn in (None, turns[reply.client]):
                assert reply.update is not None
                broken = self.broken[reply.client](reply.update, reply.client)
                if broken is not None:
                    yield broken
            else:
                yield reply


def breaking(federation: Federation, broken: dict[int, Any], turn: int | None = None) -> Breaking:
    federation.engine = Breaking(federation.engine, broken, turn)
    return federation.engine


def interrupt_before_round(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C as that round, from 1, is about to begin."""
    run_round = Federation.run_round

    def interrupted(federation: Federation, *arguments: Any, **named: Any) -> Any:
        if federation.rounds_done + 1 == number:
            raise KeyboardInterrupt
        return run_round(federation, *arguments, **named)

    monkeypatch.setattr(Federation, "run_round", interrupted)
