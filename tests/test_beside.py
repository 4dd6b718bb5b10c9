"""What would be trained beside the private model, without clip and noise, by an optimizer of its own: refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from tests.models import assert_refuses, examples, mlp
from tests.support import make_private

N = 6
BESIDE = "requires a gradient beside the model's outputs"


def private_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mlp()
    return model, make_private(model, batch_size=N)


class Centres(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.zeros(3, 3))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - self.centres[y]).square().sum(1)


class Uncertain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_variance = torch.zeros((), requires_grad=True)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return (-self.log_variance).exp() * F.cross_entropy(z, y, reduction="none") + self.log_variance


class Behind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(z), y, reduction="none")


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("criterion", [Centres, Uncertain, Behind])
def test_a_criterion_that_is_trained_is_refused(criterion, reduced):
    (model, optimizer), (x, y) = private_model(), examples(N)
    losses = criterion()(model(x), y)
    assert_refuses(IsolationError, BESIDE, lambda: losses.mean().backward() if reduced else optimizer.backward(losses))


@pytest.mark.parametrize("n", [1, N])
def test_a_module_before_the_model_is_refused_where_it_is_trained(n):
    (model, _), (x, _) = private_model(), examples(n)
    before = nn.Linear(x.shape[1], x.shape[1])
    assert_refuses(IsolationError, "was given a tensor that requires a gradient", lambda: model(before(x)))
    prompt = nn.Parameter(torch.zeros(n, x.shape[1]))
    assert_refuses(IsolationError, "was given a tensor that requires a gradient", lambda: model(prompt))
    model(before.requires_grad_(False)(x))


def test_inputs_of_examples_may_require_a_gradient():
    """As gradient checkpointing and saliency want it: nobody made them, so that nothing is trained by it."""
    (model, optimizer), (x, y) = private_model(), examples(N)
    optimizer.expect_batch(N)
    x.requires_grad_()
    optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
    optimizer.step()
    model(2 * x[:3])
    model(examples(1)[0].requires_grad_())


def test_another_models_loss_is_its_own_business():
    (model, _), other, (x, y) = private_model(), Behind(), examples(N)
    model(x)
    other(torch.randn(N, 3), y).mean().backward()
    assert other.head.weight.grad is not None


def test_a_frozen_part_that_is_unfrozen_is_refused_whoever_trains_it():
    model = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), DPLinear(6, 3)).train()
    make_private(model, batch_size=N)
    x = torch.randn(N, 6)
    model(x)
    model[0].requires_grad_(True)
    assert_refuses(RuntimeError, "'0.weight' was frozen when the model was made private", lambda: model(x))
    with torch.no_grad():
        model(x)
    model[0].requires_grad_(False)
    model(x)
