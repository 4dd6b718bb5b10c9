"""Both random sources: the values they give, and how a seeded one repeats them.

The statistics here are of what the sources do with the bits; those of the Gaussians are in
``tests/ops/test_noise_statistics.py``. Each check rejects a right source with probability FALSE_ALARM, and there are 69
for each source: 64 bits, two for uniforms, three for Gaussians. The secure source draws a new key each time, so this
file fails by chance with probability 6.9e-8; the seeded one passes always or never.
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
import pickle
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lora_dp.ops.native import native
from lora_dp.ops.rounded_gaussian import rounded_gaussian_
from lora_dp.privacy.randomness import Draw, RandomSource, SecureSource, SeededSource
from tests.sources import CPU, WIDE, draw_from, gaussians

N = 1_000_000
FALSE_ALARM = 1e-9
Z = float(stats.norm.isf(FALSE_ALARM / 2))


@pytest.fixture(params=["secure", "seeded"])
def source(request: pytest.FixtureRequest) -> RandomSource:
    return SecureSource() if request.param == "secure" else SeededSource(20261122)


def test_only_the_secure_source_says_so() -> None:
    assert SecureSource().secure is True
    assert SeededSource(0).secure is False


# Values


def test_uniforms_fill_the_unit_interval(source: RandomSource) -> None:
    u = source.uniform(N)
    assert u.dtype == torch.float64 and u.shape == (N,) and u.device.type == "cpu"
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > FALSE_ALARM
    mantissas = u * 2.0**53
    assert torch.equal(mantissas, mantissas.round())
    odd = int((mantissas.long() % 2).sum())
    assert abs(odd - N / 2) < Z * math.sqrt(N / 4), "the last of the 53 bits is not fair"


def test_every_bit_is_fair(source: RandomSource) -> None:
    bits = source.uniform_bits(N // 4)
    assert bits.dtype == torch.int64 and bits.device.type == "cpu"
    for place in range(64):
        ones = int((bits >> place & 1).sum())
        assert abs(ones - N / 8) < Z * math.sqrt(N / 16)


def test_gaussians_have_their_deviation(source: RandomSource) -> None:
    """A deviation that is wrong by one percent, or noise from another scale's call, would be seen."""
    z = gaussians(source, N).double() / WIDE
    assert abs(z.mean().item()) < Z / math.sqrt(N)
    assert abs(z.square().mean().item() - 1) < Z * math.sqrt(2 / N)
    assert stats.kstest(z.numpy(), "norm").pvalue > FALSE_ALARM


def test_gaussians_are_those_of_the_op(source: RandomSource) -> None:
    """One draw for all shapes, and each shape a parameter of it."""
    shapes = [(3, 5), (), (0,), (7,), (2, 1, 4)]
    drawn = source.rounded_gaussians(shapes, WIDE, CPU)
    after = source.next_draw()
    assert after.number == 1
    for p, (shape, values) in enumerate(zip(shapes, drawn, strict=True)):
        assert values.shape == shape and values.dtype == torch.int64 and values.device.type == "cpu"
        expected = rounded_gaussian_(torch.empty(shape, dtype=torch.int64), after.key, p, 0, WIDE)
        assert torch.equal(values, expected)
    assert source.rounded_gaussians([], WIDE, CPU) == []
    assert not torch.equal(source.rounded_gaussians(shapes, WIDE, CPU)[0], drawn[0])


def test_bits_are_the_sampling_bits_of_the_draw(source: RandomSource) -> None:
    for n in (0, 1, 9, 100):
        drawn, after = source.uniform_bits(n), source.next_draw()
        expected = torch.zeros(n, dtype=torch.int64)
        native.sampling_bits(after.key, after.number - 1, expected.data_ptr(), 8 * n)
        assert torch.equal(drawn, expected)


class Constant(RandomSource):
    """Yields the same 64-bit word for ever."""

    secure = False

    def __init__(self, word: int) -> None:
        self.word = word

    def next_draw(self) -> Draw:
        raise NotImplementedError

    def uniform_bits(self, n: int) -> torch.Tensor:
        return torch.full((n,), self.word)


def test_extreme_bits_give_uniforms_below_one() -> None:
    assert Constant(0).uniform(1).item() == 0.0
    assert Constant(-1).uniform(1).item() == 1 - 2.0**-53
    assert Constant(2**53 - 1).uniform(1).item() == 1 - 2.0**-53
    assert Constant(-(2**63)).uniform(1).item() == 0.0


@pytest.mark.parametrize("n", [0, 1, 2, 3, 17])
def test_any_count_can_be_drawn(source: RandomSource, n: int) -> None:
    for draw in (source.uniform_bits, source.uniform, lambda n: gaussians(source, n)):
        assert draw(n).shape == (n,)


def test_negative_counts_are_refused(source: RandomSource) -> None:
    for draw in (source.uniform_bits, source.uniform):
        with pytest.raises(ValueError, match=r"^n must not be negative, got -1$"):
            draw(-1)


@pytest.mark.parametrize("scale", [0.0, 0.999, 2.0**33, math.inf, math.nan])
def test_scales_out_of_range_are_refused(source: RandomSource, scale: float) -> None:
    with pytest.raises(ValueError, match=r"^scale must lie in \[1, 2\*\*33\), got "):
        source.rounded_gaussians([(3,)], scale, CPU)


def test_default_device_of_torch_does_not_matter(source: RandomSource) -> None:
    with torch.device("meta"):
        for values in (source.uniform_bits(3), source.uniform(3), gaussians(source, 3)):
            assert values.device.type == "cpu" and torch.isfinite(values).all()


def test_both_sources_share_one_way_from_bits_to_values() -> None:
    for name in ("uniform_bits", "uniform", "rounded_gaussians"):
        assert getattr(SecureSource, name) is getattr(SeededSource, name) is getattr(RandomSource, name)


def test_sources_leave_the_global_generator_alone(source: RandomSource) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    source.uniform(100), gaussians(source, 100)
    assert torch.equal(torch.rand(4), expected)


def test_a_million_values_take_little_time(source: RandomSource) -> None:
    def measure(draw: Callable[[int], torch.Tensor]) -> float:
        started = time.perf_counter()
        draw(N)
        return time.perf_counter() - started

    # 5 ms to 50 ms on one core of 2024; the bound is what a loop in Python could never reach.
    for draw in (source.uniform, lambda n: gaussians(source, n)):
        assert min(measure(draw) for _ in range(5)) < 0.3


# Seeds


def test_a_seed_repeats_its_values() -> None:
    one, two, other = SeededSource(7), SeededSource(7), SeededSource(8)
    for n in (1, 5, 1000):
        assert torch.equal(gaussians(one, n), gaussians(two, n))
        assert torch.equal(one.uniform(n), two.uniform(n))
    assert not torch.equal(gaussians(one, 1000), gaussians(other, 1000))
    assert not torch.equal(gaussians(one, 1000), gaussians(one, 1000))


def test_a_seed_means_the_same_everywhere() -> None:
    """Saved runs go on with another version, and on another machine."""
    secret = hashlib.sha256(b"lora-dp seed 7").digest()
    expected = np.zeros(3, np.int64)
    native.keystream(secret, bytes(4) + (1).to_bytes(8, "little"), 0, expected.ctypes.data, 24)
    source = SeededSource(7)
    source.uniform_bits(1)
    assert source.uniform_bits(3).tolist() == expected.tolist()


def test_seeds_that_differ_share_nothing() -> None:
    seeds = [0, 1, -1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64, 2**64 + 1, -(2**64), 10**40]
    words = torch.cat([SeededSource(seed).uniform_bits(100) for seed in seeds])
    assert words.unique().numel() == 100 * len(seeds)
    assert repr(SeededSource(-3)) == "SeededSource(-3)" and SeededSource(True).seed == 1
    assert torch.equal(SeededSource(True).uniform_bits(3), SeededSource(1).uniform_bits(3))


def test_counters_are_draws_too() -> None:
    source = SeededSource(2**63 + 5)
    first = source.next_counter()
    assert first == (-(2**63) + 5, 0)
    assert source.next_draw().number == 1
    assert source.next_counter() == (-(2**63) + 5, 2)
    torch.tensor(first)  # a signed 64-bit number


@pytest.mark.parametrize(
    "copier",
    [
        copy.copy,
        copy.deepcopy,
        lambda source: pickle.loads(pickle.dumps(source)),
        lambda source: copy.deepcopy({"inside": source})["inside"],
    ],
)
def test_a_seeded_source_can_be_copied_and_goes_on(copier: Callable[[SeededSource], SeededSource]) -> None:
    source = SeededSource(7)
    source.uniform(3), gaussians(source, 3)
    twin = copier(source)
    assert twin is not source and twin.seed == 7
    assert torch.equal(twin.uniform(9), source.uniform(9))
    expected = gaussians(source, 9)
    del source  # and its key, not the twin's
    assert torch.equal(gaussians(twin, 9), expected)


def test_a_seeded_source_resumes_where_it_was_saved() -> None:
    source = SeededSource(7)
    gaussians(source, 11), source.uniform(2)
    saved = io.BytesIO()
    torch.save(source.state_dict(), saved)
    expected = [gaussians(source, 11), source.uniform(3)]
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert set(state) == {"draws", "seed"} and int(state["draws"]) == 2
    for taken in (0, 1, 5):
        fresh = SeededSource(7)
        for _ in range(taken):
            fresh.uniform(1)
        fresh.load_state_dict(state)
        assert torch.equal(gaussians(fresh, 11), expected[0])
        assert torch.equal(fresh.uniform(3), expected[1])


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 5, 2**63 + 2**62 + 7, 2**64 - 1, 10**40])
def test_the_state_of_any_seed_is_restored(seed: int) -> None:
    """At the very beginning too."""
    source = SeededSource(seed)
    state = source.state_dict()
    expected = source.uniform(3)
    source.load_state_dict(state)
    assert torch.equal(source.uniform(3), expected)
    if seed > 2**62:
        with pytest.raises(ValueError, match="The saved source had another seed"):
            SeededSource(seed + 1).load_state_dict(state)


def test_a_state_does_not_change_with_its_source() -> None:
    source = SeededSource(7)
    state = source.state_dict()
    source.uniform(1)
    assert int(state["draws"]) == 0 and int(source.state_dict()["draws"]) == 1


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"draws": torch.tensor(-1), "seed": torch.tensor(7)},
        {"generator": torch.zeros(5056, dtype=torch.uint8)},
        {"draws": torch.tensor(3), "seed": torch.tensor(7), "key": torch.tensor(1)},
        {"draw": torch.tensor(3)},
        {"draws": torch.tensor(1.7), "seed": torch.tensor(7)},
        {"draws": torch.tensor(True), "seed": torch.tensor(7)},
        {"draws": None, "seed": torch.tensor(7)},
        None,
        {"draws": "3", "seed": 7},
        {"draws": True, "seed": 7},
        {"draws": -1, "seed": 7},
        {"draws": torch.tensor([3]), "seed": torch.tensor(7)},
        {"draws": torch.tensor(3), "seed": torch.tensor([7])},
        {"draws": torch.tensor(3), "seed": torch.tensor(7, dtype=torch.int32)},
        ["draws", "seed"],
    ],
    ids=[
        "empty",
        "negative",
        "generator",
        "more",
        "misspelt",
        "fraction",
        "bool",
        "none",
        "nothing",
        "word",
        "truth",
        "negative number",
        "vector",
        "seeds",
        "narrow",
        "list",
    ],
)
def test_a_bad_state_is_refused(state: Any) -> None:
    source = SeededSource(7)
    source.uniform(1)
    words = "Not the state of a seeded source: it must hold the integers 'draws' and 'seed'."
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        source.load_state_dict(state)
    assert source.next_draw().number == 1


def test_the_state_of_another_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="The saved source had another seed"):
        SeededSource(7).load_state_dict(SeededSource(8).state_dict())


def test_a_key_of_zeros_is_no_key() -> None:
    """What a page holds that a fork has emptied, in a process that has got its grandparent's number."""
    with pytest.raises(ValueError, match="is empty, as in a forked process"):
        draw_from(native.key_from(bytes(32)))


@pytest.mark.parametrize("kind", [int, torch.tensor], ids=["number", "tensor"])
def test_a_state_of_numbers_is_taken_and_one_of_tensors_as_an_earlier_version_wrote_it(kind: Any) -> None:
    source = SeededSource(7)
    source.uniform(1)
    source.uniform(1)
    expected = source.uniform(4)
    resumed = SeededSource(7)
    resumed.load_state_dict({"draws": kind(2), "seed": kind(7)})
    assert torch.equal(resumed.uniform(4), expected)
    assert resumed.state_dict() == source.state_dict()
    assert type(resumed.state_dict()["draws"]) is int
