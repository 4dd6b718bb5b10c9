"""Silent ways to break differential privacy: batches that are not Poisson's, and private numbers in the update.

Each promise is a check that passes on the real engine. Beside it a bug is planted, and the same check must fail.

Statistical checks reject at |z| > 5.4, which a right implementation does with probability below 1e-7 for each.
"""

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_dp import PrivacyEngine, PrivateOptimizer
from lora_dp.engine.logical_batch import LogicalBatch
from lora_dp.privacy.mechanism import Mechanism
from lora_dp.privacy.randomness import SeededSource
from lora_dp.privacy.sampling import PoissonSampler
from tests.models import (
    assert_refuses,
    cross_entropy,
    examples,
    flat,
    mlp,
    one_by_one,
    private_run,
    snapshot,
    take_step,
)
from tests.support import RULES, Z_LIMIT, assert_close, brute_force, clip_and_sum, make_private

# Poisson batches


def check_poisson(sampler: PoissonSampler) -> None:
    """Batch sizes are binomial; an example's place says nothing of its neighbour's, nor of its next: four z-tests."""
    size, rate, steps = sampler.size, sampler.sample_rate, sampler.steps
    drawn = torch.zeros(steps, size, dtype=torch.float64)
    for row, batch in zip(drawn, sampler, strict=True):
        row[batch] = 1
    variance = rate * (1 - rate)
    sizes = drawn.sum(1)
    tests = {
        "mean batch size": float((sizes.mean() - size * rate) / math.sqrt(size * variance / steps)),
        # A binomial of this size is nearly normal: its sample variance has variance 2 · var² / steps, nearly.
        "variance of the batch size": float((sizes.var() / (size * variance) - 1) * math.sqrt(steps / 2)),
    }
    centred = (drawn - rate) / math.sqrt(variance)
    for name, product in (("neighbours", centred[:, 1:] * centred[:, :-1]), ("next", centred[1:] * centred[:-1])):
        tests[name] = float(product.sum() / math.sqrt(product.numel()))
    for name, z in tests.items():
        assert abs(z) < Z_LIMIT, f"{name}: z = {z:.1f}"


def test_batches_are_poisson():
    check_poisson(PoissonSampler(50, 0.2, 2000, SeededSource(3)))


def test_shuffled_batches_are_caught(bug):
    def shuffled(self: PoissonSampler) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.steps // 5):
            yield from torch.randperm(self.size, generator=generator).view(5, -1).tolist()

    bug.setattr(PoissonSampler, "__iter__", shuffled)
    with pytest.raises(AssertionError, match="variance"):
        check_poisson(PoissonSampler(50, 0.2, 2000, SeededSource(3)))


def test_fixed_size_batches_are_caught(bug):
    bug.setattr(PoissonSampler, "draw", lambda self: random.Random(self.source.uniform(1).item()).sample(range(50), 10))
    with pytest.raises(AssertionError, match="variance"):
        check_poisson(PoissonSampler(50, 0.2, 2000, SeededSource(3)))


def test_sampling_each_example_for_two_steps_is_caught(bug):
    draw, last = PoissonSampler.draw, []

    def planted(self: PoissonSampler) -> list[int]:
        last.append(draw(self) if len(last) % 2 == 0 else last[-1])
        return last[-1]

    bug.setattr(PoissonSampler, "draw", planted)
    with pytest.raises(AssertionError, match="next"):
        check_poisson(PoissonSampler(50, 0.2, 2000, SeededSource(3)))


def check_foreign_loader_is_refused() -> None:
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=0))
    before = snapshot(model)
    for batch in DataLoader(loader.dataset, batch_size=8, shuffle=True):
        cross_entropy(model, batch).backward()
        assert_refuses(RuntimeError, "train on the loader that make_private returned", optimizer.step)
    assert optimizer.ledger.steps == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_foreign_loader_is_refused():
    check_foreign_loader_is_refused()


def test_accepting_a_foreign_loader_is_caught(bug):
    bug.setattr(LogicalBatch, "check_drawn", lambda self: None)
    with pytest.raises(AssertionError):
        check_foreign_loader_is_refused()


# Empty batches


def check_empty_batches_are_steps() -> None:
    engine = PrivacyEngine("rdp", reproducible_seed=5)
    model, optimizer, loader = private_run(engine, size=20, batch_size=1, lr=0.1)
    shown, moved_by_empty, after = 0, 0, model[2].weight.detach().clone()
    for batch in loader.take(30):
        # Between two batches parameters move only if an empty draw lay there.
        moved_by_empty += not torch.equal(model[2].weight, after)
        cross_entropy(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        shown, after = shown + 1, model[2].weight.detach().clone()
    assert 0 < shown < 30
    assert moved_by_empty > 0
    assert optimizer.steps_taken == engine.ledger.steps == 30


def test_empty_batches_are_steps():
    check_empty_batches_are_steps()


def test_skipping_empty_batches_is_caught(bug):
    bug.setattr(PrivateOptimizer, "step_on_empty_batch", lambda self: None)
    with pytest.raises(AssertionError):
        check_empty_batches_are_steps()


# Dividing by the expected batch size


def check_divisor_is_public() -> None:
    """The same examples give the same update whatever number of them was drawn: the divisor is L."""
    batch, bound = examples(3), 0.2
    model = mlp()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = clip_and_sum(brute_force(model, cross_entropy, one_by_one(batch), names), "flat", bound, str)
    before = snapshot(model)
    take_step(model, make_private(model, batch_size=8, max_grad_norm=bound, lr=1.0), batch)
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters() if name in names}
    assert_close(flat(moved), flat(expected) / 8)


def test_divisor_is_the_expected_batch():
    check_divisor_is_public()


def test_dividing_by_the_actual_batch_is_caught(bug):
    release = PrivateOptimizer._release

    def planted(self: PrivateOptimizer) -> None:
        self._expected_batch_size = max(self.batch.examples, 1)
        release(self)

    bug.setattr(PrivateOptimizer, "_release", planted)
    with pytest.raises(AssertionError):
        check_divisor_is_public()


# Nothing private steers the update


def check_noise_and_divisor_ignore_the_data(rule: str) -> None:
    """With one seed, what is released less the clipped sum is the same for any two data sets."""

    def noise(n: int, magnitude: float) -> Tensor:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            return magnitude * cross_entropy(model, batch)

        released = []
        for sigma in (2.0, 0.0):
            model = mlp()
            optimizer = make_private(model, batch_size=8, max_grad_norm=0.5, clipping=rule, noise_multiplier=sigma)
            released.append(flat(take_step(model, optimizer, examples(n), loss)))
        return released[0] - released[1]

    # The two differ by the rounding of the release to float32 only.
    assert (noise(2, 0.01) - noise(7, 100.0)).abs().max() < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_noise_and_divisor_ignore_the_data(rule):
    check_noise_and_divisor_ignore_the_data(rule)


def test_a_threshold_read_off_the_data_is_caught(bug):
    coefficients = Mechanism.coefficients

    def planted(self: Mechanism, sq_norms: Tensor, layers: Tensor, count: int, mask: Tensor | None) -> Tensor:
        object.__setattr__(self.rule, "max_grad_norm", float(sq_norms.sqrt().median()))
        return coefficients(self, sq_norms, layers, count, mask)

    bug.setattr(Mechanism, "coefficients", planted)
    with pytest.raises(AssertionError):
        check_noise_and_divisor_ignore_the_data("flat")
