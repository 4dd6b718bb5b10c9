"""AdamBC against its formula in float64, and by statistics: the noise alone is taken out of the second moment."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lora_dp import AdamBC, PrivacyEngine
from tests.models import assert_refuses, examples, mlp, moved, snapshot, take_step
from tests.support import Z_LIMIT, make_private


def oracle(start, gradients, stds, *, lr, betas, floor, decay):
    """Straight from the sums, no recursion: averages whose weights are the powers of β."""
    theta = start.copy()
    for t in range(1, len(gradients) + 1):
        w1, w2 = (np.array([b ** (t - 1 - i) for i in range(t)]) for b in betas)
        w1, w2 = w1 / w1.sum(), w2 / w2.sum()
        m = sum(w * g for w, g in zip(w1, gradients, strict=False))
        v = sum(w * g**2 for w, g in zip(w2, gradients, strict=False))
        noise = sum(w * s**2 for w, s in zip(w2, stds, strict=False))
        least = noise * math.sqrt(2 * (w2**2).sum()) if floor is None else floor**2
        theta = theta * (1 - lr * decay)
        theta = theta - lr * m / np.sqrt(np.maximum(np.maximum(v - noise, least), 1e-16))
    return theta


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"floor": 0.3},
        {"betas": (0.0, 0.5), "weight_decay": 0.1},
        {"betas": (0.7, 0.0), "floor": 1e-3, "weight_decay": 0.2},
    ],
    ids=str,
)
def test_against_the_oracle(options, uneven, dtype, tolerance):
    """Also where the noise differs by column, and from step to step."""
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=(4, 3)), random.normal(size=(12, 4, 3))
    stds = random.uniform(0.1, 1.2, size=(12, 1, 3)) if uneven else random.uniform(0.1, 1.2, size=12)
    weight = nn.Parameter(torch.tensor(start, dtype=dtype))
    optimizer = AdamBC([weight], lr=0.1, **options)
    for gradient, std in zip(gradients, stds, strict=True):
        weight.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.set_noise_std({weight: torch.tensor(std) if uneven else float(std)})
        optimizer.step()
    expected = oracle(
        start,
        gradients,
        stds,
        lr=0.1,
        betas=options.get("betas", (0.9, 0.999)),
        floor=options.get("floor"),
        decay=options.get("weight_decay", 0.0),
    )
    np.testing.assert_allclose(weight.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_without_noise_it_is_adamw():
    """But for eps, which Adam adds, and which is a floor here."""
    weights = [nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2)]
    pair = AdamBC([weights[0]], lr=0.1, noise_std=0, weight_decay=0.3), torch.optim.AdamW([weights[1]], 0.1, eps=0)
    pair[1].param_groups[0]["weight_decay"] = 0.3
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        gradient = torch.randn(5, generator=generator, dtype=torch.float64)
        for weight, optimizer in zip(weights, pair, strict=True):
            weight.grad = gradient
            optimizer.step()
    torch.testing.assert_close(*weights, rtol=1e-12, atol=0)
    weights[0].grad = torch.zeros(5, dtype=torch.float64)
    AdamBC([weights[0]], noise_std=0).step()
    assert weights[0].isfinite().all()


NUMBERS, STEPS = 20_000, 400


def steps_under_noise(signal, std, told, **options):
    """How far the last step moves each of many numbers of the same gradient, in units of lr; the optimizer."""
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.zeros(NUMBERS))
    optimizer = AdamBC([weight], lr=1.0, noise_std=told, **options)
    for _ in range(STEPS):
        before = weight.detach().clone()
        weight.grad = signal + std * torch.randn(NUMBERS, generator=generator)
        optimizer.step()
    return before - weight.detach(), optimizer.state[weight]


@pytest.mark.slow
def test_of_pure_noise_the_second_moment_is_the_noise():
    """E[v̂] = s², what is taken out of it is s², and γ is one standard deviation of v̂."""
    step, state = steps_under_noise(0.0, 0.7, 0.7)
    second = 1 - 0.999**STEPS
    v, noise = state["exp_avg_sq"].double() / second, state["noise_sq"] / second
    assert noise == pytest.approx(0.49, rel=1e-12)
    weights = 0.001 * 0.999 ** np.arange(STEPS) / second
    deviation = 0.49 * math.sqrt(2 * (weights**2).sum())
    assert abs(float(v.mean()) - 0.49) < Z_LIMIT * deviation / math.sqrt(NUMBERS)
    assert abs(float((v - noise).square().mean()) / deviation**2 - 1) < Z_LIMIT * math.sqrt(3 / NUMBERS)
    # Noise alone moves a number by about lr.
    assert 0.5 < float(step.square().mean().sqrt()) < 1.5


def mean_step(std, told):
    """Of a gradient of 1: that of Adam without noise is 1."""
    step, _ = steps_under_noise(1.0, std, told)
    return float(step.double().mean())


@pytest.mark.slow
def test_a_step_is_that_of_adam_without_noise():
    """Up to the error of a mean, and the mean of 1/√v̂ at a v̂ that varies, which is known to second order."""
    std = 0.5
    weights = 0.001 * 0.999 ** np.arange(STEPS) / (1 - 0.999**STEPS)
    spread = math.sqrt((2 * std**4 + 4 * std**2) * (weights**2).sum())
    expected = 1 + 3 / 8 * spread**2
    deviation = std * math.sqrt(0.1 / 1.9) * 1.1
    assert abs(mean_step(std, std) - expected) < Z_LIMIT * deviation / math.sqrt(NUMBERS) + spread**3
    # What is told is what makes it so: Adam itself is slower, too large an s too fast.
    assert mean_step(std, 0.0) == pytest.approx(1 / math.sqrt(1 + std**2), abs=0.02)
    assert mean_step(std, 1.2 * std) > 1.05


@pytest.mark.slow
@pytest.mark.parametrize("s", [0.1, 3.0])
def test_noise_and_gradient_scale_together(s):
    """Whatever units C gives to gradients, a step is the same by default, and with a floor in these units."""
    for floor in (None, 0.2):
        one, _ = steps_under_noise(0.1, 0.5, 0.5, floor=floor)
        other, _ = steps_under_noise(0.1 * s, 0.5 * s, 0.5 * s, floor=floor and floor * s)
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


# Private steps


def adam_bc(model, **options):
    return AdamBC([p for p in model.parameters() if p.requires_grad], lr=0.01, **options)


def wrapped(model, *, batch_size=4, **options):
    """A private AdamBC under noise."""
    optimizer = make_private(model, batch_size=batch_size, noise_multiplier=0.8, max_grad_norm=0.3, **options)
    optimizer.original_optimizer = adam_bc(model)
    return optimizer


@pytest.mark.parametrize("phases", ["AB", "BA"])
def test_told_by_a_private_optimizer_the_noise_of_its_empty_batches_vanishes(phases):
    """Wrong by the batch size or the clip bound, v̂ − s² would not be zero in the mean."""
    model = mlp()
    optimizer = wrapped(model, phases=phases)
    for _ in range(400):
        optimizer.step_on_empty_batch()
    for p in (p for p in model.parameters() if p.requires_grad):
        state = optimizer.state[p]
        second = 1 - 0.999 ** state["step"]
        assert state["step"] == (200 if phases == "BA" and p.shape in ((2, 6), (8, 2)) else 400)
        excess = state["exp_avg_sq"].double() / second - state["noise_sq"] / second
        noise = state["noise_sq"] / second
        assert noise == pytest.approx((0.8 * 0.3 / 4) ** 2, rel=1e-3)
        deviation = noise * math.sqrt(2 / (state["step"] * p.numel())) * 1.05
        assert abs(float(excess.mean())) < Z_LIMIT * deviation


def test_what_a_phase_does_not_train_stays():
    model = mlp()
    optimizer = wrapped(model, phases="BA")
    for step, factor in enumerate(["0.lora_B", "0.lora_A"]):
        before = snapshot(model)
        take_step(model, optimizer, examples(4, seed=step))
        assert moved(model, before) == {factor, "2.weight", "2.bias"}


def test_a_schedule_is_followed():
    model = mlp()
    optimizer = wrapped(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    take_step(model, optimizer, examples(4))
    schedule.step()
    before = snapshot(model)
    take_step(model, optimizer, examples(4))
    assert moved(model, before) == set() and optimizer.ledger.steps == 2


@pytest.mark.parametrize("regulated", [False, True])
def test_a_run_goes_on_where_it_was_saved(tmp_path, regulated):
    options = {"phases": "BA", "regulate_noise": True} if regulated else {}

    def run(save_after):
        model, engine = mlp(), PrivacyEngine("rdp", reproducible_seed=3)
        optimizer = wrapped(model, engine=engine, **options)
        for step in range(5):
            take_step(model, optimizer, examples(4, seed=step))
            if step == save_after:
                torch.save([part.state_dict() for part in (model, optimizer, engine)], tmp_path / "run.pt")
                model, engine = mlp(seed=7), PrivacyEngine("rdp", reproducible_seed=3)
                optimizer = wrapped(model, engine=engine, **options)
                for part, state in zip((model, optimizer, engine), torch.load(tmp_path / "run.pt"), strict=True):
                    part.load_state_dict(state)
        return snapshot(model)

    whole, resumed = run(None), run(2)
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=1e-6, atol=1e-8)


def test_in_half_precision_the_moments_are_float32_also_when_they_are_loaded():
    """A thousandth of a square would be lost in bfloat16."""
    weights = [nn.Parameter(torch.zeros(64, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    optimizers = [AdamBC([weight], lr=1e-2, noise_std=0.5) for weight in weights]
    generator = torch.Generator().manual_seed(2)
    for step in range(300):
        gradient = torch.randn(64, generator=generator).to(torch.bfloat16)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.to(weight.dtype)
            optimizer.step()
        if step == 150:
            state = copy.deepcopy(optimizers[0].state_dict())
            optimizers[0] = AdamBC([weights[0]], lr=1e-2, noise_std=0.5)
            optimizers[0].load_state_dict(state)
    half, whole = (optimizer.state[weight] for weight, optimizer in zip(weights, optimizers, strict=True))
    assert half["exp_avg_sq"].dtype == torch.float32 and half["step"] == 300
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(half[name], whole[name])


# What is refused


def test_a_copy_has_the_state_and_has_been_told_nothing():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = AdamBC([weight])
    weight.grad = torch.ones(2)
    optimizer.set_noise_std({weight: 0.5})
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    (inner,) = twin.param_groups[0]["params"]
    assert torch.equal(twin.state[inner]["exp_avg"], optimizer.state[weight]["exp_avg"])
    inner.grad = torch.ones(2)
    assert_refuses(RuntimeError, "give noise_std (0 for none)", twin.step)


def test_unknown_noise_is_refused_before_anything_moves():
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    optimizer = AdamBC([{"params": weights[:1], "noise_std": 0.1}, {"params": weights[1:]}], lr=1.0)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    assert_refuses(RuntimeError, "does not know the noise in the gradient of a parameter of shape (3,)", optimizer.step)
    assert not weights[0].any()


def test_noise_that_is_given_and_told_is_refused():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.original_optimizer = adam_bc(model, noise_std=0.2)
    assert_refuses(ValueError, "leave out noise_std, here 0.2", lambda: take_step(model, optimizer, examples(4)))


def test_sparse_gradients_are_refused():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.eye(2).to_sparse()
    assert_refuses(RuntimeError, "no sparse gradients", AdamBC([weight], noise_std=0).step)


@pytest.mark.parametrize(
    "error, words, options",
    [
        (ValueError, "lr must be a finite number at least 0, got -1", {"lr": -1}),
        (ValueError, "floor must be a finite number above 0, got 0", {"floor": 0}),
        (ValueError, "noise_std must be a finite number at least 0, got inf", {"noise_std": math.inf}),
        (ValueError, "weight_decay must be a finite number at least 0, got nan", {"weight_decay": math.nan}),
        (ValueError, "Each of betas must be in [0, 1), got 1", {"betas": (0.9, 1)}),
        (TypeError, "betas must be a pair of numbers", {"betas": 0.9}),
        (TypeError, "noise_std must be a number", {"noise_std": "much"}),
    ],
)
def test_a_wrong_option_is_refused_by_name(error, words, options):
    weight = nn.Parameter(torch.zeros(2))
    assert_refuses(error, words, lambda: AdamBC([weight], **options))
    assert_refuses(error, words, lambda: AdamBC([{"params": [weight], **options}]))


def test_a_closure_is_run_once_and_its_loss_returned():
    weight = nn.Parameter(torch.ones(2))
    optimizer = AdamBC([weight], lr=0.1, noise_std=0.0)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.9))
