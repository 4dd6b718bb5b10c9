"""Noise on a grid, and the mechanism that matches it to the sensitivity."""

import contextlib
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import DPLinear, PrivacyEngine
from lora_dp.ops.registry import reference_only
from lora_dp.privacy.noise import add_noise, grid_sensitivity, grid_step
from lora_dp.privacy.randomness import SeededSource
from tests.models import examples, flat, mlp
from tests.support import check_deviation, make_private


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
    optimizer.batch.expect(64)
    with way():
        (100 * model(torch.ones(64, 1))).sum().backward()
        optimizer.step()
    for parameter in model.parameters():
        assert float(parameter.grad) == pytest.approx(math.sqrt(0.5), abs=1e-5 + 0.1 * sigma)


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


@settings(deadline=None)
@given(sigma=st.floats(1e-12, 100), bound=st.floats(1e-3, 1e3), size=st.integers(1, 10**9))
@example(sigma=1e-9, bound=1.0, size=10**9)
def test_sensitivity_covers_the_rounding_of_every_coordinate(sigma, bound, size):
    """Two neighbouring sums are rounded by half a step in each coordinate, in opposite directions at worst."""
    sensitivity = grid_sensitivity(bound, sigma, size)
    rounding = math.sqrt(size) * grid_step(sigma * sensitivity, sensitivity)
    assert sensitivity >= (bound + rounding) * (1 - 1e-15)
    assert sensitivity <= bound * 1.01


def test_the_largest_noise_is_accepted():
    assert grid_sensitivity(1.0, 2.0**31 * (1 - 2.0**-20), 1) == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_the_shape_is_kept_and_the_release_in_float64(shape, dtype):
    value = torch.ones(shape, dtype=dtype)
    (noisy,) = add_noise([value], 0.5, 1.0, SeededSource(0))
    assert noisy.shape == shape and noisy.dtype == torch.float64
    assert torch.equal(value, torch.ones(shape, dtype=dtype))


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
                private.batch.expect(expected)
                private.backward(model(examples(expected)[0]).sum(1))
                private.step(mask=torch.zeros(expected, dtype=torch.bool))
        found.append(flat({name: p.detach() for name, p in model.named_parameters()}))
    assert found[0].equal(found[1])
