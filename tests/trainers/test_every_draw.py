"""Each draw of a private loader is an item, those of nobody too, until the budget is spent."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lora_dp import DPLinear, PrivacyEngine
from lora_dp.trainers.every_draw import EMPTY, EveryDraw


def draws(batch_size: int, size: int = 8, **budget: Any) -> tuple[DPLinear, EveryDraw, list[str]]:
    torch.manual_seed(0)
    model, engine, told = DPLinear(4, 2), PrivacyEngine(reproducible_seed=5), []
    options = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": DataLoader(torch.randn(size, 4), batch_size=batch_size),
        "max_grad_norm": 1.0,
    }
    if budget:
        _, optimizer, loader = engine.make_private_with_epsilon(**options, **budget)
    else:
        _, optimizer, loader = engine.make_private(**options, noise_multiplier=1.0)
    return model, EveryDraw(loader, optimizer, lambda: told.append("spent")), told


def follow(model: DPLinear, items: EveryDraw) -> list[int]:
    """Steps what is drawn; returns how many examples each had."""
    sizes = []
    for batch in items:
        sizes.append(0 if batch is EMPTY else len(batch))
        if batch is not EMPTY:
            items.optimizer.backward(model(batch).square().sum(1))
            items.optimizer.step()
    return sizes


def test_one_item_for_each_step() -> None:
    model, items, told = draws(batch_size=1, size=40)
    sizes = follow(model, items)
    assert len(sizes) == len(items) == items.optimizer.steps_taken == 40
    assert sizes.count(0) > 5  # about 40/e
    assert told == []


def test_what_is_left_of_a_pass() -> None:
    model, items, _ = draws(batch_size=2)
    assert len(items.after(3)) == 1
    assert len(follow(model, items.after(3))) == items.optimizer.steps_taken == 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_it_ends_when_the_budget_is_spent(batch_size: int) -> None:
    model, items, told = draws(batch_size, target_epsilon=4.0, target_delta=1e-3, steps=8 // batch_size)
    follow(model, items)
    assert told == []  # a run that ends as planned ends quietly
    assert follow(model, items) == []
    assert told == ["spent"]
    assert items.optimizer.steps_taken == 8 // batch_size
