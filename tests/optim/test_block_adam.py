"""BlockAdamW against its formula in float64, and by statistics: the noise alone is taken out of the second moment."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lora_dp.optim.block_adam import BlockAdamW
from tests.models import assert_refuses


def oracle(start, gradients, variances, *, lr, betas, decay, earlier=0, second=0.0, drift=0.0):
    """Straight from the sums: averages whose weights are the powers of β. ``second`` is of ``earlier`` steps."""
    theta = start.copy()
    for t in range(1, len(gradients) + 1):
        w1, w2 = (np.array([b ** (t - 1 - i) for i in range(t)]) * (1 - b) for b in betas)
        m = sum(w * g for w, g in zip(w1, gradients, strict=False)) / w1.sum()
        whole = 1 - betas[1] ** (earlier + t)
        v = betas[1] ** t * second
        v += sum(w * ((g**2).mean() - s) for w, g, s in zip(w2, gradients, variances, strict=False))
        every = np.array([betas[1] ** i for i in range(earlier + t)])
        every /= every.sum()
        least = max(variances[t - 1] * math.sqrt(2 * (every**2).sum() / start.size), 1e-16)
        theta = theta * (1 - lr * decay)
        theta = theta - lr * m / math.sqrt(max(v / whole, least)) + drift
    return theta, v


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("options", [{}, {"betas": (0.0, 0.5), "weight_decay": 0.1}, {"betas": (0.7, 0.0)}], ids=str)
def test_against_the_oracle(options, uneven, dtype, tolerance):
    """Also where the noise differs by column, and from step to step."""
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=(4, 3)), random.normal(size=(12, 4, 3))
    stds = random.uniform(0.1, 0.9, size=(12, 1, 3)) if uneven else random.uniform(0.1, 1.2, size=(12, 1, 1))
    weight = nn.Parameter(torch.tensor(start, dtype=dtype))
    optimizer = BlockAdamW([weight], lr=0.1, **options)
    for gradient, std in zip(gradients, stds, strict=True):
        weight.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.set_noise_std({weight: torch.tensor(std) if uneven else float(std.item())})
        optimizer.step()
    betas, decay = options.get("betas", (0.9, 0.999)), options.get("weight_decay", 0.01)
    expected, _ = oracle(start, gradients, (stds**2).mean((1, 2)), lr=0.1, betas=betas, decay=decay)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=0, atol=tolerance)


def test_without_noise_a_parameter_of_one_number_is_adamw_s():
    """torch's own, to what it adds to the root."""
    weights = [nn.Parameter(torch.tensor([0.3]).double()) for _ in range(2)]
    ours, theirs = BlockAdamW([weights[0]], lr=0.1, noise_std=0.0), torch.optim.AdamW([weights[1]], lr=0.1, eps=1e-12)
    for gradient in torch.randn(30, 1, generator=torch.Generator().manual_seed(0)).double():
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-10)


def test_it_goes_on_from_what_it_is_given_and_drifts():
    random = np.random.default_rng(1)
    start, gradients, drift = random.normal(size=(4, 3)), random.normal(size=(5, 4, 3)), random.normal(size=(4, 3))
    weight, second = nn.Parameter(torch.tensor(start)), torch.tensor([0.02], dtype=torch.float64)
    optimizer = BlockAdamW([weight], lr=0.1, noise_std=0.2, weight_decay=0.0)
    optimizer.go_on(weight, second, 20, torch.tensor(drift))
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    settings = {"lr": 0.1, "betas": (0.9, 0.999), "decay": 0.0, "earlier": 20, "second": 0.02, "drift": drift}
    expected, v = oracle(start, gradients, [0.04] * 5, **settings)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=0, atol=1e-12)
    assert float(second) == pytest.approx(v, rel=1e-12)


def test_clients_moments_average_to_those_of_all_their_gradients():
    gradients = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0)).double()
    seconds = []
    for mine in gradients:
        weight, second = nn.Parameter(torch.zeros(5).double()), torch.zeros(1).double()
        optimizer = BlockAdamW([weight], noise_std=0.5)
        optimizer.go_on(weight, second, 0)
        for gradient in mine:
            weight.grad = gradient
            optimizer.step()
        seconds.append(second)
    weights = 0.001 * 0.999 ** torch.arange(7, -1, -1).double()
    pooled = (weights * (gradients.square().mean((0, 2)) - 0.25)).sum()
    torch.testing.assert_close(sum(seconds) / 3, pooled.view(1), rtol=1e-9, atol=0)


def test_noise_alone_is_taken_out():
    """Of 40,000 numbers and 40 steps: v̂ has a deviation of 0.0011 s²."""
    noise, weight, second = 3.0, nn.Parameter(torch.zeros(200, 200)), torch.zeros(1)
    optimizer = BlockAdamW([weight], lr=0.0, noise_std=noise)
    optimizer.go_on(weight, second, 0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        weight.grad = 0.7 + noise * torch.randn(200, 200, generator=generator)
        optimizer.step()
    found = float(second) / (1 - 0.999**40)
    assert abs(found - 0.49) < 5 * noise**2 * math.sqrt(2 / (40 * 40000))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and at least 0, got -1.0"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay must be finite"),
        ({"noise_std": math.nan}, ValueError, "noise_std must be finite and at least 0, got nan"),
        ({"betas": (0.9, 1.0)}, ValueError, "Each of betas must be in [0, 1), got 1.0"),
        ({"lr": "1"}, TypeError, "lr must be a number"),
    ],
)
def test_wrong_settings_are_refused(options, error, message):
    assert_refuses(error, message, lambda: BlockAdamW([nn.Parameter(torch.zeros(1))], **options))


def test_unknown_noise_and_sparse_gradients_are_refused_before_anything_moves():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = BlockAdamW(weights)
    optimizer.set_noise_std({weights[0]: 0.1})
    for weight in weights:
        weight.grad = torch.ones(2)
    assert_refuses(RuntimeError, "does not know the noise in the gradient of a parameter of shape (2,)", optimizer.step)
    optimizer.set_noise_std(dict.fromkeys(weights, 0.1))
    weights[1].grad = torch.ones(2).to_sparse()
    assert_refuses(RuntimeError, "takes no sparse gradients", optimizer.step)
    assert weights[0].equal(torch.ones(2))
    assert copy.deepcopy(optimizer)._told == {}
