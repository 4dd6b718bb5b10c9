"""Noise on a grid, and the mechanism that matches it to the sensitivity."""

import contextlib
import math
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import DPLinear, PrivacyEngine
from lora_dp.ops.registry import reference_only
from lora_dp.privacy.clipping import make_clip_rule
from lora_dp.privacy.mechanism import Mechanism
from lora_dp.privacy.noise import add_noise, grid_sensitivity, grid_step
from lora_dp.privacy.randomness import SeededSource
from tests.models import assert_refuses, examples, flat, mlp
from tests.support import check_deviation, make_private


class Silence:
    """A source whose draws are all zero: what is left of a release is the rounded value. It keeps the scale."""

    scale = 0.0

    def rounded_gaussians(self, shapes: Sequence[Sequence[int]], scale: float, device: torch.device) -> list[Tensor]:
        self.scale = scale
        return [torch.zeros(torch.Size(shape), dtype=torch.int64) for shape in shapes]


@given(std=st.floats(1e-12, 1e12), sensitivity=st.floats(1e-12, 1e12))
def test_step_is_a_power_of_two_below_the_deviation(std, sensitivity):
    step = grid_step(std, sensitivity)
    assert math.frexp(step)[0] == 0.5
    assert std * 2.0**-33 < step
    assert step <= std * 2.0**-32 or (step <= sensitivity * 2.0**-40 and std < sensitivity * 2.0**-7)
    assert sensitivity / step <= 2.0**41 or std >= sensitivity * 2.0**-8


@pytest.mark.parametrize("sigma", [1e-2, 1e-4, 1e-6, 1e-8, 1e-11, 1e-13])
@pytest.mark.parametrize("way", [contextlib.nullcontext, reference_only])
def test_hardly_any_noise_leaves_the_gradients_as_they_are(sigma, way):
    """As set to look for a fault: sums of many grid steps neither saturate nor change sign."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(DPLinear(1, 1)).train()
    optimizer = make_private(model, batch_size=64, noise_multiplier=sigma, max_grad_norm=1.0, loss_reduction="sum")
    optimizer.expect_batch(64)
    with way():
        (100 * model(torch.ones(64, 1))).sum().backward()
        optimizer.step()
    for parameter in model.parameters():
        assert float(parameter.grad) == pytest.approx(math.sqrt(0.5), abs=1e-5 + 0.1 * sigma)


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("bound", [0.999, 1.0, 1.3])
@pytest.mark.parametrize("sigma", [0.999, 1.0, 7.0, 0.9999 * 2.0**-12, 1e-6, 2.0**-45])
def test_the_grid_of_a_step_is_that_of_a_release(sigma, bound, size):
    """Step and deviation in steps: std / step of them, and one at least."""
    source = Silence()
    mechanism = Mechanism(make_clip_rule("flat", bound), sigma, source)
    std, (step, scale) = mechanism.noise_std(size), mechanism.grid(size)
    assert step == grid_step(std, bound) and scale == max(std / step, 1)
    assert (scale == 1) == (sigma == 2.0**-45)
    # An odd number of steps is on this grid, and on none that is coarser.
    value = torch.full((size,), 3 * step, dtype=torch.float64)
    assert torch.equal(mechanism.release([value])[0], value) and source.scale == scale
    half = torch.full((size,), 0.6 * step, dtype=torch.float64)
    assert torch.equal(mechanism.release([half])[0], torch.full((size,), step, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_beyond_64_bits_of_steps_keeps_its_sign(dtype):
    """It is cut at 2⁶² steps, here of 2⁻³²: noise added to it does not wrap around."""
    (noisy,) = add_noise([torch.tensor([1e30, -1e30, math.inf], dtype=dtype)], 1.0, 1.0, SeededSource(3))
    assert noisy.tolist() == pytest.approx([2.0**30, -(2.0**30), 2.0**30], rel=1e-6)


def test_noise_of_deviation_one_is_noise_too():
    value = torch.zeros(10_000, dtype=torch.float64)
    (noisy,) = add_noise([value], 1.0, 1.0, SeededSource(3))
    check_deviation(noisy, 1.0)
    assert add_noise([], 1.0, 1.0, SeededSource(3)) == []


def test_without_noise_there_is_no_grid():
    assert Mechanism(make_clip_rule("flat", 0.3), 0.0, Silence()).grid(5) == (1.0, 0.0)


def test_the_least_noise_has_64_bits_below_it():
    least = sys.float_info.min * 2.0**64
    rule = make_clip_rule("flat", 1.0)
    assert Mechanism(rule, 1.001 * least, SeededSource(0)).noise_std(1) == pytest.approx(1.001 * least)
    assert_refuses(
        ValueError, "is noise too small", lambda: Mechanism(rule, 0.999 * least, SeededSource(0)).noise_std(1)
    )


def test_noise_that_underflows_is_refused():
    mechanism = Mechanism(make_clip_rule("flat", 1e-20), 1e-290, SeededSource(0))
    assert_refuses(ValueError, "is noise too small for floating-point numbers", lambda: mechanism.noise_std(3))


@settings(deadline=None)
@given(sigma=st.floats(1e-12, 100), bound=st.floats(1e-3, 1e3), size=st.integers(1, 10**9))
@example(sigma=1e-9, bound=1.0, size=10**9)
def test_sensitivity_covers_the_rounding_of_every_coordinate(sigma, bound, size):
    """Two neighbouring sums are rounded by half a step in each coordinate, in opposite directions at worst."""
    sensitivity = grid_sensitivity(bound, sigma, size)
    rounding = math.sqrt(size) * grid_step(sigma * sensitivity, sensitivity)
    assert sensitivity >= (bound + rounding) * (1 - 1e-15)
    assert sensitivity <= bound * 1.01


def test_rounded_neighbours_stay_within_the_grid_sensitivity():
    sigma, size = 50.0, 40_000
    mechanism = Mechanism(make_clip_rule("flat", 1.0), sigma, Silence())
    generator = torch.Generator().manual_seed(0)
    apart = torch.randn(size, generator=generator, dtype=torch.float64)
    first = torch.randn(size, generator=generator, dtype=torch.float64)
    left, right = mechanism.release([first])[0], mechanism.release([first + apart / apart.norm()])[0]
    assert not torch.equal(left, first)
    assert (left - right).norm() <= mechanism.noise_std(size) / sigma


@pytest.mark.parametrize(("sigma", "size"), [(2.0**31, 1), (1e6, 10**9), (2.0**21, 2**20), (1e300, 3)])
def test_noise_whose_rounding_exceeds_the_sensitivity_is_refused(sigma, size):
    """√size · σ · 2⁻³² ≥ 1/2: the grid would be as coarse as what it rounds."""
    words = f"noise_multiplier {sigma:g} is too large for a sum of {size} numbers: lower it."
    assert_refuses(ValueError, words, lambda: grid_sensitivity(1.0, sigma, size))
    mechanism = Mechanism(make_clip_rule("flat", 1.0), sigma, SeededSource(0))
    assert_refuses(ValueError, words, lambda: mechanism.noise_std(size))


def test_the_largest_noise_is_accepted():
    assert grid_sensitivity(1.0, 2.0**31 * (1 - 2.0**-20), 1) == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_the_shape_is_kept_and_the_release_in_float64(shape, dtype):
    value = torch.ones(shape, dtype=dtype)
    (noisy,) = add_noise([value], 0.5, 1.0, SeededSource(0))
    assert noisy.shape == shape and noisy.dtype == torch.float64
    assert torch.equal(value, torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_noise_the_value_is_released_as_it_is(dtype):
    value = torch.tensor([0.1, -0.3], dtype=dtype)
    mechanism = Mechanism(make_clip_rule("flat", 1.0), 0.0, SeededSource(0))
    (released,) = mechanism.release([value])
    assert released.dtype == torch.float64 and torch.equal(released, value.double())
    assert mechanism.noise_std(2) == 0.0


@pytest.mark.parametrize("sigma", [0.5, 3.0])
@pytest.mark.parametrize("rule", ["flat", "per_layer", "automatic"])
def test_deviation_is_sigma_times_the_sensitivity(rule, sigma):
    mechanism = Mechanism(make_clip_rule(rule, 0.7), sigma, SeededSource(1))
    assert mechanism.noise_std(1000) == pytest.approx(sigma * 0.7, rel=1e-6)
    assert mechanism.noise_std(1000) > sigma * 0.7  # the grid's share


def test_every_tensor_of_a_release_gets_noise_of_its_own():
    sums = [torch.zeros(4, 5), torch.zeros(20)]
    first, second = Mechanism(make_clip_rule("flat", 1.0), 1.0, SeededSource(1)).release(sums)
    assert first.shape == (4, 5) and second.shape == (20,)
    assert not torch.isclose(first.flatten(), second).any()


def test_mask_zeroes_coefficients():
    mechanism = Mechanism(make_clip_rule("flat", 1.0), 1.0, SeededSource(1))
    coefficients = mechanism.coefficients(
        torch.full((2, 3), 0.01), torch.tensor([0, 1]), 2, torch.tensor([True, False, True])
    )
    assert coefficients.tolist() == [[1, 0, 1]] * 2


@pytest.mark.parametrize(
    ("sigma", "bound", "words"),
    [
        (-1.0, 1.0, "noise_multiplier must be"),
        (math.nan, 1.0, "noise_multiplier must be"),
        (math.inf, 1.0, "noise_multiplier must be"),
        (1.0, math.inf, "set a finite max_grad_norm"),
    ],
)
def test_bad_noise_is_refused(sigma, bound, words):
    assert_refuses(ValueError, words, lambda: Mechanism(make_clip_rule("flat", bound), sigma, SeededSource(0)))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("hook", [True, False])
@pytest.mark.parametrize("expected", [1, 3, 7])
def test_the_last_bits_do_not_tell_whether_a_batch_was_empty(optimizer, hook, expected):
    """Noise alone, and noise on sums of zero: the same key, the same numbers, whatever takes the step."""
    found = []
    for empty in (True, False):
        model = mlp()
        _, private, _ = PrivacyEngine(reproducible_seed=7).make_private(
            model=model,
            optimizer=optimizer([p for p in model.parameters() if p.requires_grad], lr=0.3),
            data_loader=DataLoader(TensorDataset(torch.zeros(expected)), batch_size=expected),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        if hook:
            private.register_step_post_hook(lambda *_: None)
        for _ in range(2):
            if empty:
                private.step_on_empty_batch()
            else:
                private.expect_batch(expected)
                private.backward(model(examples(expected)[0]).sum(1))
                private.step(mask=torch.zeros(expected, dtype=torch.bool))
        found.append(flat({name: p.detach() for name, p in model.named_parameters()}))
    assert found[0].equal(found[1])
