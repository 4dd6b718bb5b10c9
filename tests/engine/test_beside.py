"""What would be trained beside the private model, without clip and noise, by an optimizer of its own: refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from tests.models import WIDTH, assert_refuses, examples, mlp
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


def test_a_criterion_that_is_frozen_before_the_backward_is_taken():
    (model, optimizer), (x, y), criterion = private_model(), examples(N), Centres()
    losses = criterion(model(x), y)
    criterion.requires_grad_(False)
    optimizer.backward(losses)
    assert criterion.centres.grad is None


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
    optimizer.batch.expect(N)
    x.requires_grad_()
    for part in (slice(3), slice(3, N)):
        optimizer.signal_skip_step(part.stop != N)
        optimizer.backward(F.cross_entropy(model(2 * x[part]), y[part], reduction="none"))
        optimizer.step()
    model(x.detach().clone().requires_grad_())


def test_what_comes_again_after_a_step_may_be_trained():
    """A prompt, or centres, as plain tensors with as many rows as a micro-batch has examples."""
    (model, optimizer), (x, _) = private_model(), examples(N)
    prompt, centres = (torch.zeros(N, width, requires_grad=True) for width in (x.shape[1], 3))
    optimizer.batch.expect(N)
    optimizer.backward((model(x + prompt) - centres).square().sum(1))
    optimizer.step()
    assert_refuses(IsolationError, "was given a tensor that requires a gradient", lambda: model(x + prompt))
    losses = (model(x) - centres).square().sum(1)
    assert_refuses(IsolationError, BESIDE, lambda: optimizer.backward(losses))
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


class Hidden(nn.Module):
    """Holds what takes a gradient where make_private does not see it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = mlp()
        self.scale = torch.ones(3, requires_grad=kind == "plain tensor")
        self.layers = [nn.Linear(3, 3).requires_grad_(kind == "module in a list")]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](self.inner(x)) * self.scale


@pytest.mark.parametrize("kind", ["plain tensor", "module in a list"])
def test_what_the_model_hides_is_refused_where_it_takes_a_gradient(kind):
    model = Hidden(kind).train()
    make_private(model, batch_size=N)
    assert_refuses(RuntimeError, "inside the model requires a gradient", lambda: model(examples(N)[0]))
    passed = Hidden("").train()
    make_private(passed, batch_size=N)
    passed(examples(N)[0])


def test_a_head_that_is_put_in_later_is_refused():
    model, optimizer = private_model()
    x = examples(N)[0]
    model(x)
    optimizer.recorder.discard()
    model[-1] = nn.Linear(model[-1].in_features, 3)
    assert_refuses(RuntimeError, "inside the model requires a gradient", lambda: model(x))


def test_frozen_weights_that_were_assigned_and_unfrozen_are_refused():
    model = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), DPLinear(6, 3)).train()
    make_private(model, batch_size=N)
    state = {name: tensor.clone() for name, tensor in model[0].state_dict().items()}
    model[0].load_state_dict(state, assign=True)
    model[0].requires_grad_(True)
    assert_refuses(RuntimeError, "'0.weight' was frozen", lambda: model(torch.randn(N, 6)))


class Warms(nn.Module):
    """Mixes examples once a switch is set."""

    mixes = False

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.inner = mlp()
        if own:
            self.mixes = False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out + out.flip(0) if self.mixes else out


@pytest.mark.parametrize("own", [True, False])
def test_a_switch_among_the_attributes_makes_a_batch_of_a_new_kind(own):
    model, x = Warms(own).train(), examples(N)[0]
    optimizer = make_private(model, batch_size=N)
    model(x)
    optimizer.recorder.discard()
    model.mixes = True
    assert_refuses(IsolationError, "example", lambda: model(x))


class PlainPrompt(nn.Module):
    """A soft prompt that is no parameter, of as many rows as a batch may have."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = torch.randn(8, WIDTH).requires_grad_()
        self.head, self.prompted = DPLinear(WIDTH, 3), True

    def forward(self, x: Tensor) -> Tensor:
        if not self.prompted:
            return self.head(x.tanh())
        return self.head(torch.cat([self.prompt.expand(len(x), -1, -1), x.unsqueeze(1)], 1).tanh().mean(1))


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 8, None])
def test_a_plain_tensor_is_found_where_it_comes_again_after_a_step(size, later):
    """In micro-batches of a size that divides it, nothing but that tells it from values of examples."""
    model = PlainPrompt().train()
    optimizer = make_private(model, batch_size=8)

    sizes = [size] * (8 // size) if size else [4, 2, 2]  # the latter of two kinds

    def step() -> None:
        optimizer.batch.expect(8)
        for number, rows in enumerate(sizes):
            optimizer.signal_skip_step(number + 1 < len(sizes))
            optimizer.backward(model(torch.randn(rows, WIDTH)).square().sum(1))
            optimizer.step()
            optimizer.zero_grad()

    if later:
        model.prompted = False
        step()
        model.prompted = True
    step()
    assert_refuses(RuntimeError, "A tensor (8, ", step)
