"""The silent ways to break differential privacy (design: what is promised).

Each promise is a check that passes on the real engine. Beside it a bug is planted, and the same check must fail.

Statistical checks reject at |z| > 5.4, which a right implementation does with probability below 1e-7 for each.
"""

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lora_dp.clipping
import lora_dp.coverage
import lora_dp.engine
import lora_dp.mechanism
import lora_dp.optimizer
import lora_dp.recording
from lora_dp import DPLinear, DPLoRALinear, Ledger, PrivacyEngine, PrivateOptimizer
from lora_dp.clipping import AutomaticClipping, FlatClipping, PerLayerClipping, make_clip_rule
from lora_dp.mechanism import Mechanism
from lora_dp.noise import grid_step
from lora_dp.ops.per_example_norm import ghost_sq_norm
from lora_dp.randomness import SecureSource, SeededSource
from lora_dp.recording import Slot
from lora_dp.sampling import PoissonSampler
from tests.models import (
    assert_refuses,
    cross_entropy,
    examples,
    flat,
    loader_of,
    mlp,
    one_by_one,
    private_run,
    pure_noise,
    snapshot,
    take_step,
)
from tests.support import assert_close, brute_force, clip_and_sum, make_private

RULES = ["flat", "per_layer", "automatic"]
Z_LIMIT = 5.4


def check_deviation(values: Tensor, expected: float) -> None:
    """Mean zero and deviation ``expected`` of independent normals: two z-tests, false alarm below 2e-7."""
    n = values.numel()
    assert abs(float(values.mean())) < Z_LIMIT * expected / math.sqrt(n)
    z = (float(values.square().mean()) / expected**2 - 1) * math.sqrt(n / 2)
    assert abs(z) < Z_LIMIT, f"deviation {float(values.std()):.4g} instead of {expected:.4g}"


@pytest.fixture
def bug(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Plants a bug for one test."""
    return monkeypatch


# Clipping each example, not the batch


def check_each_example_is_clipped(rule: str) -> None:
    model, batch, bound = mlp(), examples(7), 0.2
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    gradients = brute_force(model, cross_entropy, one_by_one(batch), names)
    expected = clip_and_sum(gradients, rule, bound, lambda name: name.rpartition(".")[0])
    optimizer = make_private(model, batch_size=7, max_grad_norm=bound, clipping=rule)
    assert_close(flat(take_step(model, optimizer, batch)), flat(expected))


@pytest.mark.parametrize("rule", RULES)
def test_each_example_is_clipped(rule):
    check_each_example_is_clipped(rule)


@pytest.mark.parametrize("rule", RULES)
def test_clipping_the_batch_is_caught(rule, bug):
    def clip_the_sum(self: Mechanism, sums: list[Tensor]) -> list[Tensor]:
        norm = math.sqrt(sum(float(s.square().sum()) for s in sums))
        return [s * min(1.0, self.rule.max_grad_norm / norm) for s in sums]

    bug.setattr(Mechanism, "coefficients", lambda self, sq_norms, layers, count, mask: torch.ones_like(sq_norms))
    bug.setattr(Mechanism, "release", clip_the_sum)
    with pytest.raises(AssertionError):
        check_each_example_is_clipped(rule)


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
        self.expected_batch_size = max(self._examples, 1)
        release(self)

    bug.setattr(PrivateOptimizer, "_release", planted)
    with pytest.raises(AssertionError):
        check_divisor_is_public()


# Noise matched to sensitivity


def check_noise_matches_sensitivity(rule: str) -> None:
    """No example moves the sum by more than C, some come near it, and the noise has deviation σ · C."""
    sigma, bound = 1.3, 0.7
    model = mlp()
    optimizer = make_private(model, batch_size=5, max_grad_norm=bound, clipping=rule, lr=0.0)
    largest = 0.0
    for magnitude in (0.1, 1.0, 10.0):
        for example in one_by_one(examples(8)):
            norm = float(flat(take_step(model, optimizer, example,
                                        lambda m, b, s=magnitude: s * cross_entropy(m, b))).norm())
            assert norm <= bound * (1 + 1e-7), f"one example moved the sum by {norm}, C is {bound}"
            largest = max(largest, norm)
    assert largest > 0.95 * bound
    optimizer = make_private(
        model, batch_size=5, max_grad_norm=bound, clipping=rule, lr=0.0, noise_multiplier=sigma)
    check_deviation(pure_noise(model, optimizer, 400), sigma * bound)


@pytest.mark.parametrize("rule", RULES)
def test_noise_matches_sensitivity(rule):
    check_noise_matches_sensitivity(rule)


@pytest.mark.parametrize("rule", RULES)
def test_noise_that_forgets_the_bound_is_caught(rule, bug):
    bug.setattr(Mechanism, "noise_std", lambda self, size: self.noise_multiplier)
    with pytest.raises(AssertionError, match="deviation"):
        check_noise_matches_sensitivity(rule)


def test_noise_divided_among_layers_is_caught(bug):
    bug.setattr(Mechanism, "noise_std",
                lambda self, size: self.noise_multiplier * self.rule.sensitivity / math.sqrt(2))
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
    bug.setattr(PrivateOptimizer, "_check_drawn", lambda self: None)
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


# Gradient accumulation


def check_one_noise_draw_for_a_logical_batch() -> None:
    sigma, bound = 1.1, 0.6
    model = mlp()
    optimizer = make_private(model, batch_size=6, max_grad_norm=bound, noise_multiplier=sigma, lr=0.0)
    x, _ = examples(2)
    rows = []
    for _ in range(200):
        optimizer.expect_batch(6)
        for micro in range(3):
            (0 * model(x)).sum().backward()
            if micro < 2:
                optimizer.signal_skip_step()
            optimizer.step()
        rows.append(flat({name: p.grad for name, p in model.named_parameters() if p.grad is not None}) * 6)
    assert optimizer.ledger.steps == 200
    check_deviation(torch.stack(rows), sigma * bound)


def test_one_noise_draw_for_a_logical_batch():
    check_one_noise_draw_for_a_logical_batch()


def test_noise_for_each_micro_batch_is_caught(bug):
    accumulate = PrivateOptimizer._accumulate

    def planted(self: PrivateOptimizer, mask: Tensor | None) -> None:
        accumulate(self, mask)
        self._sums = dict(zip(self._sums, self.mechanism.release(list(self._sums.values())), strict=True))

    bug.setattr(PrivateOptimizer, "_accumulate", planted)
    with pytest.raises(AssertionError, match="deviation"):
        check_one_noise_draw_for_a_logical_batch()


# An example that is not finite


def check_non_finite_examples_contribute_zero(method: str, rule: str) -> None:
    x, y = examples(6)
    clean = mlp()
    expected = flat(take_step(
        clean, make_private(clean, batch_size=6, max_grad_norm=0.3, norm_method=method, clipping=rule,
                            loss_reduction="sum"), (x[2:], y[2:]), lambda m, b: 4 * cross_entropy(m, b)))
    x[0], x[1] = math.nan, math.inf
    model = mlp()
    optimizer = make_private(
        model, batch_size=6, max_grad_norm=0.3, norm_method=method, clipping=rule, loss_reduction="sum")
    actual = flat(take_step(model, optimizer, (x, y), lambda m, b: 6 * cross_entropy(m, b)))
    assert torch.isfinite(actual).all()
    assert_close(actual, expected)
    assert optimizer.steps_taken == optimizer.ledger.steps == 1
    assert int(optimizer._non_finite_examples) == 2


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_non_finite_examples_contribute_zero(method, rule):
    check_non_finite_examples_contribute_zero(method, rule)


def test_coefficients_that_let_nan_through_are_caught(bug):
    bug.setattr(lora_dp.clipping, "_exclude_non_finite", lambda coefficients, sq_norms: coefficients)
    with pytest.raises(AssertionError):
        check_non_finite_examples_contribute_zero("direct", "flat")


def test_zero_times_nan_is_caught(bug):
    bug.setattr(lora_dp.recording, "clipped_sum_kept", lambda g, c: torch.einsum("n,n...->...", c, g))
    with pytest.raises(AssertionError):
        check_non_finite_examples_contribute_zero("direct", "flat")


# Every trainable parameter is covered


def check_uncovered_parameter_is_refused() -> None:
    model = nn.Sequential(DPLoRALinear(6, 8, r=2), nn.Linear(8, 3))
    assert_refuses(ValueError, "'1.weight' is trainable", lambda: make_private(model, batch_size=4))


def test_uncovered_parameter_is_refused_by_name():
    check_uncovered_parameter_is_refused()


def test_overlooking_an_uncovered_parameter_is_caught(bug):
    cover = lora_dp.coverage.cover
    bug.setattr(lora_dp.engine, "cover", lambda model: cover(model[0]))
    bug.setattr(lora_dp.optimizer, "check_optimizer", lambda optimizer, covered: None)
    with pytest.raises(AssertionError):
        check_uncovered_parameter_is_refused()


def check_parameter_added_later_is_refused() -> None:
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5, 7))]})
    before = snapshot(model)
    assert_refuses(ValueError, "shape (5, 7)", lambda: take_step(model, optimizer, examples(4)))
    assert optimizer.ledger.steps == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_parameter_added_later_is_refused():
    check_parameter_added_later_is_refused()


def test_forgetting_parameters_added_later_is_caught(bug):
    bug.setattr(lora_dp.optimizer, "check_optimizer", lambda optimizer, covered: None)
    with pytest.raises(AssertionError):
        check_parameter_added_later_is_refused()


# Nothing mixes examples


def check_batch_norm_is_refused() -> None:
    for norm in (nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False), nn.SyncBatchNorm(8).requires_grad_(False)):
        model = nn.Sequential(DPLoRALinear(6, 8, r=2), nn.Sequential(norm.requires_grad_(False)))
        assert_refuses(ValueError, f"'1.0' is a {type(norm).__name__}", lambda m=model: make_private(m, batch_size=4))


def test_batch_norm_is_refused_by_name():
    check_batch_norm_is_refused()


def test_overlooking_batch_norm_is_caught(bug):
    bug.setattr(nn.modules.batchnorm, "_BatchNorm", type("Never", (), {}))
    with pytest.raises(AssertionError):
        check_batch_norm_is_refused()


class Balanced(nn.Module):
    """Two experts, with a balancing loss over the batch as mixtures of experts have it."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = DPLinear(6, 2), DPLinear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        share = self.router(x).softmax(-1)
        loss = F.cross_entropy(self.head(x) * share[:, :1], labels) + share.mean(0).square().sum()
        return {"loss": loss, "logits": self.head(x)}


def check_balancing_loss_is_refused() -> None:
    torch.manual_seed(0)
    model = Balanced().train()
    make_private(model, batch_size=4)
    x, y = examples(4)
    assert_refuses(RuntimeError, "The loss mixes examples: the gradient of example 0 at 'router'", lambda: model(x, y))


def test_balancing_loss_is_refused_on_the_first_batch():
    check_balancing_loss_is_refused()


def test_no_isolation_check_is_caught(bug):
    bug.setattr(lora_dp.engine, "check_isolation", lambda *args, **options: None)
    with pytest.raises(AssertionError):
        check_balancing_loss_is_refused()


# One adapter used twice


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = DPLoRALinear(6, 6, r=2)
        nn.init.normal_(self.layer.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def check_uses_add_up_before_the_norm(method: str) -> None:
    torch.manual_seed(0)
    model, batch = Twice().train(), examples(5)
    gradients = brute_force(model, cross_entropy, one_by_one(batch), {"layer.lora_A", "layer.lora_B"})
    expected = clip_and_sum(gradients, "flat", 0.05, str)
    optimizer = make_private(model, batch_size=5, max_grad_norm=0.05, norm_method=method)
    assert_close(flat(take_step(model, optimizer, batch)), flat(expected))


@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_uses_add_up_before_the_norm(method):
    check_uses_add_up_before_the_norm(method)


def test_adding_norms_of_uses_is_caught(bug):
    def planted(self: Slot) -> Tensor:
        norms = torch.stack([ghost_sq_norm(*pair) for pair in self.pairs]).sum(0)
        self._settle()
        return norms

    bug.setattr(Slot, "sq_norms", planted)
    with pytest.raises(AssertionError):
        check_uses_add_up_before_the_norm("ghost")


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


# Unpredictable noise and batches, unless a seed is asked for


def run_of(seed: int | None) -> tuple[list[int], Tensor]:
    """Which examples three batches had, and the noise of three empty ones, with every usual seed set."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=seed), size=64, batch_size=32)
    members = [int(index) for x, _ in loader.take(3) for index in torch.nonzero(
        (x[:, None] == loader.dataset.tensors[0]).all(-1))[:, 1]]
    optimizer._drawn.clear()
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
    bug.setattr(lora_dp.engine, "SecureSource", lambda: SeededSource(torch.initial_seed()))
    with pytest.raises(AssertionError):
        check_unpredictable()


def test_seeded_run_repeats_bit_for_bit():
    check_reproducible()


def test_seed_that_does_not_reach_the_source_is_caught(bug):
    bug.setattr(lora_dp.engine, "SeededSource", lambda seed: SecureSource())
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
        step = grid_step(mechanism.noise_std(20001))
        released, = mechanism.release([value.clone()])
        assert released.dtype == dtype
        steps[name] = released.double() / step
        assert torch.equal(steps[name], steps[name].round())
    assert step <= 1.7 * 0.9 * 2.0**-32
    if dtype == torch.float64:
        difference = (first.double() / step).round() - (second.double() / step).round()
        assert torch.equal(steps["first"] - steps["second"], difference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_release_is_on_the_grid(dtype):
    check_release_is_on_the_grid(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_floating_point_noise_is_caught(dtype, bug):
    bug.setattr(lora_dp.mechanism, "add_noise",
                lambda value, std, source: value + std * source.normal(value.numel()).to(value.dtype))
    with pytest.raises(AssertionError):
        check_release_is_on_the_grid(dtype)


# The ledger is never behind


class Crash(Exception):
    pass


def check_ledger_is_never_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: Mechanism, sums: list[Tensor]) -> list[Tensor]:
        raise Crash

    for step in (lambda m, o: take_step(m, o, examples(4)), lambda m, o: o.step_on_empty_batch()):
        model = mlp()
        optimizer = make_private(model, batch_size=4, noise_multiplier=1.0)
        step(model, optimizer)
        assert optimizer.ledger.steps == 1
        with monkeypatch.context() as during:
            during.setattr(Mechanism, "release", crash)
            with pytest.raises(Crash):
                step(model, optimizer)
        assert optimizer.ledger.steps == 2


def test_ledger_is_never_behind(monkeypatch):
    check_ledger_is_never_behind(monkeypatch)


def test_entering_a_step_after_its_release_is_caught(bug):
    release = PrivateOptimizer._release

    def planted(self: PrivateOptimizer) -> None:
        real, self.ledger = self.ledger, Ledger()
        try:
            release(self)
        finally:
            self.ledger = real
        self.ledger.append(self.event)

    bug.setattr(PrivateOptimizer, "_release", planted)
    with pytest.raises(AssertionError):
        check_ledger_is_never_behind(bug)


# Mixed precision


def check_large_half_gradients_are_clipped_right(kind: str, method: str) -> None:
    """Gradients whose squared norm is beyond 65504, or needs more digits than bfloat16 has, keep norm C."""
    bound = 0.5
    model = mlp(dtype=torch.float16 if kind == "float16" else torch.float32)
    optimizer = make_private(model, batch_size=4, max_grad_norm=bound, norm_method=method, lr=0.0)
    norms = []
    for x, y in one_by_one(examples(12)):
        optimizer.expect_batch(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            logits = model((x * 4).to(model[0].weight.dtype))
            loss = 120 * F.cross_entropy(logits.float(), (y + logits.argmin()) % 3)
        loss.backward()
        slots = list(optimizer._recorder.current.slots.values())
        with torch.no_grad():
            norms.append(math.sqrt(sum(float(slot.sq_norms().sum()) for slot in slots)))
        optimizer.signal_skip_step()
        optimizer.step()
        released = flat({str(key): value for key, value in optimizer._sums.items()})
        optimizer._collect()
        if norms[-1] > bound:
            assert bound * (1 - 1e-4) < float(released.norm()) <= bound * (1 + 1e-7)
    assert max(norms) > 256


@pytest.mark.parametrize("method", ["direct", "ghost"])
@pytest.mark.parametrize("kind", ["float16", "autocast"])
def test_large_half_gradients_are_clipped_right(kind, method):
    check_large_half_gradients_are_clipped_right(kind, method)


@pytest.mark.parametrize(("kind", "dtype"), [("float16", torch.float16), ("autocast", torch.bfloat16)])
def test_norms_in_half_precision_are_caught(kind, dtype, bug):
    norms = Slot.sq_norms
    bug.setattr(Slot, "sq_norms", lambda self: norms(self).to(dtype).float())
    with pytest.raises(AssertionError):
        check_large_half_gradients_are_clipped_right(kind, "direct")


def check_sums_keep_float32_inside_autocast(method: str) -> None:
    """backward() and step() called inside autocast give the bits that they give outside."""
    released = []
    for inside in (False, True):
        model, (x, y) = mlp(), examples(50)
        optimizer = make_private(model, batch_size=50, max_grad_norm=0.5, norm_method=method)
        optimizer.expect_batch(50)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
            optimizer.step()
        released.append(flat({name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(*released)


@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_sums_keep_float32_inside_autocast(method):
    check_sums_keep_float32_inside_autocast(method)


def test_half_sums_inside_autocast_are_caught(bug):
    bug.setattr(lora_dp.recording, "clipped_sum_kept", lambda g, c: (c @ g.flatten(1)).view(g.shape[1:]))
    with pytest.raises(AssertionError):
        check_sums_keep_float32_inside_autocast("direct")


# What the account says is what was done


def check_ledger_describes_the_run() -> None:
    engine = PrivacyEngine("rdp", reproducible_seed=1)
    model, optimizer, loader = private_run(engine, size=40, batch_size=8, noise_multiplier=1.5, max_grad_norm=0.4, lr=0)
    optimizer._drawn.clear()
    noise = pure_noise(model, optimizer, 300)
    ((event, count),) = engine.ledger.entries
    assert count == 300
    assert event.sample_rate == 8 / 40
    check_deviation(noise, event.noise_multiplier * 0.4)


def test_ledger_describes_the_run():
    check_ledger_describes_the_run()


def test_an_account_of_more_noise_than_there_is_is_caught(bug):
    std = Mechanism.noise_std
    bug.setattr(Mechanism, "noise_std", lambda self, size: std(self, size) / 1.1)
    with pytest.raises(AssertionError, match="deviation"):
        check_ledger_describes_the_run()


def test_a_wrong_sample_rate_is_caught(bug):
    event = lora_dp.engine.PoissonGaussian
    bug.setattr(lora_dp.engine, "PoissonGaussian", lambda sigma, rate: event(sigma, rate / 2))
    with pytest.raises(AssertionError):
        check_ledger_describes_the_run()


def test_loader_of_its_own_rate():
    """The data set's size is the one thing about the data that the account uses."""
    _, optimizer, loader = private_run(PrivacyEngine("rdp", reproducible_seed=1), size=33, batch_size=11)
    assert optimizer.event.sample_rate == loader.sample_rate == 11 / 33
    assert loader_of(33, 11).batch_size == optimizer.expected_batch_size == 11
