"""A model that was changed is tried again."""

import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.check import check_isolation
from tests.models import assert_refuses, examples, mlp, set_up, texts
from tests.support import make_private


class Standardised(nn.Module):
    """Standardises over the batch while it trains, in a layer that is no BatchNorm of torch's."""

    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0) if self.training else x

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = mlp(), Standardised.Norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


def test_a_module_that_is_switched_back_to_training_is_tried_again():
    model = Standardised().train()
    model.norm.eval()
    make_private(model, batch_size=4)
    model(examples(4)[0])
    model.train()
    assert_refuses(IsolationError, "attributed to other examples", lambda: model(examples(4)[0]))


def test_layers_that_are_unfrozen_later_are_tried_again():
    """Rows of one position of all examples one after another."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.head = DPLinear(4, 4), DPLinear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.early(x.transpose(0, 1).flatten(0, 1)).view(x.shape[1], len(x), 4).mean(0))

    model, (x, _) = Positions().train(), texts(8, 8, 8, 8)
    make_private(model, batch_size=4)
    model.early.requires_grad_(False)
    model(x)
    model.early.requires_grad_(True)
    assert_refuses(IsolationError, "'early'", lambda: model(x))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("on_outputs", [True, False])
def test_hooks_on_the_whole_model_are_tried_too(before, on_outputs):
    model = Standardised().train()
    model.norm.eval()

    def put() -> None:
        if on_outputs:
            model.register_forward_hook(lambda module, args, output: output - output.detach().mean(0))
        else:
            model.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean(0),))

    if before:
        put()
    make_private(model, batch_size=4)
    if not before:
        model(examples(4)[0])
        put()
    assert_refuses(IsolationError, "with the other examples of the batch", lambda: model(examples(4)[0]))


@pytest.mark.slow
def test_a_part_of_the_model_that_is_compiled_is_tried():
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.head = torch.compile(nn.Linear(3, 3).requires_grad_(False), backend="aot_eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x))

    check_isolation(Compiled().train(), (examples(8)[0],), {}, 8)


def test_a_model_that_is_changed_and_made_private_again_is_tried_again():
    model = Standardised().train()
    model.norm = nn.Identity()
    set_up(model)
    model(examples(8)[0])
    model.norm = Standardised.Norm()
    set_up(model)
    assert_refuses(IsolationError, "example", lambda: model(examples(8)[0]))


@pytest.mark.parametrize("outer_first", [True, False])
def test_a_part_of_what_is_private_or_what_is_around_it_is_not_made_private(outer_first):
    """The hooks that try batches are on one module: what others do around it would not be seen."""
    inner = mlp()
    outer = nn.Sequential(inner)
    first, second = (outer, inner) if outer_first else (inner, outer)
    set_up(first)
    assert_refuses(ValueError, "for one and the same module", lambda: set_up(second))
