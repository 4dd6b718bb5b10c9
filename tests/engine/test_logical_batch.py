"""A drawn batch that went through the model waits for its step, the first and the last one too."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_dp import IsolationError, PrivacyEngine, PrivateOptimizer
from lora_dp.engine.hooks import ModelHooks
from tests.models import assert_refuses, private_run, seeded

NEVER, WAITS = "was never stepped", "went through the model and waits for its step"


def broken() -> tuple[nn.Module, PrivateOptimizer, Any]:
    """One of its examples is damaged: every batch of all examples has a loss of NaN."""
    model, optimizer, loader = private_run(seeded(), size=8, batch_size=8)
    loader.dataset.tensors[0][3] = torch.nan
    return model, optimizer, loader


def losses(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def skipping(model: nn.Module, optimizer: PrivateOptimizer, loader: Any, steps: int, zero: bool = True) -> None:
    """A loop that leaves out what has no finite loss, and asks for an iterator at every step."""
    for _ in range(steps):
        x, y = next(iter(loader))
        found = losses(model, x, y)
        if not torch.isfinite(found).all():
            if zero:
                optimizer.zero_grad()
            continue
        optimizer.backward(found)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("zero", [True, False])
def test_the_very_first_batch_is_not_skipped_for_its_loss(zero: bool) -> None:
    model, optimizer, loader = broken()
    assert_refuses(RuntimeError, NEVER, lambda: skipping(model, optimizer, loader, 3, zero))
    assert_refuses(RuntimeError, NEVER, lambda: skipping(model, optimizer, loader, 1, zero))
    assert optimizer.ledger.steps == 0


def test_nor_for_its_gradients() -> None:
    """Nor where it is a micro-batch that was added up already."""
    for micro in (False, True):
        model, optimizer, loader = broken()
        x, y = next(iter(loader))
        optimizer.backward(losses(model, x, y))
        if micro:
            optimizer.signal_skip_step()
            optimizer.step()
        else:
            optimizer.zero_grad()
        assert_refuses(RuntimeError, NEVER, lambda loader=loader: next(iter(loader)))


def test_nor_for_what_a_trial_found_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop may pass over the refusal of one batch, and go on with another."""

    def refuse(*_: Any) -> bool:
        raise IsolationError("Examples meet.")

    model, _, loader = private_run(seeded())
    with monkeypatch.context() as patch:
        patch.setattr(ModelHooks, "_test", refuse)
        assert_refuses(IsolationError, "Examples meet.", lambda: losses(model, *next(iter(loader))))
    assert_refuses(RuntimeError, NEVER, lambda: next(iter(loader)))


def evaluate(engine: PrivacyEngine, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    model.eval()
    losses(model, x, y)
    model.train()


def without_gradients(engine: PrivacyEngine, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    with torch.no_grad():
        losses(model, x, y)


def prove(engine: PrivacyEngine, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    engine.check_isolation(model, (x, y), F.cross_entropy)


@pytest.mark.parametrize("look", [evaluate, without_gradients, prove])
def test_other_forwards_are_a_look(look: Callable[..., None]) -> None:
    """A second look is refused as ever."""
    engine = seeded()
    model, optimizer, loader = private_run(engine)
    look(engine, model, *next(iter(loader)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine.get_epsilon(1e-3) == 0
    look(engine, model, *next(iter(loader)))
    assert_refuses(RuntimeError, NEVER, lambda: next(iter(loader)))
    assert optimizer.ledger.steps == 0


def test_what_was_given_before_a_batch_was_drawn_is_not_that_batch() -> None:
    engine = seeded()
    model, _, loader = private_run(engine)
    losses(model, torch.zeros(2, 6), torch.zeros(2).long())
    next(iter(loader))
    next(iter(loader))  # still the one look
    assert_refuses(RuntimeError, NEVER, lambda: next(iter(loader)))


def test_who_was_refused_before_any_forward_may_not_begin_anew() -> None:
    _, optimizer, loader = private_run(seeded())
    batches = iter(loader)
    next(batches)
    assert_refuses(RuntimeError, NEVER, lambda: next(batches))
    for _ in range(2):
        assert_refuses(RuntimeError, NEVER, lambda: next(iter(loader)))
    assert optimizer.ledger.steps == 0


def waits(read: Callable[[], Any]) -> bool:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        read()
    assert all(WAITS in str(warning.message) and warning.filename == __file__ for warning in seen)
    return bool(seen)


@pytest.mark.parametrize("read", [lambda engine: engine.get_epsilon(1e-3), lambda engine: engine.state_dict()])
def test_what_is_read_of_the_account_says_that_a_batch_waits(read: Callable[[PrivacyEngine], Any]) -> None:
    engine = seeded()
    model, optimizer, loader = private_run(engine)
    batches = loader.take(2)
    for _ in range(2):
        x, y = next(batches)
        assert not waits(lambda: read(engine))  # where many loops print ε
        found = losses(model, x, y)
        assert waits(lambda: read(engine))
        optimizer.backward(found)
        optimizer.signal_skip_step()
        optimizer.step()
        assert waits(lambda: read(engine))
        optimizer.zero_grad()
        optimizer.release()
        assert not waits(lambda: read(engine))
    assert optimizer.ledger.steps == 2


def trained_but_for_the_last(engine: PrivacyEngine) -> None:
    model, optimizer, loader = private_run(engine)
    batches: Iterator[Any] = loader.take(2)
    x, y = next(batches)
    optimizer.backward(losses(model, x, y))
    optimizer.step()
    losses(model, *next(batches))


def test_the_last_batch_that_was_left_out_is_told_of_when_its_optimizer_is_gone() -> None:
    """Also where another optimizer of the same engine goes on, and in a copy of the engine."""
    engine = seeded()
    trained_but_for_the_last(engine)
    private_run(engine)
    assert engine.ledger.steps == 1
    assert waits(lambda: engine.get_epsilon(1e-3)) and waits(lambda: copy.deepcopy(engine).get_epsilon(1e-3))


def test_a_batch_that_was_refused_waits_no_more() -> None:
    engine = seeded()
    model, _, loader = private_run(engine)
    losses(model, *next(iter(loader)))
    assert_refuses(RuntimeError, "call make_private again to go on without it", lambda: next(iter(loader)))
    assert not waits(lambda: engine.get_epsilon(1e-3))


def test_what_another_optimizer_of_the_model_is_given_is_not_its_batch() -> None:
    engine = seeded()
    model, first, loader = private_run(engine)
    x, y = next(iter(loader))
    trained = [p for p in model.parameters() if p.requires_grad]
    _, second, others = engine.make_private(
        model=model,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        data_loader=torch.utils.data.DataLoader(loader.dataset, batch_size=8),
    )
    x, y = next(iter(others))
    second.backward(losses(model, x, y))
    second.step()
    assert not waits(lambda: engine.get_epsilon(1e-3))
    first.activate()
    x, y = next(iter(loader))  # its first was looked at
    found = losses(model, x, y)
    assert waits(lambda: engine.get_epsilon(1e-3))
    first.backward(found)
    first.step()
    assert not waits(lambda: engine.get_epsilon(1e-3)) and engine.ledger.steps == 2
