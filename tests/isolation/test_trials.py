"""A trial leaves everything as it was, and what its passes draw is the same."""

import gc
import math
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear
from tests.isolation.checked_models import Made, passes
from tests.isolation.token_models import refused
from tests.models import examples, mlp
from tests.support import make_private


def test_the_passes_of_a_trial_draw_the_same_those_of_another_do_not_and_nothing_is_left_of_it():
    seen = []

    def drawn(x: Tensor) -> Tensor:
        seen.append([random.random(), np.random.rand(), float(torch.rand(()))])
        return x

    model = Made(before=drawn)
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)  # type: ignore[func-returns-value]
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        passes(model, 4)
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(drawn[:2] == first[0][:2] for drawn in first) and all(drawn[:2] == second[0][:2] for drawn in second)
    # A seed that somebody knew would tell what a trial does not see.
    assert all(a != b for a, b in zip(first[0], second[0], strict=True))


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_no_trial_has_a_single_example(n):
    """A batch of one is a case of its own in many models."""
    seen: list[int] = []
    passes(Made(before=lambda x: seen.append(len(x)) or x), n)  # type: ignore[func-returns-value]
    assert min(seen) >= 2


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_model_that_scales_its_input_in_place_finds_it_as_it_was(n):
    x = examples(n)[0]
    before = x.clone()
    passes(Made(before=lambda x: x.sub_(0.5).div_(0.25)), n, x)
    assert torch.equal(x, before)


def test_an_input_with_a_gradient_is_left_without_one():
    x = examples(4)[0].requires_grad_()
    passes(Made(), 4, x, criterion=lambda out, _: out.square().mean())
    assert x.grad is None


def test_the_check_makes_gradients_where_they_are_switched_off():
    with torch.no_grad():
        passes(Made(), 4, criterion=lambda out, _: out.square().mean())
        refused("The loss mixes examples", Made(), 4, examples(4)[0], criterion=lambda out, _: out.mean(0).norm())


def test_a_batch_of_one_passes_without_having_shown_anything():
    passed = passes(Made(), 1)
    assert (passed.losses, passed.padding, passed.criterion) == (frozenset(), False, None)


def test_an_error_of_the_model_is_told():
    """Where every example stands by itself, each trial is one that the model must take."""

    class Fails(Made):
        def forward(self, x: Tensor) -> Any:
            if bool((x == x[0]).all()):
                raise KeyError("equal rows")
            return super().forward(x)

    class FailsOfTwo(Made):
        def forward(self, x: Tensor) -> Any:
            if len(x) == 2:
                raise KeyError("two rows")
            return super().forward(x)

    for model, words in ((Fails(), "equal rows"), (FailsOfTwo(), "two rows")):
        with pytest.raises(KeyError, match=words):
            passes(model, 4)


def test_rows_of_all_examples_that_fit_no_other_batch_are_tried_as_they_are():
    """Nothing is then told of how losses are reduced."""

    class Fixed(Made):
        def forward(self, x: Tensor, mixing: bool) -> Any:  # type: ignore[override]
            if len(x) != 8:
                raise KeyError("as many rows as ever")
            out = self.inner(x).view(4, 2, 6).sum(1)
            return out - out.mean(0) if mixing else out

    assert not passes(Fixed(), 4, examples(8)[0], False, criterion=lambda out, _: out.square().mean()).losses
    refused("example 0", Fixed(), 4, examples(8)[0], True)


@pytest.mark.slow
def test_nothing_of_a_trial_outlives_it():
    """Hooks on tensors would keep the model alive through the graph."""
    model = Made()
    known = weakref.ref(model)
    passes(model, 4, criterion=lambda out, _: out.square().mean())
    del model
    gc.collect()
    assert known() is None


class Kept(nn.Module):
    """What it returns has another size in another batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : int((x.mean(0) > 0).sum())]


def test_modules_whose_weights_nobody_trains_may_see_the_batch():
    """A frozen one, given what belongs to all; one whose rows are no examples; one that is called without gradients."""

    class Watched(Made):
        def __init__(self) -> None:
            super().__init__()
            self.monitor, self.frozen = nn.Linear(6, 6), DPLinear(6, 6).requires_grad_(False)
            self.monitor.requires_grad_(False)
            self.act, self.memory = nn.Tanh(), nn.GRU(6, 6, batch_first=True).requires_grad_(False)
            self.error, self.places = nn.MSELoss(), nn.Embedding(7, 6).requires_grad_(False)
            self.kept = Kept()

        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                self.error(x, 0 * x), self.places(torch.arange(7)), self.kept(x)
                self.monitor(x.mean(0).expand(len(x), -1))
                self.frozen(x.mean(0))
                self.inner(x)
            out = self.inner(x=x)
            remembered, _ = self.memory(out.unsqueeze(1))
            return self.act(out.t()).t() + remembered.squeeze(1)

    for n in (2, 3, 4):
        passes(Watched(), n)


def test_a_buffer_that_is_no_number_and_stays_as_it_is_is_taken():
    model = Made()
    model.register_buffer("unset", torch.tensor([math.nan, 1.0]))
    passes(model, 4)


def test_outputs_without_rows_and_of_other_rows_belong_to_nobody():
    for rows in (0, 1, 3, 6, 8):
        passes(
            Made(
                lambda out, rows=rows: {  # type: ignore[misc]
                    "table": 0 * out.mean() * torch.ones(rows, 5),
                    "logits": out,
                    "kept": Kept()(out),
                }
            ),
            4,
        )


N = 24


def test_a_trial_leaves_the_pass_that_follows_as_it_is():
    """The engine's own hooks are on the whole model as well."""
    model, plain = mlp(), mlp()
    optimizer = make_private(model, batch_size=N, max_grad_norm=0.3)
    make_private(plain, batch_size=N)
    x, y = examples(N)
    optimizer.batch.expect(N)
    optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
    optimizer.step()
    assert optimizer.ledger.steps == 1
