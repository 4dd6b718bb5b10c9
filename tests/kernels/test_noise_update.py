"""Philox against its known answers; noise, filter and optimizers against NumPy, our filters and torch.optim."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lora_dp.kernels.noise_update as module
from lora_dp.kernels.launching import Config
from lora_dp.kernels.noise_update import CONFIGS, noise_update
from lora_dp.kernels.optimizer_rows import adam_row, sgd_row
from lora_dp.kernels.philox import standard_normal
from lora_dp.ops.private_update import private_update_
from lora_dp.privacy.filtering import GaussianFilter

TINY = Config.of(1, 1, BLOCK=16)  # many programs

examples = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
matrices = st.sampled_from([(3, 5), (5, 3), (17, 2), (4, 4), (1, 9), (20, 3), (9, 9)])
others = st.one_of(matrices, st.sampled_from([(), (1,), (7,), (2, 3, 4), (0,)]))
# The first is filtered, the second is not, and so on.
shapes = st.builds(lambda matrix, more: [matrix, *more], matrices, st.lists(others, max_size=3))

# Counter, key and answer (Random123's known answers for Philox4x32-10).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
LOW = np.uint64(0xFFFFFFFF)


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011, section 3.3) of arrays or integers; four uint64 arrays of 32-bit words."""
    c = [np.atleast_1d(np.asarray(word, dtype=np.uint64)) for word in counter]
    k0, k1 = (int(word) for word in key)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        shift = np.uint64(32)
        c = [(b >> shift) ^ c[1] ^ np.uint64(k0), b & LOW, (a >> shift) ^ c[3] ^ np.uint64(k1), a & LOW]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def normals(seed: int, elements, parameter: int, step: int) -> Tensor:
    """The noise by its definition, float64."""
    elements = np.asarray(elements, dtype=np.uint64)
    words = philox(
        (elements & LOW, elements >> np.uint64(32), parameter, step % 2**32), (seed % 2**32, seed % 2**64 >> 32)
    )
    u1, u2 = ((word.astype(np.float64) + 0.5) * 2.0**-32 for word in words[:2])
    return torch.from_numpy(np.sqrt(-2 * np.log(u1)) * np.cos(2 * np.pi * u2))


@triton.jit
def _words_kernel(counter, key, out):
    low = tl.load(key).to(tl.uint64)
    high = tl.load(key + 1).to(tl.uint64)
    words = tl.philox(
        low | (high << 32),
        tl.load(counter).to(tl.uint32),
        tl.load(counter + 1).to(tl.uint32),
        tl.load(counter + 2).to(tl.uint32),
        tl.load(counter + 3).to(tl.uint32),
    )
    for i in tl.static_range(4):
        tl.store(out + i, words[i].to(tl.int64))


@triton.jit
def _normals_kernel(elements, rng, parameter, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    element = tl.load(elements + offsets, mask=offsets < n, other=0)
    z = standard_normal(tl.load(rng), element, tl.full((), parameter, tl.int32), tl.load(rng + 1))
    tl.store(out + offsets, z, mask=offsets < n)


def drawn(device, seed: int, elements: Tensor, parameter: int, step: int) -> Tensor:
    """The noise by the kernels' function."""
    n = len(elements)
    out = torch.full((n,), math.nan, device=device)
    rng = torch.tensor([seed, step], device=device)
    _normals_kernel[(triton.cdiv(n, 4096),)](elements.to(device), rng, parameter, out, n, BLOCK=4096)
    return out.double().cpu()


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers(device, counter, key, answer):
    assert tuple(int(word[0]) for word in philox(counter, key)) == answer
    out = torch.zeros(4, dtype=torch.int64, device=device)
    _words_kernel[(1,)](torch.tensor(counter, device=device), torch.tensor(key, device=device), out)
    assert tuple(out.tolist()) == answer


@pytest.mark.parametrize(
    "seed, first, parameter, step",
    [(0, 0, 0, 0), (-1, 2**32 - 50, 3, 2**40 + 5), (2**63 - 1, 2**40, 511, -1), (0x299F31D0A4093822, 7, 1, 12345)],
)
def test_normals_are_those_of_the_definition(device, seed, first, parameter, step):
    elements = torch.arange(first, first + 2000)
    want = normals(seed, elements.numpy(), parameter, step)
    torch.testing.assert_close(drawn(device, seed, elements, parameter, step), want, rtol=5e-6, atol=0)


def test_moments(device):
    n = 100_000
    z = drawn(device, 5, torch.arange(n), 2, 9)
    for power, moment, deviation in ((1, 0, 1), (2, 1, math.sqrt(2)), (3, 0, math.sqrt(15)), (4, 3, math.sqrt(96))):
        assert abs((z**power).mean() - moment) < 4 * deviation / math.sqrt(n)
    assert abs((z[1:] * z[:-1]).mean()) < 4 / math.sqrt(n)
    assert 3.5 < z.abs().max() < math.sqrt(66 * math.log(2))
    below = torch.distributions.Normal(0, 1).cdf(z.sort().values)
    assert (below - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / math.sqrt(n)  # Kolmogorov, 1 in 1000


def test_noise_differs_by_seed_parameter_step_and_element(device):
    """Also where only the high half of a 64-bit seed or element does; and is uncorrelated."""
    n = 4000
    at = torch.arange(n)
    draws = [
        drawn(device, seed, at + first, parameter, step)
        for seed, first, parameter, step in (
            (1, 0, 0, 0),
            (2, 0, 0, 0),
            (1 + 2**32, 0, 0, 0),
            (1, 2**32, 0, 0),
            (1, n, 0, 0),
            (1, 0, 1, 0),
            (1, 0, 0, 1),
            (0, 0, 1, 1),
        )
    ]
    for i, one in enumerate(draws):
        assert len(one.unique()) > 0.99 * n
        for other in draws[:i]:
            assert (one == other).sum() <= 2
            assert abs((one * other).mean()) < 5 / math.sqrt(n)


class Run:
    """The kernel beside its definition: our filters and torch.optim on float64 noise, over several steps."""

    def __init__(self, device, sizes, optimizer, arguments, dtypes=(torch.float32,), strength=0.0, std=0.0, seed=0):
        torch.manual_seed(seed)
        self.device, self.optimizer, self.arguments = device, optimizer, dict(arguments)
        self.strength, self.std, self.seed, self.steps = strength, std, seed, 0
        self.parameters = [torch.randn(size).to(device, dtypes[p % len(dtypes)]) for p, size in enumerate(sizes)]
        # Odd ones stay unfiltered, so that filtered and others meet in one launch.
        self.filtered = [len(size) == 2 and p % 2 == 0 for p, size in enumerate(sizes)]
        self.rng = torch.tensor([seed, 0], device=device)
        needs_first = optimizer != "sgd" or "momentum" in arguments
        self.first = [torch.zeros(size, device=device) for size in sizes] if needs_first else []
        if optimizer == "sgd":
            for state in self.first:
                state.fill_(math.nan)
        self.second = [torch.zeros(size, device=device) for size in sizes] if optimizer != "sgd" else []
        # The definition computes in float32, as torch does; only ĝ and the parameters are rounded to their dtype.
        self.wanted = [torch.nn.Parameter(parameter.detach().float().clone()) for parameter in self.parameters]
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        self.torch_optimizer = kinds[optimizer](self.wanted, **arguments)

    def step(self, config=None) -> None:
        sums = [torch.randn(parameter.shape, device=self.device) for parameter in self.parameters]
        self.rng[1] = self.steps
        row = (
            sgd_row(**self.arguments, first_step=self.steps == 0)
            if self.optimizer == "sgd"
            else adam_row(**self.arguments, step=self.steps + 1)
        )
        noise_update(
            self.parameters,
            sums,
            self.first,
            self.second,
            torch.tensor([row] * len(sums), device=self.device),
            self.rng,
            std=self.std,
            expected_batch_size=3.0,
            filter_strength=self.strength,
            filtered=self.filtered,
            optimizer=self.optimizer,
            config=config,
        )
        for p, (wanted, total) in enumerate(zip(self.wanted, sums, strict=True)):
            z = normals(self.seed, np.arange(total.numel()), p, self.steps).view(total.shape).to(self.device)
            gradient = (total.double() + self.std * z) / 3.0
            if self.filtered[p]:
                gradient = GaussianFilter(self.strength)(gradient)
            wanted.grad = gradient.to(self.parameters[p].dtype).float()
        self.torch_optimizer.step()
        with torch.no_grad():
            for wanted, parameter in zip(self.wanted, self.parameters, strict=True):
                wanted.copy_(wanted.to(parameter.dtype))
        self.steps += 1

    def agrees(self, slack: float = 2e-6) -> None:
        names = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq")}
        for p, (actual, wanted) in enumerate(zip(self.parameters, self.wanted, strict=True)):
            # Triton's interpreter cuts bfloat16 off where a GPU rounds it: a whole unit in ĝ and in the parameter.
            unit = torch.finfo(actual.dtype).eps if actual.dtype != torch.float32 else 0.0
            state = self.torch_optimizer.state[wanted]
            pairs = [(actual, wanted.detach())]
            for values, name in zip((self.first, self.second), names[self.optimizer], strict=False):
                pairs += [(values[p], state[name])] if values else []
            for got, want in pairs:
                torch.testing.assert_close(got.double(), want.double(), rtol=slack + 2 * unit, atol=slack + unit)


SGD = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.2},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2, "dampening": 0.3},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2, "nesterov": True},
]
ADAM = [{"lr": 0.01, "weight_decay": 0.0}, {"lr": 0.01, "weight_decay": 0.3, "betas": (0.8, 0.99), "eps": 1e-5}]
OPTIMIZERS = [("sgd", row) for row in SGD] + [(name, row) for name in ("adam", "adamw") for row in ADAM]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer, arguments", OPTIMIZERS)
def test_without_noise_the_native_update_is_the_same(device, optimizer, arguments, dtype):
    """Both from the same start, to a rounding of float32, or of the parameter's dtype."""
    sizes, strength = [(3, 40), (17,), (50, 3), ()], 0.7
    generator = torch.Generator().manual_seed(0)
    theta, sums, first, second = (
        [torch.randn(size, generator=generator).to(device) for size in sizes] for _ in range(4)
    )
    second = [state.square() for state in second]
    theta = [each.to(dtype) for each in theta]
    row = sgd_row(**arguments) if optimizer == "sgd" else adam_row(**arguments, step=3)
    has_first, has_second = optimizer != "sgd" or "momentum" in arguments, optimizer != "sgd"
    # The kernel keeps states in float32, the native update in the parameter's dtype: let both hold the same numbers.
    first, second = ([state.to(dtype).float() for state in states] for states in (first, second))
    mine = [each.clone() for each in theta]
    options = {"expected_batch_size": 3.0, "filter_strength": strength, "filtered": [len(size) == 2 for size in sizes]}
    private_update_(
        mine,
        sums,
        [state.to(dtype, copy=True) for state in first] if has_first else [],
        [state.to(dtype, copy=True) for state in second] if has_second else [],
        [],
        [row] * len(sizes),
        optimizer="momentum" if optimizer == "sgd" and has_first else optimizer,
        key=0,
        draw=0,
        scale=0.0,
        step=1.0,
        **options,
    )
    noise_update(
        theta,
        sums,
        [state.clone() for state in first] if has_first else [],
        [state.clone() for state in second] if has_second else [],
        torch.tensor([row] * len(sizes), device=device),
        torch.tensor([0, 0], device=device),
        std=0.0,
        optimizer=optimizer,
        **options,
    )
    # The kernel rounds the gradient to the parameter's dtype first, and Triton's interpreter cuts bfloat16 off.
    unit = torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6
    for left, right in zip(mine, theta, strict=True):
        torch.testing.assert_close(left, right, rtol=2 * unit, atol=unit)


@pytest.mark.parametrize("optimizer, arguments", OPTIMIZERS)
def test_optimizers_are_those_of_torch(device, optimizer, arguments):
    run = Run(device, [(3, 5), (17,), ()], optimizer, arguments)
    for _ in range(4):
        run.step()
    run.agrees()


@examples
@given(
    sizes=shapes,
    strength=st.sampled_from([1e-30, 0.3, 1.0, 2.7]),
    config=st.sampled_from([TINY, None]),
    seed=st.integers(0, 2**16),
)
def test_filter(device, sizes, strength, config, seed):
    """Tall and wide matrices, square ones and those shorter than the filter; every second one unfiltered."""
    run = Run(device, sizes, "sgd", {"lr": 1.0}, strength=strength, seed=seed)
    run.step(config)
    run.agrees()


@examples
@given(
    sizes=shapes,
    strength=st.sampled_from([0.8, 0.0]),
    std=st.sampled_from([0.5, 30.0]),
    which=st.sampled_from(OPTIMIZERS),
    config=st.sampled_from([TINY, None]),
    seed=st.integers(0, 2**16),
)
def test_noise_filter_and_optimizer(device, sizes, strength, std, which, config, seed):
    run = Run(device, sizes, *which, strength=strength, std=std, seed=seed)
    for _ in range(2):
        run.step(config)
    run.agrees(1e-5 * max(std, 1))


@pytest.mark.parametrize("optimizer, arguments", [("sgd", SGD[4]), ("adamw", ADAM[1])])
def test_dtypes_mixed_in_one_call(device, optimizer, arguments):
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    run = Run(device, [(9, 4), (4, 9), (33,), (2, 2), (5, 7)], optimizer, arguments, dtypes, strength=0.7, std=1.0)
    for _ in range(2):
        run.step()
    run.agrees(1e-5)
    assert [parameter.dtype for parameter in run.parameters] == [*dtypes, *dtypes[:2]]


def test_the_gradient_is_rounded_to_its_parameters_dtype(device):
    run = Run(device, [(50,)], "sgd", SGD[2], (torch.float16,))
    run.step()
    assert torch.equal(run.first[0], run.first[0].half().float())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_configuration(device, config):
    run = Run(device, [(71, 16), (16, 71)], "adamw", ADAM[1], strength=0.4, std=1.0)
    run.step(config)
    run.agrees(1e-5)


def test_the_noise_does_not_depend_on_the_tiling(device):
    """Bit for bit: what an element's own program adds and what its neighbours' filters add is one number."""
    results = []
    for config in (TINY, *CONFIGS.values()):
        run = Run(device, [(40, 3), (5, 30)], "adam", ADAM[0], strength=1.0, std=2.0)
        run.step(config)
        results.append(run.parameters)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_one_launch(device, monkeypatch):
    launches = []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    kernel = module._noise_update_kernel
    monkeypatch.setattr(module, "_noise_update_kernel", Counted())
    Run(device, [(71, 16), (0,), (5,)], "adamw", ADAM[0], std=1.0).step()
    assert len(launches) == 1


def test_nothing_to_update_is_no_launch(device, monkeypatch):
    monkeypatch.setattr(module, "_noise_update_kernel", None)
    Run(device, [(0,), (3, 0)], "sgd", SGD[0], std=1.0).step()


ONES = torch.ones(3, 2)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"parameters": [ONES.to("meta")]}, ValueError, r"parameters\[0\] must be on"),
        ({"parameters": [ONES.double()]}, TypeError, r"parameters\[0\] must be float32 or bfloat16 or float16"),
        ({"parameters": [torch.ones(2, 3).T]}, ValueError, r"parameters\[0\] must be contiguous"),
        ({"parameters": [None]}, TypeError, r"parameters\[0\] must be a tensor"),
        ({"parameters": [ONES, ONES]}, ValueError, r"hyper must have the shape \(2, 6\)"),
        ({"sums": []}, ValueError, "sums must have an entry for each of the 1 parameters"),
        ({"sums": [torch.ones(2, 3)]}, ValueError, r"sums\[0\] must have the shape \(3, 2\)"),
        ({"sums": [ONES.half()]}, TypeError, r"sums\[0\] must be float32"),
        ({"sums": [ONES.to("meta")]}, ValueError, r"sums\[0\] must be on"),
        ({"sums": [torch.ones(2, 3).T]}, ValueError, r"sums\[0\] must be contiguous"),
        ({"first": [torch.ones(3)]}, ValueError, r"first\[0\] must have the shape"),
        ({"first": [ONES, ONES]}, ValueError, "first must have an entry"),
        ({"optimizer": "adam", "hyper": torch.ones(1, 8)}, ValueError, "first must have an entry"),
        ({"optimizer": "adamw", "hyper": torch.ones(1, 8), "first": [ONES]}, ValueError, "second must have an entry"),
        ({"optimizer": "rmsprop"}, ValueError, "optimizer must be"),
        ({"hyper": torch.ones(1, 8)}, ValueError, r"hyper must have the shape \(1, 6\)"),
        ({"hyper": torch.ones(1, 6, dtype=torch.float64)}, TypeError, "hyper must be float32"),
        ({"hyper": torch.ones(1, 12)[:, ::2]}, ValueError, "hyper must be contiguous"),
        ({"rng": torch.zeros(2)}, TypeError, "rng must be int64"),
        ({"rng": torch.zeros(3, dtype=torch.int64)}, ValueError, r"rng must have the shape \(2\)"),
        ({"filtered": []}, ValueError, "filtered must have an entry"),
        (
            {"filtered": [True], "parameters": [torch.ones(6)], "sums": [torch.ones(6)]},
            ValueError,
            r"filtered\[0\] takes",
        ),
        ({"std": -1.0}, ValueError, "std must be 0 or a finite"),
        ({"std": math.nan}, ValueError, "std must be 0 or a finite"),
        ({"filter_strength": math.inf}, ValueError, "filter_strength must be 0 or"),
        ({"expected_batch_size": 0.0}, ValueError, "expected_batch_size must be"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_changes(device, monkeypatch, change, error, match):
    monkeypatch.setattr(module, "_noise_update_kernel", None)
    right = {
        "parameters": [ONES],
        "sums": [ONES],
        "first": [],
        "second": [],
        "hyper": torch.ones(1, 6),
        "rng": torch.zeros(2, dtype=torch.int64),
        "std": 1.0,
        "expected_batch_size": 1.0,
        "filter_strength": 1.0,
        "filtered": [True],
        "optimizer": "sgd",
    }
    with pytest.raises(error, match="noise_update: " + match):
        noise_update(**{key: _to(value, device) for key, value in {**right, **change}.items()})


def _to(value, device):
    if isinstance(value, list):
        return [_to(each, device) for each in value]
    return value.to(device) if isinstance(value, Tensor) and not value.is_meta else value
