"""The private update: native against plain torch in float64, against torch's own optimizers, and what it promises."""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dp.kernels.optimizer_rows import adam_row, sgd_row
from lora_dp.ops import private_update
from lora_dp.ops.native import native
from lora_dp.ops.private_update import ExampleSum, can_update, private_update_
from lora_dp.ops.registry import reference_only
from lora_dp.ops.rounded_gaussian import rounded_gaussian_
from lora_dp.ops.sampling_bits import sampling_bits_
from lora_dp.privacy.filtering import GaussianFilter
from tests.grids import pairwise
from tests.ops.update_problem import DTYPES, KEY, OPTIMIZERS, SHAPES, STEP, Problem, plain_sgd, same_bits

INSTRUCTIONS = ["portable", "avx2", "avx512"]


@pytest.mark.parametrize(
    ("optimizer", "dtype", "examples", "strength", "noisy"),
    pairwise(OPTIMIZERS, DTYPES, [0, 1, 6], [0.0, 0.5, 3.0], [True, False]),
)
def test_native_update_gives_the_bits_of_the_float64_reference(optimizer, dtype, examples, strength, noisy):
    problem = Problem(optimizer, dtype, examples=examples, strength=strength, noisy=noisy)
    expected = copy.deepcopy(problem)
    with reference_only():
        wanted = expected.take()
    before = copy.deepcopy(problem.tensors)
    found = problem.take()
    assert not same_bits(found, before)
    # torch's float64 square root (MKL's) is not always the nearest; without a grid, sums have an order of their own.
    if (noisy or not examples) and not (dtype == torch.float64 and optimizer in ("adam", "adamw")):
        assert same_bits(found, wanted)
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=torch.finfo(dtype).eps, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("shape", [(9, 1), (1, 9), (1, 1), (4, 4)])
def test_factors_of_rank_one_and_square_ones_are_filtered_along_their_longer_dimension(shape):
    problem = Problem("sgd", torch.float64, [shape], strength=0.7, noisy=False)
    expected, gradient = copy.deepcopy(problem), GaussianFilter(0.7)(problem.sums[0] / 7.0)
    with reference_only():
        expected.take()
    problem.take()
    torch.testing.assert_close(problem.gradients[0], gradient, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(expected.gradients[0], gradient, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("noisy", [True, False])
def test_the_shortest_filter_looks_at_one_neighbour_on_each_side(noisy):
    strength = 0.2
    assert private_update.filter_reach(strength) == 1
    problem = Problem("sgd", torch.float32, strength=strength, noisy=noisy)
    expected, unfiltered = copy.deepcopy(problem), Problem("sgd", torch.float32, noisy=noisy)
    with reference_only():
        wanted = expected.take()
    found = problem.take()
    assert same_bits(found, wanted) and not same_bits(found, unfiltered.take())


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_instruction_set_gives_the_same_bits(optimizer, instructions, monkeypatch):
    update = native.private_update
    try:
        native.keystream(bytes(32), bytes(12), 0, 0, 0, instructions)
    except ValueError as error:
        pytest.skip(str(error))
    for dtype in DTYPES:
        problem = Problem(optimizer, dtype, examples=3, strength=1.0)
        twin = copy.deepcopy(problem)
        with monkeypatch.context() as during:
            during.setattr(native, "private_update", lambda *arguments: update(*arguments, instructions))
            found = problem.take()
        assert same_bits(found, twin.take())


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_do_not_change_a_bit(threads):
    # So many tiles that every thread has begun before all are taken.
    one, several = (Problem("adamw", torch.float32, [(300_000,), (64, 300), (7,)], strength=2.0) for _ in range(2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = one.take()
        torch.set_num_threads(threads)
        assert same_bits(several.take(), wanted)
    finally:
        torch.set_num_threads(before)


def plain_optimizers() -> Iterator[Any]:
    for decay in (0.0, 0.1):
        yield torch.optim.SGD, {"lr": 0.1, "weight_decay": decay}
        yield torch.optim.SGD, {"lr": 0.1, "weight_decay": decay, "momentum": 0.9}
        yield torch.optim.SGD, {"lr": 0.1, "weight_decay": decay, "momentum": 0.9, "dampening": 0.3}
        yield torch.optim.SGD, {"lr": 0.1, "weight_decay": decay, "momentum": 0.9, "nesterov": True}
        yield torch.optim.Adam, {"lr": 0.1, "weight_decay": decay, "betas": (0.7, 0.9), "eps": 1e-4}
        yield torch.optim.AdamW, {"lr": 0.1, "weight_decay": decay, "betas": (0.7, 0.9), "eps": 1e-4}


@pytest.mark.parametrize(("kind", "options"), list(plain_optimizers()))
@pytest.mark.parametrize("way", ["native", "reference"])
def test_steps_are_those_of_torchs_optimizers(kind, options, way):
    """Five steps in float64 on the same gradients; the low-pass filter is the library's."""
    generator = torch.Generator().manual_seed(1)
    smooth = GaussianFilter(0.7)
    theta = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    twin = torch.nn.Parameter(theta.clone())
    plain = kind([twin], **options)
    adam = kind is not torch.optim.SGD
    first = [torch.zeros_like(theta)] if adam or options.get("momentum") else []
    second = [torch.zeros_like(theta)] if adam else []
    for step in range(1, 6):
        total = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        twin.grad = smooth(total / 8)
        plain.step()
        row = adam_row(step=step, **options) if adam else sgd_row(first_step=step == 1, **options)
        name = {torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}.get(kind, "momentum" if first else "sgd")
        gradient = torch.empty_like(theta)
        with reference_only() if way == "reference" else torch.no_grad():
            private_update_(
                [theta],
                [total],
                first,
                second,
                [gradient],
                [row],
                optimizer=name,
                key=0,
                draw=0,
                scale=0.0,
                step=1.0,
                expected_batch_size=8.0,
                filtered=[True],
                filter_strength=0.7,
            )
        torch.testing.assert_close(gradient, twin.grad, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(theta, twin.detach(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("examples", [0, 5])
def test_what_leaves_is_an_integer_number_of_grid_steps(examples):
    """round(Σ) + round(z · std / Δ), the noise of each parameter that of its number and of the draw."""
    shapes = [(9,), (0,), (5000,), (3, 11)]
    problem = Problem("sgd", torch.float64, shapes, examples=examples, sum_dtype=torch.float32)
    problem.parameters = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    problem.hyper = [sgd_row(1.0)] * len(shapes)
    problem.take(expected_batch_size=1.0)
    for p, (theta, given_sum) in enumerate(zip(problem.parameters, problem.sums, strict=True)):
        released = -theta / STEP
        noise = rounded_gaussian_(torch.empty(theta.shape, dtype=torch.int64), KEY, p, 5, problem.options["scale"])
        if examples:
            used = given_sum.coefficients != 0
            weights = given_sum.coefficients[used].view(-1, *[1] * theta.dim())
            clipped = (given_sum.gradients[used].double() * weights / STEP).round().sum(0)
        else:
            clipped = (given_sum.double() / STEP).round()
        assert torch.equal(released, clipped + noise)


def test_the_sum_over_examples_is_exact_in_any_order():
    """Magnitudes that no floating-point sum would survive: the order of the examples does not change a bit."""
    gradients = torch.tensor([1e6, 3e-8, -1e6, 7e-9, 2.5, -3e-8]).repeat_interleave(5).view(6, 5)
    results = []
    for order in (range(6), reversed(range(6)), (3, 1, 5, 0, 2, 4)):
        theta = torch.zeros(5, dtype=torch.float64)
        order = list(order)
        part = ExampleSum(gradients[order].contiguous(), torch.ones(6, dtype=torch.float64))
        plain_sgd(theta, part, scale=2.0**32)
        results.append(theta)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@settings(max_examples=60, deadline=None)
@given(value=st.floats(allow_nan=False, allow_infinity=False, width=32), dtype=st.sampled_from(DTYPES[1:3]))
def test_half_precision_is_rounded_as_torch_does(value, dtype):
    wanted = torch.tensor([value]).to(dtype)
    theta = torch.zeros(1, dtype=dtype)
    gradient = torch.empty_like(theta)
    plain_sgd(theta, torch.tensor([value]), gradients=[gradient], lr=0.0)
    assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("dtype", DTYPES[1:3])
def test_every_half_precision_number_is_read_and_written_back(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    theta = every.clone()
    plain_sgd(theta, torch.zeros(2**16), lr=0.0)
    finite = every.isfinite()
    assert torch.equal(theta[finite], every[finite])
    assert theta[~finite].isnan().all()  # 0 · infinity
    # Without a decay that is added infinity stays what it is, and NaN becomes torch's.
    theta, zeros = every.clone(), torch.zeros(2**16, dtype=dtype)
    private_update_(
        [theta],
        [torch.zeros(2**16)],
        [zeros.clone()],
        [zeros.clone()],
        [],
        [adam_row(0.1, step=1, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)],
        optimizer="adamw",
        scale=0.0,
        step=STEP,
        expected_batch_size=1.0,
        key=KEY,
        draw=0,
        filtered=[False],
        filter_strength=0.0,
    )
    number = ~every.isnan()
    assert torch.equal(theta[number], every[number])
    assert torch.equal(
        theta[~number].abs().view(torch.int16), torch.full_like(every[~number], math.nan).abs().view(torch.int16)
    )


def test_absurd_gradients_stop_at_the_grids_end():
    for way in (torch.no_grad, reference_only):
        theta = torch.zeros(2, dtype=torch.float64)
        part = ExampleSum(torch.tensor([[1e30, -1e30]]), torch.ones(1, dtype=torch.float64))
        with way():
            plain_sgd(theta, part, scale=1.0)
        assert (theta.abs() / STEP - 2.0**51).abs().max() < 20 and theta[0] < 0 < theta[1]


@pytest.mark.parametrize("way", [torch.no_grad, reference_only])
def test_autograd_sees_what_has_changed(way):
    """A graph that saved a parameter must not go on with its new numbers."""
    problem = Problem("adamw", torch.float32, [(3, 4)])
    before = [tensor._version for tensor in problem.tensors]
    leaf = torch.ones(3, 4, requires_grad=True)
    product = (leaf * problem.parameters[0]).sum()
    with way():
        problem.take()
    assert all(tensor._version > old for tensor, old in zip(problem.tensors, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_many_large_examples_do_not_leave_the_integers():
    for n in (100, 4000, 5000, 10_000):
        theta = torch.zeros(1, dtype=torch.float64)
        part = ExampleSum(torch.full((n, 1), 1e30), torch.ones(n, dtype=torch.float64))
        plain_sgd(theta, part, scale=1.0)
        assert float(-theta[0] / STEP) == pytest.approx(min(n * 2.0**51, 2.0**62), rel=1e-6)


@pytest.mark.parametrize("value", [1e30, -1e30, 2.0**31, 3e9, -1.7e9, 2.0**30 + 256, 2.0**25 + 3.0, 1.0, 2.0**-30])
def test_an_accumulated_sum_is_taken_up_to_the_grids_end(value):
    """2^62 steps of 2^-31; up to there what the float64 reference has, to the bit."""
    found = []
    for way in (contextlib.nullcontext, reference_only):
        theta = torch.zeros(1, dtype=torch.float64)
        with way():
            plain_sgd(theta, torch.tensor([value], dtype=torch.float64), scale=1.0)
        found.append(theta)
    assert torch.equal(*found)
    assert -float(theta) == pytest.approx(max(min(value, 2.0**31), -(2.0**31)), abs=20 * STEP, rel=1e-12)


@pytest.mark.parametrize("examples", [2, 2010, 2048])  # of 2048, one may reach 2⁵¹ steps
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_example_that_is_not_finite_and_not_excluded_adds_a_bounded_number(value, examples):
    """NaN adds 0, infinity what one of so many examples may: no sum and no noise is lost with it."""
    found = []
    for way in (contextlib.nullcontext, reference_only):
        theta = torch.zeros(1, dtype=torch.float64)
        values = torch.zeros(examples, 1)
        values[0], values[1] = value, 1.0
        part = ExampleSum(values, torch.ones(examples, dtype=torch.float64))
        with way():
            plain_sgd(theta, part, scale=1.0)
        found.append(theta)
    assert torch.equal(*found)
    bounded = 0.0 if math.isnan(value) else math.copysign(2.0**51 * STEP, value)
    assert -float(theta) == pytest.approx(bounded + 1.0, abs=20 * STEP)


def test_accumulated_sums_may_be_large():
    theta = torch.zeros(2, dtype=torch.float64)
    plain_sgd(theta, torch.tensor([2.0**25 + 1, -(2.0**28)], dtype=torch.float64), scale=1.0)
    steps = -theta / STEP
    assert abs(steps[0] - (2.0**25 + 1) * 2.0**31) < 20 and abs(steps[1] + 2.0**59) < 200


def test_the_op_is_one_that_torch_knows():
    problem = Problem("adamw", torch.float32, [(5, 3), (7,)], strength=1.0)
    arguments = (
        problem.parameters,
        problem.sums,
        [None, None],
        problem.first,
        problem.second,
        problem.gradients,
        torch.tensor(problem.hyper, dtype=torch.float64),
        [True, False],
        1.0,
        "adamw",
        KEY,
        0,
        2.0**32,
        STEP,
        3.0,
    )
    torch.library.opcheck(torch.ops.lora_dp.private_update_.default, arguments)
    assert private_update.filter_reach(1.0) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("examples", [0, 6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_cpu_and_gpu_give_the_same_bits(optimizer, dtype, examples, strength):
    if not native.cuda:
        pytest.skip("installed without a CUDA compiler")
    for noisy in (True, False):
        problems = [
            Problem(optimizer, dtype, examples=examples, strength=strength, noisy=noisy, device=device)
            for device in ("cpu", "cuda")
        ]
        for problem in problems[1:]:
            for p in range(len(SHAPES)):
                assert can_update(problem.parameters[p], strength if problem.options["filtered"][p] else 0.0)
        cpu, gpu = (problem.take() for problem in problems)
        assert same_bits(gpu, cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("n", [1, 7, 8, 9, 100_003])
def test_streams_and_noise_are_the_same_on_cpu_and_gpu(n):
    if not native.cuda:
        pytest.skip("installed without a CUDA compiler")
    for fill in (lambda out: sampling_bits_(out, KEY, 9), lambda out: rounded_gaussian_(out, KEY, 2, 9, 1.4 * 2**32)):
        cpu, gpu = (fill(torch.empty(n, dtype=torch.int64, device=device)) for device in ("cpu", "cuda"))
        assert torch.equal(gpu.cpu(), cpu)
