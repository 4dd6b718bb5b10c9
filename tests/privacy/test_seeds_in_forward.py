"""Models that draw: from a seed set inside their forward they are refused, from the secret generator they are taken."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_dp import PrivacyEngine
from lora_dp.engine.recorder import recorder_of
from tests.privacy.drawing_models import _PUBLIC, Net, private, step
from tests.support import make_private

pytestmark = pytest.mark.usefixtures("callers_state")


def _forked(x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return F.dropout(x, 0.5)


def _put_back(x: Tensor) -> Tensor:
    state = torch.get_rng_state()
    torch.set_rng_state(_PUBLIC)
    x = x * (torch.randn(x.shape) > 0)
    torch.set_rng_state(state)
    return x


@pytest.mark.parametrize(
    "function",
    [
        _forked,
        _put_back,
        lambda x: checkpoint(_forked, x, use_reentrant=False),
        lambda x: x * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)),
        lambda x: x * torch.bernoulli(x.detach() / 2, generator=torch.Generator()),
        lambda x: x * torch.randn(x.shape, generator=torch.Generator()),
        lambda x: x * torch.randint(0, 2, x.shape, generator=torch.Generator()),
        lambda x: x[:, torch.randperm(4, generator=torch.Generator())],
        lambda x: x * torch.poisson(x.detach(), torch.Generator()),
        lambda x: x[:, torch.multinomial(torch.ones(4), 4, generator=torch.Generator())],
        lambda x: x * torch.normal(x.detach(), 1.0, generator=torch.Generator()),
        lambda x: x * torch.binomial(x.detach(), x.detach() / 2, torch.Generator()),
        lambda x: x * torch.empty_like(x).random_(generator=torch.Generator()),
        lambda x: x * torch.bernoulli(x.detach() / 2, generator=torch.Generator(), out=torch.empty(4, 4)),
    ],
)
def test_a_model_that_draws_from_a_seed_inside_its_forward_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    """Whatever it puts back afterwards: masks that anyone can work out hide nobody's place in the batch."""
    function(torch.ones(4, 4))  # outside of private training it may
    model, engine = Net(function).train(), PrivacyEngine("rdp")
    optimizer = make_private(model, batch_size=4, engine=engine, noise_multiplier=1.0)
    function(torch.ones(4, 4))
    optimizer.batch.expect(4)
    # One example: no trial of isolation runs the model before its pass.
    with pytest.raises(RuntimeError, match="seeds a generator inside its forward.*draw from torch's default generator"):
        model(torch.ones(1, 4))
    assert engine.ledger.steps == 0
    function(torch.ones(4, 4))  # the forward that failed is over
    model.eval()(torch.ones(4, 4))
    research = Net(function)
    private(research, seed=1)
    research(torch.ones(1, 4))


def test_an_interrupted_forward_is_over_with_the_models_next() -> None:
    def interrupted(x: Tensor) -> Tensor:
        recorder = recorder_of(model)
        if recorder is None or not recorder.tried:
            raise KeyboardInterrupt
        return x

    model = Net(interrupted)
    optimizer = private(model)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="seeds a generator inside its forward"):
        torch.rand(3, generator=torch.Generator())  # nobody has told that it is over
    model.function = lambda x: F.dropout(x, 0.5)
    step(model, optimizer)  # its first batch of several is tried, which draws from a seed
    torch.rand(3, generator=torch.Generator())
    model.function = interrupted
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(1, 4))
    model.function = torch.tanh
    model.eval()(torch.ones(1, 4))
    torch.rand(3, generator=torch.Generator())


@pytest.mark.parametrize(
    "draw",
    [
        torch.rand_like,
        torch.randn_like,
        lambda x: torch.randint(0, 2, x.shape),
        lambda x: torch.poisson(x),
        lambda x: torch.rand(x.shape, generator=torch.default_generator),
        lambda x: F.rrelu(-x, training=True),
    ],
)
def test_a_model_that_draws_from_the_default_generator_is_taken(draw: Callable[[Tensor], Tensor]) -> None:
    model = Net(lambda x: x * draw(x.detach()))
    step(model, private(model))


def test_a_seed_of_numpys_or_pythons_between_passes_changes_nothing() -> None:
    seen: list[tuple[float, float]] = []
    drawn: list[tuple[float, float]] = []
    model = Net(lambda x: (seen.append((random.random(), np.random.rand())), x)[1])
    optimizer = private(model)
    for _ in range(3):
        random.seed(0)
        np.random.seed(42)
        step(model, optimizer)
        drawn.append(seen[-1])  # those before it are trials, under a seed of their own
    drawn += [(random.Random(0).random(), np.random.RandomState(42).rand())]
    assert all(len(set(values)) == len(drawn) for values in zip(*drawn, strict=True))
