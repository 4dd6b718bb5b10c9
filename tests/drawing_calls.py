"""Calls of every op that draws on a CPU, and the state of a forward pass and of a seed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from lora_dp.privacy import secret_state
from tests.drawing_ops import drawing

DRAWING = drawing()
REFUSED = "seeds a generator inside its forward"


class Optimizer:
    """A private one, as far as it says that its randomness is secret."""

    mechanism = SimpleNamespace(source=SimpleNamespace(secure=True))


@contextmanager
def forward() -> Iterator[None]:
    """A training forward runs."""
    optimizer = Optimizer()
    secret_state.forward_begins(optimizer)
    try:
        yield
    finally:
        secret_state.forward_ends(optimizer)


@contextmanager
def seeded(seed: int = 7) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def moves(draw: Callable[[], Any], generator: torch.Generator) -> bool:
    """Whether a call takes something from a generator."""
    before = generator.get_state()
    draw()
    return not torch.equal(before, generator.get_state())
