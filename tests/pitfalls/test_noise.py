"""Silent ways to break differential privacy: noise that does not fit the sensitivity, or that can be foretold.

Each promise is a check that passes on the real engine. Beside it a bug is planted, and the same check must fail.

Statistical checks reject at |z| > 5.4, which a right implementation does with probability below 1e-7 for each.
"""

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

import lora_dp.engine.engine
import lora_dp.privacy.mechanism
from lora_dp import PrivacyEngine, PrivateOptimizer
from lora_dp.privacy.clipping import AutomaticClipping, FlatClipping, PerLayerClipping, make_clip_rule
from lora_dp.privacy.mechanism import Mechanism
from lora_dp.privacy.randomness import SecureSource, SeededSource
from tests.models import cross_entropy, examples, flat, mlp, one_by_one, private_run, pure_noise, take_step
from tests.support import RULES, check_deviation, make_private

# Noise matched to sensitivity


def check_noise_matches_sensitivity(rule: str) -> None:
    """No example moves the sum by more than C, some come near it, and the noise has deviation σ · C."""
    sigma, bound = 1.3, 0.7
    largest = 0.0
    for magnitude in (0.1, 1.0, 10.0):
        model = mlp()  # anew: a loss whose weight differs from batch to batch is refused
        optimizer = make_private(model, batch_size=5, max_grad_norm=bound, clipping=rule, lr=0.0)
        for example in one_by_one(examples(8)):
            norm = float(
                flat(take_step(model, optimizer, example, lambda m, b, s=magnitude: s * cross_entropy(m, b))).norm()
            )
            assert norm <= bound * (1 + 1e-7), f"one example moved the sum by {norm}, C is {bound}"
            largest = max(largest, norm)
    assert largest > 0.95 * bound
    optimizer = make_private(model, batch_size=5, max_grad_norm=bound, clipping=rule, lr=0.0, noise_multiplier=sigma)
    check_deviation(pure_noise(model, optimizer, 400), sigma * bound)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_noise_matches_sensitivity(rule):
    check_noise_matches_sensitivity(rule)


@pytest.mark.parametrize("rule", RULES)
def test_noise_that_forgets_the_bound_is_caught(rule, bug):
    bug.setattr(Mechanism, "noise_std", lambda self, size: self.noise_multiplier)
    with pytest.raises(AssertionError, match="deviation"):
        check_noise_matches_sensitivity(rule)


@pytest.mark.slow
def test_noise_divided_among_layers_is_caught(bug):
    bug.setattr(Mechanism, "noise_std", lambda self, size: self.noise_multiplier * self.rule.sensitivity / math.sqrt(2))
    with pytest.raises(AssertionError, match="deviation"):
        check_noise_matches_sensitivity("per_layer")


def test_the_whole_bound_for_each_layer_is_caught(bug):
    def planted(self: PerLayerClipping, sq_norms: Tensor, layers: Tensor, layer_count: int) -> Tensor:
        by_layer = sq_norms.new_zeros(layer_count, sq_norms.shape[1]).index_add_(0, layers, sq_norms)
        return (self.max_grad_norm / by_layer.sqrt()).clamp(max=1.0)[layers]

    bug.setattr(PerLayerClipping, "coefficients", planted)
    with pytest.raises(AssertionError, match="moved the sum"):
        check_noise_matches_sensitivity("per_layer")


@pytest.mark.parametrize("kind", [FlatClipping, AutomaticClipping])
def test_a_norm_for_each_parameter_is_caught(kind, bug):
    bug.setattr(kind, "coefficients", lambda self, sq_norms, layers, count: self.max_grad_norm / sq_norms.sqrt())
    with pytest.raises(AssertionError, match="moved the sum"):
        check_noise_matches_sensitivity({FlatClipping: "flat", AutomaticClipping: "automatic"}[kind])


# Gradient accumulation


def check_one_noise_draw_for_a_logical_batch() -> None:
    sigma, bound = 1.1, 0.6
    model = mlp()
    optimizer = make_private(model, batch_size=6, max_grad_norm=bound, noise_multiplier=sigma, lr=0.0)
    x, _ = examples(2)
    rows = []
    for _ in range(200):
        optimizer.batch.expect(6)
        for micro in range(3):
            (0 * model(x)).mean().backward()
            if micro < 2:
                optimizer.signal_skip_step()
            optimizer.step()
        rows.append(flat({name: p.grad for name, p in model.named_parameters() if p.grad is not None}) * 6)
    assert optimizer.ledger.steps == 200
    check_deviation(torch.stack(rows), sigma * bound)


@pytest.mark.slow
def test_one_noise_draw_for_a_logical_batch():
    check_one_noise_draw_for_a_logical_batch()


@pytest.mark.slow
def test_noise_for_each_micro_batch_is_caught(bug):
    accumulate = PrivateOptimizer._accumulate

    def planted(self: PrivateOptimizer, mask: Tensor | None) -> None:
        accumulate(self, mask)
        sums = self.batch._sums
        sums.update(zip(sums, self.mechanism.release(list(sums.values())), strict=True))

    bug.setattr(PrivateOptimizer, "_accumulate", planted)
    with pytest.raises(AssertionError, match="deviation"):
        check_one_noise_draw_for_a_logical_batch()


# Unpredictable noise and batches, unless a seed is asked for


def run_of(seed: int | None) -> tuple[list[int], Tensor]:
    """Which examples three batches had, and the noise of three empty ones, with every usual seed set."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=seed), size=64, batch_size=32)
    members = []
    for x, _ in loader.take(3):
        members += torch.nonzero((x[:, None] == loader.dataset.tensors[0]).all(-1))[:, 1].tolist()
        optimizer.batch._drawn.clear()
    return members, pure_noise(model, optimizer, 3)


def check_unpredictable() -> None:
    """Two runs agree by chance with probability 2⁻¹⁹² (batches) and less (noise)."""
    (batches, noise), (other_batches, other_noise) = run_of(None), run_of(None)
    assert batches != other_batches
    assert not torch.isclose(noise, other_noise, rtol=1e-6, atol=0).any()


def check_reproducible() -> None:
    (batches, noise), (other_batches, other_noise) = run_of(7), run_of(7)
    assert batches == other_batches
    assert torch.equal(noise, other_noise)
    third_batches, third_noise = run_of(8)
    assert batches != third_batches
    assert not torch.equal(noise, third_noise)


def test_default_run_is_unpredictable():
    check_unpredictable()


def test_noise_from_the_global_seed_is_caught(bug):
    bug.setattr(lora_dp.engine.engine, "SecureSource", lambda: SeededSource(torch.initial_seed()))
    with pytest.raises(AssertionError):
        check_unpredictable()


def test_seeded_run_repeats_bit_for_bit():
    check_reproducible()


def test_seed_that_does_not_reach_the_source_is_caught(bug):
    bug.setattr(lora_dp.engine.engine, "SeededSource", lambda seed: SecureSource())
    with pytest.raises(AssertionError):
        check_reproducible()


# The grid


def check_release_is_on_the_grid(dtype: torch.dtype) -> None:
    """Each released value is an integer multiple of the step, and the noise on it knows nothing of the value."""
    first = torch.randn(20001, dtype=dtype, generator=torch.Generator().manual_seed(0))
    second = 37 * first.flip(0)
    steps = {}
    for name, value in (("first", first), ("second", second)):
        mechanism = Mechanism(make_clip_rule("flat", 0.9), 1.7, SeededSource(11))
        step, _ = mechanism.grid(20001)
        (released,) = mechanism.release([value.clone()])
        assert released.dtype == torch.float64
        steps[name] = released / step
        assert torch.equal(steps[name], steps[name].round())
    assert step <= 1.7 * 0.9 * 2.0**-32
    difference = (first.double() / step).round() - (second.double() / step).round()
    assert torch.equal(steps["first"] - steps["second"], difference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_release_is_on_the_grid(dtype):
    check_release_is_on_the_grid(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_floating_point_noise_is_caught(dtype, bug):
    bug.setattr(
        lora_dp.privacy.mechanism,
        "add_noise",
        lambda values, std, sensitivity, source: [
            value + std * torch.randn_like(value, dtype=torch.float64) for value in values
        ],
    )
    with pytest.raises(AssertionError):
        check_release_is_on_the_grid(dtype)
