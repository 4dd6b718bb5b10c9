"""Reentrant checkpoints, whose layers run again in backward: each backward records into its own pass, or is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_dp import DPLinear
from tests.support import assert_close, make_private, private_gradients

OVER = "a forward pass with reentrant checkpoints that was over"


class Net(nn.Module):
    """(N, 4) → (N, 2), the first layer under a reentrant checkpoint."""

    def __init__(self, wrap: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = DPLinear(4, 4), DPLinear(4, 2)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        out = self.head(checkpoint(lambda h: self.first(h).tanh(), x.requires_grad_(), use_reentrant=True))
        return {"logits": out, "nothing": None} if self.wrap else out


def batch(seed: int) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    out = model(batch(seed))
    return (out["logits"] if isinstance(out, dict) else out).square().sum(1).mean()


def released(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    optimizer.batch.expect(4)
    optimizer.step()
    return private_gradients(model)


@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_between_forward_and_backward_changes_nothing(fails: bool) -> None:
    """The layers that run again in backward are those of the training forward."""
    found = []
    for evaluated in (False, True):
        model = Net().train()
        optimizer = make_private(model, batch_size=4, max_grad_norm=0.1)
        loss = loss_of(model)
        if evaluated:
            model.eval()
            with pytest.raises(RuntimeError, match="shapes") if fails else torch.no_grad():
                model(torch.randn(4, 3 if fails else 4))
            model.train()
        loss.backward()
        found.append(released(model, optimizer))
    assert found[0].keys() == found[1].keys() == {"first.weight", "first.bias", "head.weight", "head.bias"}
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient)


def test_zero_grad_between_forward_and_backward_changes_nothing() -> None:
    found = []
    for forget in (0, 1, 2):
        model = Net().train()
        optimizer = make_private(model, batch_size=4, max_grad_norm=0.1)
        loss = loss_of(model)
        for _ in range(forget):
            optimizer.zero_grad()
        loss.backward()
        found.append(released(model, optimizer))
    for other in found[1:]:
        assert other.keys() == found[0].keys() == {"first.weight", "first.bias", "head.weight", "head.bias"}
        for name, gradient in other.items():
            assert_close(gradient, found[0][name])


def test_a_pass_that_is_given_up_may_be_followed_by_another() -> None:
    model, alone = Net().train(), Net().train()
    optimizer = make_private(model, batch_size=4)
    loss_of(model, 2)
    optimizer.zero_grad()
    loss_of(model).backward()
    found = released(model, optimizer)
    optimizer = make_private(alone, batch_size=4)
    loss_of(alone).backward()
    for name, gradient in released(alone, optimizer).items():
        assert_close(found[name], gradient)
    loss_of(model)
    with pytest.raises(RuntimeError, match="A second forward pass began"):
        loss_of(model)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("which", ["first", "both", "both, the other way round"])
def test_a_backward_through_the_pass_that_was_given_up_is_refused(which: str, wrap: bool) -> None:
    """It would record the first batch's gradients in the rows of the second's, and clip two examples as one."""
    model = Net(wrap).train()
    optimizer = make_private(model, batch_size=4)
    first = loss_of(model, 2)
    optimizer.zero_grad()
    second = loss_of(model)
    chosen = {"first": first, "both": first + second, "both, the other way round": second + first}[which]
    with pytest.raises(RuntimeError, match=OVER):
        chosen.backward()


def test_a_backward_after_the_step_is_refused() -> None:
    model = Net().train()
    optimizer = make_private(model, batch_size=4)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    released(model, optimizer)
    with pytest.raises(RuntimeError, match=OVER):
        loss.backward()


def test_gradients_already_there_are_forgotten() -> None:
    model = Net().train()
    optimizer = make_private(model, batch_size=4)
    loss_of(model).backward()
    optimizer.zero_grad()
    optimizer.batch.expect(4)
    with pytest.raises(RuntimeError, match="No per-example gradient was recorded"):
        optimizer.step()
