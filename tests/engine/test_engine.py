"""The engine from end to end: the ε that was asked for, the noise, and the filters."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from torch import Tensor, nn

from lora_dp import DPLinear, GaussianFilter, IsolationError, LaplacianFilter, PrivacyBudgetExceeded, PrivacyEngine
from tests.models import (
    assert_refuses,
    cross_entropy,
    examples,
    flat,
    mlp,
    private_run,
    pure_noise,
    seeded,
    snapshot,
    take_step,
    train,
)
from tests.support import assert_close, make_private, private_gradients

# ε: what was asked for, what dp-accounting says, and the end of the budget


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accountant", "epsilon", "length"),
    [("rdp", 1.0, {"steps": 12}), ("rdp", 8.0, {"epochs": 2}), ("pld", 3.0, {"steps": 12})],
)
def test_planned_run_ends_within_its_target(accountant, epsilon, length):
    engine = PrivacyEngine(accountant, reproducible_seed=0)
    model, optimizer, loader = private_run(
        engine, size=40, batch_size=8, target_epsilon=epsilon, target_delta=1e-3, **length
    )
    steps = length.get("steps", 2 * len(loader))
    train(model, optimizer, loader.take(steps))
    assert optimizer.steps_taken == engine.ledger.steps == steps
    spent = engine.get_epsilon(1e-3)
    assert 0.98 * epsilon < spent <= epsilon

    step = dp_event.PoissonSampledDpEvent(8 / 40, dp_event.GaussianDpEvent(optimizer.mechanism.noise_multiplier))
    reference = RdpAccountant() if accountant == "rdp" else PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = reference.compose(step, steps).get_epsilon(1e-3)
    assert spent == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
def test_budget_is_refused_before_the_step_that_overruns_it():
    engine = seeded()
    model, optimizer, loader = private_run(
        engine, size=40, batch_size=8, optimizer=torch.optim.AdamW, target_epsilon=2.0, target_delta=1e-3, steps=6
    )
    train(model, optimizer, loader.take(6))
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    for _ in range(5):
        try:
            train(model, optimizer, loader.take(1))
            before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
        except PrivacyBudgetExceeded as refusal:
            assert "ε = 2 at δ = 0.001" in str(refusal) and f"{engine.ledger.steps} steps" in str(refusal)
            break
    steps = engine.ledger.steps
    assert 6 <= steps <= 7  # the noise is calibrated to 0.1 % of ε
    assert engine.get_epsilon(1e-3) <= 2.0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert str(optimizer.state_dict()) == str(state)
    assert_refuses(PrivacyBudgetExceeded, "stop here", optimizer.step_on_empty_batch)
    assert engine.ledger.steps == steps
    engine.ledger.append(optimizer.event)
    assert engine.get_epsilon(1e-3) > 2.0  # one more would not have fitted


def test_refused_batch_does_not_enter_a_later_step():
    engine = seeded()
    model, optimizer, _ = private_run(
        engine, size=4, batch_size=4, lr=0.0, target_epsilon=1.0, target_delta=1e-3, steps=1
    )
    optimizer._budget.check, allow = (
        lambda: (_ for _ in ()).throw(PrivacyBudgetExceeded("over")),
        optimizer._budget.check,
    )
    assert_refuses(PrivacyBudgetExceeded, "over", lambda: take_step(model, optimizer, examples(4)))
    optimizer._budget.check = allow
    optimizer.step_on_empty_batch()
    noise = flat(private_gradients(model))
    twin, other, _ = private_run(seeded(), size=4, batch_size=4, lr=0.0, target_epsilon=1.0, target_delta=1e-3, steps=1)
    other.step_on_empty_batch()
    assert torch.equal(noise, flat(private_gradients(twin)))


def test_budget_counts_what_the_ledger_already_holds():
    engine = seeded()
    options = {"size": 40, "batch_size": 8, "target_epsilon": 2.0, "target_delta": 1e-3}
    model, optimizer, loader = private_run(engine, **options, steps=6)
    train(model, optimizer, loader.take(6))
    model, second, loader = private_run(engine, **options, steps=6)
    assert_refuses(PrivacyBudgetExceeded, "stop here", lambda: train(model, second, loader.take(2)))
    assert engine.get_epsilon(1e-3) <= 2.0


def test_no_noise_is_no_privacy():
    engine = seeded()
    model, optimizer, loader = private_run(engine, noise_multiplier=0.0, max_grad_norm=math.inf)
    assert engine.get_epsilon(1e-5) == 0.0
    train(model, optimizer, loader.take(2))
    assert engine.get_epsilon(1e-5) == math.inf


def test_without_noise_and_clipping_the_step_is_the_plain_one():
    batch = examples(6)
    plain = mlp()
    cross_entropy(plain, batch).backward()
    model = mlp()
    released = take_step(model, make_private(model, batch_size=6, max_grad_norm=math.inf), batch)
    assert_close(flat(released) / 6, flat(private_gradients(plain)))


# Noise


@pytest.mark.parametrize("source", ["secure", "seeded"])
@pytest.mark.parametrize("phases", ["B", "AB"])
def test_noise_has_the_stated_variance(source, phases):
    """Mean, variance and kurtosis of 16,000 or more releases, and their correlation from step to step.

    Four z-tests at |z| < 5.6, normal but for the kurtosis' skewness: a right source fails one with probability below
    2e-8 (kurtosis 2e-7), so that the cases of the secure source together fail in less than one of a million runs.
    """
    engine = PrivacyEngine("rdp", reproducible_seed=9 if source == "seeded" else None)
    sigma, bound = 0.8, 2.5
    model, optimizer, _ = private_run(engine, noise_multiplier=sigma, max_grad_norm=bound, lr=0.0, phases=phases)
    rows = pure_noise(model, optimizer, 400) / (sigma * bound)
    assert rows.shape == (400, {"B": 43, "AB": 55}[phases])
    n = rows.numel()
    z = {
        "mean": float(rows.mean()) * math.sqrt(n),
        "variance": float(rows.square().mean() - 1) * math.sqrt(n / 2),
        "kurtosis": float(rows.pow(4).mean() - 3) * math.sqrt(n / 96),
        "correlation": float((rows[1:] * rows[:-1]).sum()) / math.sqrt(n - rows.shape[1]),
    }
    assert all(abs(value) < 5.6 for value in z.values()), z


# Filters


@pytest.mark.parametrize("low_pass", [GaussianFilter(1.5), LaplacianFilter(2.0)])
def test_filters_come_after_the_noise_and_touch_factors_only(low_pass):
    batch, released = examples(5), []
    for chosen in (None, low_pass):
        model = mlp()
        optimizer = make_private(model, batch_size=5, noise_multiplier=1.0, low_pass=chosen)
        released.append(take_step(model, optimizer, batch))
    plain, filtered = released
    for name in plain:
        if name.startswith("0.lora"):
            assert not torch.allclose(plain[name], filtered[name], rtol=1e-2)
            assert torch.allclose(5 * low_pass(plain[name] / 5), filtered[name], rtol=1e-4, atol=1e-5)
        else:
            # A filter that no fused step knows leaves sum and update to torch, which rounds to float32 in between.
            assert torch.allclose(plain[name], filtered[name], rtol=1e-6, atol=1e-6)


def test_a_layer_that_the_batch_does_not_use_keeps_its_share_of_the_bound():
    """Else the bound of the others would tell whether the batch used it."""

    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = DPLinear(6, 3), DPLinear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    torch.manual_seed(0)
    model = Optional().train()
    optimizer = make_private(model, batch_size=1, max_grad_norm=0.1, clipping="per_layer")
    released = take_step(model, optimizer, examples(1))
    assert float(flat(released).norm()) == pytest.approx(0.1 / math.sqrt(2), rel=1e-5)
    assert not released["unused.weight"].any()


@pytest.mark.parametrize("declared", ["mean", "sum"])
@pytest.mark.parametrize("joined", ["mean", "sum"])
def test_check_isolation_compares_a_criterion_with_what_was_declared(declared, joined):
    model, (x, y) = mlp(), examples(6)
    engine = PrivacyEngine("rdp", reproducible_seed=0)
    make_private(model, batch_size=6, engine=engine, loss_reduction=declared)

    def check() -> None:
        engine.check_isolation(model, (x, y), lambda out, y: F.cross_entropy(out, y, reduction=joined))

    if joined == declared:
        check()
    else:
        assert_refuses(IsolationError, f"is a {joined} over the examples, but was declared a {declared}", check)
