import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_dp import AdaptiveClipping, GaussianFilter, PrivacyEngine, PrivateOptimizer
from lora_dp.auditing import GradientCanaries, PlantedCanaries, audit
from tests.auditing.tiny import EXAMPLES, private_model, train

MARGIN = 1e-5


def plant(included: list[bool], optimizer: PrivateOptimizer, loader: Any, **options: Any) -> PlantedCanaries:
    planted = PlantedCanaries(
        GradientCanaries(len(included), **options), np.array(included), torch.Generator().manual_seed(3)
    )
    planted.plant(optimizer, loader)
    return planted


def sums(optimizer: PrivateOptimizer) -> dict[int, Tensor]:
    """The released sum of every parameter that the last step trained, float64."""
    return {
        id(p): p.grad.double() * optimizer.expected_batch_size
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    }


def one_step(
    included: list[bool] | None, *, mean: bool = True, **options: Any
) -> tuple[dict[str, Tensor], nn.Module, PrivateOptimizer, PlantedCanaries | None]:
    """A step on all examples without noise: what was released, by name."""
    reduction = "mean" if mean else "sum"
    model, optimizer, loader = private_model(noise_multiplier=0.0, loss_reduction=reduction, **options)
    planted = None if included is None else plant(included, optimizer, loader)
    train(model, optimizer, loader, 1, reduction)
    found = sums(optimizer)
    named = {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}
    return named, model, optimizer, planted


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 1.0),
        ({"max_grad_norm": 0.25}, 0.25),
        ({"clipping": "automatic"}, 10 / 10.01),
        ({"clipping": "automatic", "max_grad_norm": 3.0}, 3.0 * 30 / 30.01),
        ({"phases": "B"}, 1.0),
        ({"phases": "A"}, 1.0),
        ({"norm_method": "ghost"}, 1.0),
    ],
)
def test_an_included_canary_adds_one_clipped_coordinate_to_the_sum(
    options: dict[str, Any], length: float, mean: bool
) -> None:
    """Against the same step without canaries: the difference is a canary's gradient, clipped by the engine itself."""
    without, *_ = one_step(None, mean=mean, **options)
    with_them, *_ = one_step([True, False, True, True, False], mean=mean, **options)
    change = torch.cat([(with_them[name] - without[name]).flatten() for name in without])
    moved = change[change.abs() > 1e-3 * length]
    assert moved.numel() == 3, "three of five are included, each at a coordinate of its own"
    assert torch.allclose(moved, torch.full_like(moved, length), rtol=MARGIN)
    assert change.norm() == pytest.approx(length * math.sqrt(3), rel=MARGIN)


def test_per_layer_clipping_gives_a_canary_its_part_of_every_layer() -> None:
    without, *_ = one_step(None, clipping="per_layer")
    with_it, *_ = one_step([True], clipping="per_layer")
    by_layer = {"0": 0.0, "2": 0.0}
    for name in without:
        by_layer[name.split(".")[0]] += float((with_it[name] - without[name]).square().sum())
    assert list(by_layer.values()) == pytest.approx([0.5, 0.5], rel=MARGIN)


def test_random_directions_have_the_clip_bounds_length() -> None:
    model, optimizer, loader = private_model(noise_multiplier=0.0)
    planted = plant([True], optimizer, loader, direction="random")
    train(model, optimizer, loader, 1)
    # Without claimed noise the score is the projection itself: the auditor takes the real examples away.
    assert planted.scores.item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clipping": "per_layer"},
        {"clipping": "automatic"},
        {"phases": "BA"},
        {"phases": "BA", "regulate_noise": True},
        {"phases": "BA", "regulate_noise": True, "clipping": "per_layer"},
    ],
)
def test_without_noise_the_auditor_reads_the_coins(options: dict[str, Any]) -> None:
    included = [True, False] * 100
    model, optimizer, loader = private_model(noise_multiplier=0.0, **options)
    planted = plant(included, optimizer, loader)
    train(model, optimizer, loader, 2)
    assert planted.steps == 2
    expected = 2.0 * torch.tensor(included, dtype=torch.float64)
    assert torch.allclose(planted.scores, expected, atol=5e-3)


def test_a_canary_is_measured_by_the_bound_of_its_step() -> None:
    """Where the bound moves: without noise an included one has 1 of it in each step."""
    options = {"noise_multiplier": 0.0, "clipping": AdaptiveClipping(quantile=0.9, rate=2.0)}
    model, optimizer, loader = private_model(**options)
    planted = plant([True, False, True], optimizer, loader)
    train(model, optimizer, loader, 3, "mean")
    assert not 0.9 < optimizer.max_grad_norm < 1.1
    assert planted.scores.tolist() == pytest.approx([3, 0, 3], abs=1e-4)


def test_scores_are_the_likelihood_ratio_of_the_claimed_mechanism() -> None:
    sigma, steps, rate = 0.8, 6, 0.25
    model, optimizer, loader = private_model(noise_multiplier=sigma, batch_size=EXAMPLES // 4, lr=0.0)
    planted = plant([True] * 300 + [False] * 300, optimizer, loader)
    seen: list[Tensor] = []
    observe = planted._observe
    planted._observe = lambda x, optimizer: (seen.append(x), observe(x, optimizer))[1]  # type: ignore[method-assign]
    train(model, optimizer, loader, steps)
    x = torch.stack(seen).double()
    # Mean and deviation of what the auditor sees: coins drawn by the engine's sampler, under the engine's noise.
    inside, out = x[:, :300], x[:, 300:]
    n = inside.numel()
    assert float(inside.mean()) == pytest.approx(rate, abs=5 * math.sqrt((sigma**2 + rate * (1 - rate)) / n))
    assert float(out.mean()) == pytest.approx(0, abs=5 * sigma / math.sqrt(n))
    assert float(out.std()) == pytest.approx(sigma, rel=5 / math.sqrt(2 * n))
    absent, present = (torch.exp(-((x - mean) ** 2) / (2 * sigma**2)) for mean in (0, 1))
    ratio = ((1 - rate) * absent + rate * present) / absent
    assert torch.allclose(planted.scores, ratio.log().sum(0), rtol=1e-9)


def test_coins_change_nothing_else() -> None:
    """With no canary included, a training ends with the bits of one without canaries."""
    ends = []
    for canaries in (None, [False] * 50):
        model, optimizer, loader = private_model(noise_multiplier=0.0)
        if canaries is not None:
            plant(canaries, optimizer, loader)
        train(model, optimizer, loader, 3)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_empty_batches_and_micro_batches_have_canaries_too() -> None:
    model, optimizer, loader = private_model(noise_multiplier=1.0, batch_size=1)
    planted = plant([True] * 400, optimizer, loader)
    train(model, optimizer, loader, 40)
    assert planted.steps == optimizer.steps_taken == optimizer.ledger.steps == 40

    model, optimizer, loader = private_model(noise_multiplier=0.0)
    planted = plant([True, False], optimizer, loader)
    model.train()
    for inputs, targets in loader.take(2):
        for part in range(2):
            half = slice(part * EXAMPLES // 2, (part + 1) * EXAMPLES // 2)
            nn.functional.cross_entropy(model(inputs[half]), targets[half]).backward()
            if part == 0:
                optimizer.signal_skip_step()
            optimizer.step()
    assert planted.steps == 2 and torch.allclose(planted.scores, torch.tensor([2.0, 0.0]).double(), atol=1e-3)


def test_padded_steps_have_canaries_too() -> None:
    model, optimizer, loader = private_model(noise_multiplier=0.0)
    planted = plant([True, False], optimizer, loader)
    model.train()
    for inputs, targets in loader.take(1):
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step(mask=torch.ones(EXAMPLES, dtype=torch.bool))
    assert torch.allclose(planted.scores, torch.tensor([1.0, 0.0]).double(), atol=1e-3)


def test_a_filtered_release_is_scored() -> None:
    model, optimizer, loader = private_model(noise_multiplier=0.0, low_pass=GaussianFilter(0.5))
    planted = plant([True, False] * 20, optimizer, loader)
    train(model, optimizer, loader, 1)
    assert planted.scores[::2].mean() > planted.scores[1::2].mean() + 0.3


def test_what_cannot_be_planted_is_refused() -> None:
    model, optimizer, loader = private_model(noise_multiplier=0.0)
    plant([True] * 2000, optimizer, loader)
    with pytest.raises(ValueError, match="2000 canaries .* one has 1479: use fewer"):
        train(model, optimizer, loader, 1)
    with pytest.raises(ValueError, match="no ε to audit"):
        plant([True], *private_model(noise_multiplier=0.0, max_grad_norm=math.inf)[1:])
    planted = plant([True], *private_model(noise_multiplier=0.0)[1:])
    with pytest.raises(ValueError, match="another ledger"):
        planted.plant(*private_model(noise_multiplier=0.0)[1:])
    with pytest.raises(ValueError, match="at least 1"):
        GradientCanaries(0)
    with pytest.raises(ValueError, match="at least 1"):
        GradientCanaries(5, norm=math.nan)
    with pytest.raises(ValueError, match="do not fit into memory"):
        model, optimizer, loader = private_model(noise_multiplier=0.0)
        plant([True] * 200_000, optimizer, loader, direction="random")
        train(model, optimizer, loader, 1)


@pytest.mark.parametrize("late", [1, 3])
def test_canaries_that_miss_steps_are_no_audit(late: int) -> None:
    """Where plant is called below the loop, or after its first steps, a mechanism without noise would pass."""

    def trained(plant: Any) -> None:
        model, optimizer, loader = private_model(noise_multiplier=1.0)
        train(model, optimizer, loader, late)
        plant(optimizer, loader)
        train(model, optimizer, loader, 3 - late)

    with pytest.raises(RuntimeError, match=f"took part in {3 - late} of 3 steps, .* before the first step"):
        audit(trained, GradientCanaries(20), delta=1e-5)


@pytest.mark.parametrize("again", [True, False])
def test_a_second_optimizer_of_the_engine_has_its_canaries_planted_too(again: bool) -> None:
    def trained(plant: Any) -> None:
        model, optimizer, loader = private_model(noise_multiplier=1.0)
        engine = PrivacyEngine("pld", reproducible_seed=1)
        for number in range(2):
            _, optimizer, loader = engine.make_private(
                model=model,
                optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
                data_loader=DataLoader(loader.dataset, batch_size=8),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
            )
            if again or number == 0:
                plant(optimizer, loader)
            train(model, optimizer, loader, 2 - number)

    with nullcontext() if again else pytest.raises(RuntimeError, match="took part in 2 of 3 steps"):
        audit(trained, GradientCanaries(20), delta=1e-5)


def test_steps_of_another_time_are_none_of_the_audits() -> None:
    """Of a ledger that was restored, and of a count that goes on from turn to turn under a ledger of each."""
    for taken, held in ((0, 5), (5, 0)):
        model, optimizer, loader = private_model(noise_multiplier=1.0)
        optimizer.ledger.append(optimizer.event, held) if held else None
        optimizer.steps_taken = taken
        planted = plant([True] * 4, optimizer, loader)
        train(model, optimizer, loader, 2)
        assert planted.steps == planted.steps_taken() == 2
