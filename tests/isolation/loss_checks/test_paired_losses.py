"""Losses in which each example meets something of all others that has no gradient: keys, labels."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError, PrivacyEngine
from tests.models import assert_refuses
from tests.support import make_private

N, CLASSES = 7, 5
PAIRED = "pair each example with all others"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# Of outputs (N, 5), labels (N,) and keys (N, 5).
MEETING: dict[str, Loss] = {
    "product": lambda o, y, k: F.cross_entropy(o @ k.T, torch.arange(len(o)), reduction="none"),
    "product, other way round": lambda o, y, k: F.cross_entropy((k @ o.T).T, torch.arange(len(o)), reduction="none"),
    "einsum": lambda o, y, k: F.cross_entropy(torch.einsum("id,jd->ij", o, k), torch.arange(len(o)), reduction="none"),
    "with a bias": lambda o, y, k: F.linear(o, k, y.float()).square().mean(1),
    "by heads": lambda o, y, k: torch.baddbmm(torch.zeros(1, 1), o.unsqueeze(0), k.T.unsqueeze(0))[0].square().sum(1),
    "distances": lambda o, y, k: torch.cdist(o, k).mean(1),
    "labels as places": lambda o, y, k: -o.log_softmax(1)[:, y].sum(1),
    "labels by index_select": lambda o, y, k: -o.log_softmax(1).index_select(1, y).sum(1),
    "labels by gather": lambda o, y, k: -o.log_softmax(1).gather(1, y.expand(len(o), -1)).sum(1),
}
# Of the same with tables (K, 5) of classes in place of keys.
APART: dict[str, Loss] = {
    "classes": lambda o, y, k: F.cross_entropy(o @ k.T, y, reduction="none"),
    "classes with a bias": lambda o, y, k: F.cross_entropy(F.linear(o, k, k[:, 0]), y, reduction="none"),
    "nearest class": lambda o, y, k: torch.cdist(o, k)[torch.arange(len(o)), y],
    "own label": lambda o, y, k: -o.log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1),
    "own label as a place": lambda o, y, k: -o.log_softmax(1)[torch.arange(len(o)), y],
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.Tanh(), DPLinear(8, CLASSES)).train()


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, n: int, keys: Tensor | None) -> None:
    o, y = model(torch.randn(n, 6)), torch.arange(n) % CLASSES
    optimizer.backward(loss(o, y, torch.randn(n, CLASSES) if keys is None else keys))
    optimizer.zero_grad()
    optimizer.recorder.discard()


@pytest.mark.parametrize("name", list(MEETING))
def test_what_meets_all_examples_is_refused_in_the_first_batch(name: str) -> None:
    model = net()
    optimizer = make_private(model, batch_size=N)
    assert_refuses(IsolationError, PAIRED, lambda: backward(model, optimizer, MEETING[name], N, None))


@pytest.mark.parametrize("name", list(MEETING))
def test_and_under_a_mean(name: str) -> None:
    model = net()
    make_private(model, batch_size=N)
    o, y = model(torch.randn(N, 6)), torch.arange(N) % CLASSES
    assert_refuses(IsolationError, "", lambda: MEETING[name](o, y, torch.randn(N, CLASSES)).mean().backward())


@pytest.mark.parametrize("name", list(APART))
def test_what_meets_a_table_of_classes_is_taken(name: str) -> None:
    """In a batch of as many examples as classes, too, if another came before."""
    model, table = net(), torch.randn(CLASSES, CLASSES)
    optimizer = make_private(model, batch_size=N)
    for n in (N, CLASSES, 2 * N):
        backward(model, optimizer, APART[name], n, table)


@pytest.mark.parametrize("mean", [False, True])
def test_as_many_classes_as_examples_are_tested_once(mean: bool) -> None:
    model, table = net(), torch.randn(N, CLASSES)
    engine = PrivacyEngine("rdp", reproducible_seed=0)
    optimizer = make_private(model, batch_size=N, engine=engine)

    def loss(o: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(o @ table.T, y, reduction="none")
        return losses.mean() if mean else losses

    def step() -> None:
        found = loss(model(torch.randn(N, 6)), torch.arange(N) % CLASSES)
        found.backward() if mean else optimizer.backward(found)
        optimizer.zero_grad()

    assert_refuses(IsolationError, "Where there are as many classes by chance, let engine.check_isolation", step)
    optimizer.recorder.discard()
    engine.check_isolation(model, (torch.randn(N, 6), torch.arange(N) % CLASSES), loss)
    step()


def test_a_criterion_that_was_tested_on_targets_of_another_shape_is_refused_all_the_same() -> None:
    """Its graph has the same operations, whatever is broadcast in them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.Tanh(), DPLinear(8, 1)).train()
    engine = PrivacyEngine("rdp", reproducible_seed=0)
    optimizer = make_private(model, batch_size=N, engine=engine)

    def loss(o: Tensor, y: Tensor) -> Tensor:
        return (o - y).square().mean(1)

    engine.check_isolation(model, (torch.randn(N, 6), torch.randn(N, 1)), loss)
    assert_refuses(IsolationError, PAIRED, lambda: optimizer.backward(loss(model(torch.randn(N, 6)), torch.randn(N))))
