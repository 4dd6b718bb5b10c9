"""A tiny model and its private training, for audits."""

import contextlib
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import LoRAConfig, PrivacyEngine, PrivateDataLoader, PrivateOptimizer, inject_lora
from lora_dp.isolation.check import check_isolation
from lora_dp.isolation.collation.trial import check_collation
from lora_dp.isolation.other_batches import FEW

Plant = Callable[[PrivateOptimizer, PrivateDataLoader], None]
EXAMPLES = 64


def private_model(
    *,
    noise_multiplier: float,
    batch_size: int = EXAMPLES,
    seed: int = 0,
    lr: float = 0.01,
    max_grad_norm: float = 1.0,
    model: nn.Module | None = None,
    **options: Any,
) -> tuple[nn.Module, PrivateOptimizer, PrivateDataLoader]:
    """1,479 trainable numbers, trained by SGD: an adapter of 512 + 512 and a head of 448 + 7."""
    torch.manual_seed(0)
    model = model or inject_lora(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 7)),
        LoRAConfig(r=8, alpha=8, target_modules=["0"], trainable_modules=["2"]),
    )
    inputs, targets = torch.randn(EXAMPLES, 64), torch.randint(0, 7, (EXAMPLES,))
    engine = PrivacyEngine(accountant="pld", reproducible_seed=seed)
    return engine.make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr),
        data_loader=DataLoader(TensorDataset(inputs, targets), batch_size=batch_size),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        **options,
    )


def train(
    model: nn.Module, optimizer: PrivateOptimizer, loader: PrivateDataLoader, steps: int, reduction: str = "mean"
) -> None:
    model.train()
    for inputs, targets in loader.take(steps):
        nn.functional.cross_entropy(model(inputs), targets, reduction=reduction).backward()
        optimizer.step()


def seeds(first: int) -> Iterator[int]:
    """Other noise and other batches in every run of one audit, the same in every run of the tests."""
    return count(10_000 * first)


def trials_that_are_made_once() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Each kind of batch is tried in the first run within this context; later runs have the same model and data.

    The trials take most of the time of a run as small as this one, and no audit looks at them.
    """
    passed: dict[tuple[bool, bool], Any] = {}
    varies: dict[bool, bool] = {}

    def isolation(model: nn.Module, args: Any, kwargs: Any, n: int, **options: Any) -> Any:
        kind = (n >= FEW, options["copies"])
        if kind not in passed:
            passed[kind] = check_isolation(model, args, kwargs, n, **options)
        return passed[kind]

    def collation(dataset: Any, collate: Any, drawn: list[int], batch: Any) -> bool:
        kind = len(drawn) >= FEW
        if kind not in varies:
            varies[kind] = check_collation(dataset, collate, drawn, batch)
        return varies[kind]

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lora_dp.engine.hooks.check_isolation", isolation)
            patch.setattr("lora_dp.engine.data_loader.check_collation", collation)
            yield

    return context


def training(steps: int, first_seed: int = 0, **options: Any) -> Callable[[Plant], None]:
    """A training function for gradient canaries; at lr = 0 its runs share one model, which saves time."""
    fresh, tried = seeds(first_seed), trials_that_are_made_once()
    shared = private_model(**options)[0] if options.get("lr") == 0 else None

    def train_fn(plant: Plant) -> None:
        model, optimizer, loader = private_model(seed=next(fresh), model=shared, **options)
        plant(optimizer, loader)
        with tried():
            train(model, optimizer, loader, steps)

    return train_fn
