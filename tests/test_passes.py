"""When a pass begins, which batches are tried before it, and what it leaves alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_dp.passes
from lora_dp import IsolationError
from lora_dp.isolation import FEW
from tests.models import examples, mlp
from tests.support import make_private


class Centred(nn.Module):
    """Takes the mean of the batch off, where it is told to."""

    def __init__(self, mixes: bool = True) -> None:
        super().__init__()
        self.inner, self.mixes = mlp(), mixes

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out - out.mean(0) if self.mixes else out


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples each trial was given; none is drawn in secret."""
    sizes: list[int] = []
    check = lora_dp.passes.check_isolation

    def counted(module: nn.Module, args: Any, kwargs: Any, n: int, **options: Any) -> Any:
        sizes.append(n)
        return check(module, args, kwargs, n, **options)

    monkeypatch.setattr(lora_dp.passes, "check_isolation", counted)
    monkeypatch.setattr(lora_dp.passes, "drawn_for_test", lambda: False)
    return sizes


def forward(model: nn.Module, optimizer: Any, n: int) -> None:
    optimizer.recorder.discard()
    model(examples(n)[0])


def test_two_examples_can_meet_and_one_cannot(trials):
    model = Centred().train()
    optimizer = make_private(model, batch_size=4)
    forward(model, optimizer, 1)
    assert trials == [2]  # beside a copy of itself, for padding and buffers
    with pytest.raises(IsolationError):
        forward(model, optimizer, 2)
    assert trials == [2, 2]


def test_from_four_examples_on_a_batch_is_of_another_kind(trials):
    """It is tried in halves too."""
    model = Centred(mixes=False).train()
    optimizer = make_private(model, batch_size=4)
    for n in (3, 3, 3):
        forward(model, optimizer, n)
    assert trials == [3]
    for n in (FEW, FEW, FEW + 1):
        forward(model, optimizer, n)
    assert trials == [3, FEW]


def test_nothing_is_tried_inside_a_capture(trials):
    model = Centred(mixes=False).train()
    optimizer = make_private(model, batch_size=4)
    optimizer.recorder.capturing = True
    forward(model, optimizer, 4)
    assert not trials
    optimizer.recorder.capturing = False
    forward(model, optimizer, 4)
    assert trials == [4]


def test_a_graph_that_is_kept_may_be_looked_at_when_its_pass_is_over():
    """Without reentrant checkpoints nothing is recorded then."""
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    x = examples(4)[0].requires_grad_()
    logits = model(x)
    logits.square().sum(1).mean().backward(retain_graph=True)
    optimizer.zero_grad()
    assert torch.autograd.grad(logits.sum(), x)[0].any()
    assert not optimizer.recorder.pending


def test_a_batch_norm_that_is_thawed_later_is_refused():
    model = nn.Sequential(mlp(), nn.BatchNorm1d(3)).train()
    model[1].requires_grad_(False).eval()
    make_private(model, batch_size=4)
    model(examples(4)[0])
    model.train()
    with pytest.raises(RuntimeError, match="BatchNorm1d that was frozen"):
        model(examples(4)[0])


def test_a_loss_that_joins_examples_is_refused_in_the_first_pass():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.expect_batch(4)
    logits = model(examples(4)[0])
    with pytest.raises(IsolationError, match="The loss mixes examples"):
        (logits - logits.mean(0)).square().sum(1).mean().backward()


class Balanced(nn.Module):
    """Returns a second number, which mixes examples in stacks (N, 1, 6) or where it is told to."""

    mixes = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.inner(x.flatten(1))
        mixed = self.mixes or x.dim() == 3
        balance = out.mean(0).square().sum() if mixed else (1 + out).square().mean()
        return {"loss": out.square().mean(), "balance": balance}


def refused_where_used(output: dict[str, Tensor]) -> None:
    with pytest.raises(IsolationError, match="a number that the model returned"):
        (output["loss"] + output["balance"]).backward()


def test_a_number_of_the_models_is_proven_for_its_kind_of_batch_alone(trials):
    model, x = Balanced().train(), examples(4)[0]
    optimizer = make_private(model, batch_size=4)
    optimizer.recorder.expect_padding()  # that widths differ is no news
    for batch in (x.unsqueeze(1), x, x.unsqueeze(1)):
        optimizer.recorder.discard()
        output = model(batch)
    assert trials == [4, 4]
    refused_where_used(output)
    optimizer.recorder.discard()
    output = model(x)
    (output["loss"] + output["balance"]).backward()


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_a_number_of_the_models_must_pass_every_trial(trials, monkeypatch, order):
    model, x = Balanced().train(), examples(4)[0]
    optimizer = make_private(model, batch_size=4)
    monkeypatch.setattr(lora_dp.passes, "drawn_for_test", lambda: True)
    for model.mixes in order:
        optimizer.recorder.discard()
        output = model(x)
    assert len(trials) == 2
    model.mixes = False
    optimizer.recorder.discard()
    monkeypatch.setattr(lora_dp.passes, "drawn_for_test", lambda: False)
    output = model(x)
    refused_where_used(output)


def test_the_loss_of_a_batch_that_is_tried_is_looked_at_again(trials):
    """Its graph may be known, and its indices others."""
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(1))

    model, x = Flat().train(), examples(4)[0]
    optimizer = make_private(model, batch_size=4)

    def loss(batch: Tensor, places: list[int]) -> Tensor:
        optimizer.recorder.discard()
        logits = model(batch)
        return (logits - 2 * logits.index_select(0, torch.tensor(places))).square().sum(1).mean()

    loss(x, [0, 1, 2, 3]).backward()
    with pytest.raises(IsolationError, match="The loss mixes examples"):
        loss(x.unsqueeze(1), [3, 1, 2, 0]).backward()
    assert len(trials) == 2


def test_a_model_may_return_nothing():
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> None:
            self.seen = self.inner(x).detach()

    model = Silent().train()
    make_private(model, batch_size=4)
    assert model(examples(1)[0]) is None
    assert model.eval()(examples(4)[0]) is None
