"""A drawn batch that cannot be fetched was drawn: a loop that goes on without it is refused."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_dp import IsolationError, PrivacyEngine
from tests.models import WIDTH, assert_refuses, mlp

SIZE, BATCH = 40, 8


class Damaged(Dataset[Any]):
    """One example cannot be read, or is of a shape that does not stack."""

    def __init__(self, damage: str | None):
        self.damage = damage

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 7 and self.damage == "read":
            raise OSError("truncated image")
        if index == 7 and self.damage == "end":
            raise StopIteration
        if index == 7 and self.damage == "interrupt":
            self.damage = None
            raise KeyboardInterrupt
        width = WIDTH + 1 if index == 7 and self.damage == "stack" else WIDTH
        return torch.full((width,), index / SIZE), index % 3


def run(damage: str | None, workers: int = 0) -> tuple[Any, Any, Any]:
    model = mlp()
    return PrivacyEngine("rdp", reproducible_seed=0).make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=DataLoader(Damaged(damage), batch_size=BATCH, num_workers=workers),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


def train(model: Any, optimizer: Any, batches: Any) -> None:
    for x, y in batches:
        optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
        optimizer.step()
        optimizer.zero_grad()


REFUSED = r"A batch that the private loader drew \(\d+ examples\) could not be fetched \(\w+Error\) and was never"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        ("read", OSError, "truncated image"),
        ("end", RuntimeError, "StopIteration"),
        ("stack", RuntimeError, "stack expects each tensor|resize storage"),
    ],
)
def test_a_loop_that_goes_on_after_a_batch_that_could_not_be_fetched_is_refused(damage, error, words, workers):
    model, optimizer, loader = run(damage, workers)
    with pytest.raises(error, match=words):
        train(model, optimizer, loader.take(50))
    steps = optimizer.ledger.steps
    for _ in range(2):  # however often it is asked
        with pytest.raises(RuntimeError, match=REFUSED):
            train(model, optimizer, loader)
    assert_refuses(RuntimeError, "cannot be left out", optimizer.step_on_empty_batch)
    assert optimizer.ledger.steps == steps


def test_an_iteration_does_not_end_quietly_after_it():
    """Where the loop asks the same iterator again, as it does around a single next()."""
    model, optimizer, loader = run("read")
    batches = loader.take(50)
    with pytest.raises(OSError, match="truncated"):
        train(model, optimizer, batches)
    with pytest.raises(RuntimeError, match=f"{REFUSED}.*leave out what is no use by optimizer.step"):
        next(batches)


def test_the_very_first_batch_is_no_look_at_the_data():
    model, optimizer, loader = run("read")
    batches = iter(loader)
    with pytest.raises(OSError, match="truncated"):
        while True:
            next(batches)
            optimizer.batch._drawn.clear()
    assert_refuses(RuntimeError, "could not be fetched", lambda: next(iter(loader)))


def test_an_interrupted_batch_is_a_skipped_one():
    """Who interrupts need not do so for what an example holds, but nobody can tell: begin anew, with the ledger."""
    model, optimizer, loader = run("interrupt")
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, loader.take(50))
    for _ in range(2):
        assert_refuses(
            RuntimeError,
            "call make_private again to go on without it",
            partial(train, model, optimizer, loader.take(5)),
        )
    before = optimizer.ledger.steps
    engine = PrivacyEngine("rdp", reproducible_seed=0)
    engine.ledger.append(optimizer.event, before)
    _, optimizer, loader = engine.make_private(
        model=model,
        optimizer=optimizer.original_optimizer,
        data_loader=DataLoader(loader.dataset, batch_size=BATCH),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    train(model, optimizer, loader)
    assert engine.ledger.steps == before + len(loader)


def test_a_collate_function_that_was_refused_is_not_given_another_batch():
    """Else batches in which it happens not to join examples would be trained on, and the others left out."""
    model = mlp()

    def mixes(items: list[Any]) -> Tensor:
        x = torch.stack([x for x, _ in items])
        return x + x.roll(1, 0) if bool((x == 7 / SIZE).any()) else x

    _, _, loader = PrivacyEngine("rdp", reproducible_seed=0).make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=DataLoader(Damaged(None), batch_size=SIZE, collate_fn=mixes),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert_refuses(IsolationError, "The collate function joins examples", lambda: next(iter(loader)))
    assert_refuses(RuntimeError, "could not be fetched (IsolationError)", lambda: next(iter(loader)))


def test_who_seeds_between_batches_has_lost_none():
    """That is refused before anything is drawn, whatever the data hold."""
    model = mlp()
    engine = PrivacyEngine("rdp")
    _, optimizer, loader = engine.make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=DataLoader(Damaged(None), batch_size=BATCH),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    torch.manual_seed(0)
    assert_refuses(RuntimeError, "seeded", lambda: next(iter(loader)))
    engine.renew_randomness()
    train(model, optimizer, loader)
    assert optimizer.ledger.steps == len(loader)
