"""Exact values: pairs of rounded Gaussians against an oracle of 400 bits, and the errors of both paths.

Nothing here is left to chance: the bits come from fixed seeds.
"""

import math
import random
from collections.abc import Callable, Iterator

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dp import _native
from tests.gaussian_oracle import ONES, SCALES, nearest, pair_of, scaled_by, true_pair
from tests.models import assert_refuses


def check_pair(u: int, v: int, scales: list[float]) -> int:
    """Compares with the oracle; how many of the scales the leading bits left undecided."""
    z, undecided = true_pair(u, v), 0
    for scale in scales:
        expected = tuple(nearest(scaled_by(scale, value)) for value in z)
        decided, exact = pair_of(u, v, scale)
        assert exact == expected, f"u = {u:#x}, v = {v:#x}, scale = {scale!r}"
        assert decided in (None, expected), f"u = {u:#x}, v = {v:#x}, scale = {scale!r}"
        undecided += decided is None
    return undecided


def test_oracle_gives_known_values():
    """e⁻² is not a multiple of 2⁻¹²⁸, but near enough: r = 2 at its best approximation."""
    with mpmath.workprec(400):
        u = int(mpmath.nint(mpmath.ldexp(mpmath.exp(-2), 128))) | 1
        x, y = true_pair(u, 2**125)
        assert abs(x - mpmath.sqrt(2)) < 2.0**-120 and abs(y - mpmath.sqrt(2)) < 2.0**-120
        furthest = true_pair(0, 0)[0]
        assert abs(furthest - mpmath.sqrt(256 * mpmath.log(2))) < 2.0**-380
    assert [nearest(mpmath.mpf(x)) for x in (0.5, -0.5, 0.49, -1.5, 2.5, 0)] == [1, -1, 0, -2, 3, 0]
    assert pair_of(0, 0, 1.0) == (None, (13, 0))


@pytest.mark.slow
def test_pairs_of_random_bits():
    generator, undecided = random.Random(0), 0
    for _ in range(3000):
        undecided += check_pair(generator.getrandbits(128), generator.getrandbits(128), SCALES)
    assert undecided < 60, "the leading bits should decide nearly always"


def test_pairs_of_every_magnitude_of_u():
    """All counts of leading zeros, and of leading ones: the furthest values and the smallest."""
    generator = random.Random(1)
    for zeros in range(128):
        u = 1 << (127 - zeros) | generator.getrandbits(127 - zeros) if zeros < 127 else 1
        check_pair(u, generator.getrandbits(128), SCALES)
        check_pair(2**128 - u, generator.getrandbits(128), SCALES)
        check_pair(1 << (127 - zeros), generator.getrandbits(128), SCALES)


def test_pairs_at_the_ends_of_every_octant():
    generator = random.Random(2)
    near = [0, 1, 2**61, 2**64 - 1, 2**64, 2**65, 2**75, 2**90, 2**112]
    for octant in range(8):
        for step in [*near, *(-step for step in near)]:
            v = (octant * 2**125 + step) % 2**128
            check_pair(generator.getrandbits(128), v, SCALES)
            check_pair(generator.getrandbits(80), v, [SCALES[3]])


def test_pairs_of_words_of_zeros_and_ones():
    for words in range(16):
        u_high, u_low, v_high, v_low = ((words >> bit & 1) * ONES for bit in range(4))
        check_pair(u_high << 64 | u_low, v_high << 64 | v_low, SCALES)


words = st.one_of(
    st.integers(0, ONES),
    st.sampled_from([0, 1, ONES, ONES - 1, 2**63, 2**63 - 1]),
    st.integers(0, 63).map(lambda bit: 1 << bit),
)


@settings(max_examples=200, deadline=None)
@given(
    u_high=words,
    u_low=words,
    v_high=words,
    v_low=words,
    scale=st.one_of(st.sampled_from(SCALES), st.floats(1.0, 2.0**33, exclude_max=True)),
)
def test_pairs_of_any_bits_and_scale(u_high, u_low, v_high, v_low, scale):
    check_pair(u_high << 64 | u_low, v_high << 64 | v_low, [scale])


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nextafter(1.0, 0.0), 2.0**33, math.inf, -math.inf, math.nan])
def test_pairs_of_scales_out_of_range_are_refused(scale):
    assert_refuses(ValueError, "scale must lie in [1, 2**33), got ", lambda: _native.gaussian_pair(1, 1, 1, 1, scale))


def random_words(generator: np.random.Generator, n: int) -> list[int]:
    return generator.integers(0, 2**64, n, dtype=np.uint64).tolist()


@pytest.mark.parametrize("scale", SCALES)
def test_leading_bits_decide_nearly_always(scale):
    """Undecided: u < 2⁻¹⁴ or −ln u < 2⁻¹², 3.1e-4, and at most 8e-4 near a half. They never disagree with all bits."""
    generator, n = np.random.default_rng(3), 50_000
    undecided = 0
    for u, v in zip(random_words(generator, n), random_words(generator, n), strict=True):
        decided, exact = _native.gaussian_pair(u, v, v, u, scale)
        assert decided in (None, exact)
        undecided += decided is None
    assert n * 1e-4 < undecided < n * 2e-3


def test_beyond_their_range_leading_bits_decide_nothing():
    """Errors are derived for u of 2⁻¹⁴ and more, and −ln u of 2⁻¹² and more."""
    for v in random_words(np.random.default_rng(7), 20):
        assert _native.gaussian_pair(2**50, 0, v, 0, 1.5)[0] is not None
        assert _native.gaussian_pair(2**50 - 1, ONES, v, 0, 1.5)[0] is None
        for loss, within in ((2.0**-12 * (1 + 1e-9), True), (2.0**-12 * (1 - 1e-9), False)):
            assert (_native.gaussian_pair(int(u_words(np.array([loss]))[0]), 0, v, 0, 1.0)[0] is not None) is within


# The margin of csrc/rounded_gaussian.h: what is undecided, and what its errors may add up to.


def margin(scale: float, radius: float) -> float:
    return 2.0**-46.5 * scale * (1 + radius)


def losses(generator: np.random.Generator, n: int) -> np.ndarray:
    """Values of −ln u over the whole range of the fast path: two thirds even in ln u, a third in ln(−ln u)."""
    low, high = 2.0**-12, 14 * math.log(2)
    return np.concatenate(
        [generator.uniform(low, high, n - n // 3), np.exp(generator.uniform(math.log(low), math.log(high), n // 3))]
    )


def u_words(loss: np.ndarray) -> np.ndarray:
    """e^-loss in units of 2⁻⁶⁴, to 53 bits of the smaller of itself and its complement."""
    small, complement = np.rint(np.ldexp(np.exp(-loss), 64)), np.rint(np.ldexp(-np.expm1(-loss), 64))
    near_zero = loss > 0.7
    return np.where(
        near_zero,
        np.where(near_zero, small, 0).astype(np.uint64),
        np.uint64(0) - np.where(near_zero, 0, complement).astype(np.uint64),
    )


def v_words(turn: np.ndarray) -> np.ndarray:
    return np.rint(turn % 1 * 2.0**53).astype(np.uint64) << np.uint64(11)


def pairs_near_a_half(seed: int, n: int, scale: float, by_angle: bool) -> Iterator[tuple[int, int, float, float]]:
    """Leading words u and v one of whose values lies within three margins of some k + 1/2, and not the other.

    Args:
        by_angle: solve for v given u, otherwise for u given v.

    Yields:
        u, v, how far from the half in margins, right to a tenth, and r; up to n of them.
    """
    generator = np.random.default_rng(seed)
    loss, turn = losses(generator, n), np.rint(generator.uniform(0, 1, n) * 2.0**53) * 2.0**-53
    radius = np.sqrt(2 * loss)
    is_sine = generator.uniform(size=n) < 0.5
    along = np.where(is_sine, np.sin(2 * np.pi * turn), np.cos(2 * np.pi * turn))
    half, away = np.floor(scale * radius * along) + 0.5, generator.uniform(-3, 3, n)
    if by_angle:
        ratio = (half + away * margin(scale, radius)) / (scale * radius)
        usable = np.abs(ratio) < 0.98
        angle = np.arccos(np.where(usable, ratio, 0)) / (2 * np.pi)
        # sin 2πt = cos 2π(t − 1/4)
        turn = np.where(generator.uniform(size=n) < 0.5, angle, -angle) + np.where(is_sine, 0.25, 0)
    else:
        usable = np.abs(along) > 0.02
        along = np.where(usable, along, 1)
        usable &= half * along > 0
        solved = np.abs(half / (scale * along))
        solved += away * margin(scale, solved) / (scale * along) * np.sign(along) * np.sign(half)
        loss = solved**2 / 2
        usable &= (loss > 2.0**-12) & (loss < 14 * math.log(2))
        loss = np.where(usable, loss, 1)
        radius = np.sqrt(2 * loss)
    other = scale * radius * np.where(is_sine, np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn))
    usable &= np.abs(other - np.floor(other) - 0.5) > 3 * margin(scale, radius)
    columns = (u_words(loss), v_words(turn), np.abs(away), radius)
    yield from zip(*(column[usable].tolist() for column in columns), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("by_angle", [True, False], ids=["angle", "radius"])
@pytest.mark.parametrize("scale", SCALES)
def test_leading_bits_never_decide_wrongly_near_a_half(scale, by_angle):
    """2 · 10⁴ pairs and more within three margins of a half, with the least and the greatest bits unseen.

    The header says that errors stay below half a margin: so nothing is decided below half a margin, and everything
    beyond one and a half, each less the tenth by which the distance may be off.
    """
    undecided, pairs = 0, 0
    for u, v, away, _ in pairs_near_a_half(4, 40_000, scale, by_angle):
        decided, least = _native.gaussian_pair(u, 0, v, 0, scale)
        pairs += 1
        if decided is None:
            undecided += 1
            assert away < 1.6
        else:
            assert decided == least == _native.gaussian_pair(u, ONES, v, ONES, scale)[1]
            assert away > 0.4
    assert pairs > 15_000 and 0.25 * pairs < undecided < 0.45 * pairs, "the search found other pairs than it should"


def bisect(low: int, high: int, is_high: Callable[[int], bool]) -> tuple[int, int]:
    """Neighbours between ``low`` and ``high`` (in either order), the first not ``is_high``, the second so."""
    assert not is_high(low) and is_high(high)
    while abs(high - low) > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_high(middle) else (middle, high)
    return low, high


@pytest.mark.parametrize("scale", SCALES)
def test_errors_of_the_fast_path_stay_below_half_the_margin(scale):
    """Where `decide` begins to decide, the true value tells its error: it lies half to one and a half margins away.

    The true value is taken with all unseen bits zero, and with all of them one.
    """
    probes = 0
    for u, v, away, radius in pairs_near_a_half(5, 1500, scale, True):
        # The value moves by at most 2π scale r 2⁻⁶⁴ with each step of v, and by a fifth of that at least.
        step = int(10 * margin(scale, radius) / (2 * math.pi * scale * radius) * 2.0**64) * (1 if probes % 2 else -1)
        if away > 0.4 or not 0 < v + step < 2**64 or _native.gaussian_pair(u, 0, v + step, 0, scale)[0] is None:
            continue
        edge = bisect(v, v + step, lambda word, u=u: _native.gaussian_pair(u, 0, word, 0, scale)[0] is not None)
        for word in edge:
            for unseen in (0, ONES):
                values = [scaled_by(scale, z) for z in true_pair(u << 64 | unseen, word << 64 | unseen)]
                with mpmath.workprec(400):
                    distance = min(abs(x - mpmath.floor(x) - 0.5) for x in values)
                assert 0.5 < distance / margin(scale, radius) < 1.5
        probes += 1
    assert probes > 50


def test_errors_of_the_exact_path_stay_below_their_bound():
    """Where the rounded value changes, the true one is within scale · 2⁻¹¹¹ (1 + 1/r) of a half."""
    generator, probes = random.Random(6), 0
    for attempt in range(450):
        scale, which = SCALES[1:][attempt % 4], generator.randrange(2)
        u = [
            generator.getrandbits(128),
            generator.getrandbits(128 - attempt % 100),
            2**128 - generator.getrandbits(128 - attempt % 50),
        ][attempt % 3] % 2**128 | 1
        with mpmath.workprec(400):
            z = true_pair(u, generator.getrandbits(128))
            radius = mpmath.sqrt(z[0] ** 2 + z[1] ** 2)
            half = mpmath.floor(scale * z[which]) + mpmath.mpf(0.5)
            ratio = half / (scale * radius)
            if abs(ratio) > 0.99:
                continue
            turn = generator.choice([1, -1]) * mpmath.acos(ratio) / (2 * mpmath.pi) + mpmath.mpf(which) / 4
            v = int(mpmath.nint(mpmath.ldexp(turn, 128))) % 2**128
            bound = scale * mpmath.ldexp(1 + 1 / radius, -111)
            reach = int(mpmath.ldexp(4 * bound / (scale * radius), 128)) + 2
        if not reach < v < 2**128 - reach:
            continue
        before = pair_of(u, v - reach, scale)[1][which]
        edge = bisect(
            v - reach,
            v + reach,
            lambda w, u=u, scale=scale, i=which, before=before: pair_of(u, w, scale)[1][i] != before,
        )
        for w in edge:
            with mpmath.workprec(400):
                assert abs(scale * true_pair(u, w)[which] - half) < bound
        probes += 1
    assert probes > 250
