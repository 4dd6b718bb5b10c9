"""Rounded Gaussians: exact values, the op, and statistics.

*Exactness.* The oracle is Box and Muller's formula in mpmath with 400 bits. Nothing here is left to chance: the bits
come from fixed seeds.

*Statistics.* Every check rejects a right sampler with probability at most LEVEL = 4e-9, or twice that where its p-value
takes the normal, the χ² or a limit distribution for the exact one:

- mean, deviation, skewness and kurtosis: sums of the Hermite polynomials He₁ … He₄, normal in the limit. For n = 10⁶
  the skewness of He₄, 14.7, makes the tail at 5.9 deviations 1.6 times the normal one; the others are closer;
- Kolmogorov and Smirnov, Anderson and Darling: at the edges of 2¹⁶ cells of equal probability, with the limits'
  p-values. The first can only lose by that; the second's weights agree to 2⁻¹⁶, and its upper tail is bounded below;
- tails beyond 1, 2, 3, 4 and 5 deviations: the exact binomial distribution, both sides;
- the lowest byte is uniform: χ² of 256 cells;
- correlations of values and of squares, at lags 1 to 16, within pairs, and across parameters, draws and both: normal in
  the limit;
- at scales 1 and 3: χ² against the rounded Gaussian's probabilities, cells of less than 10⁴ expected counts merged.

At scales near 2³² rounding moves a value by less than 2⁻³³ deviations and the distribution function by less than 5e-11,
while 10⁸ values resolve 3e-4: there the limits for continuous values hold as they are. At scales 1 and 3 the
distribution is discrete through and through, and the χ² test is that of a discrete one.

That makes CHECKS = 54 checks a run, in an ordinary and in a long run: 2 · 54 · 2 · LEVEL = 8.7e-7 for the whole file.
The ordinary run has a fixed key, so it passes always or never; the long one draws a new key each time.
"""

import math
import random
from collections.abc import Callable, Iterator

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_dp import _native
from lora_dp.ops.registry import reference_only
from lora_dp.ops.rounded_gaussian import rounded_gaussian_
from tests.models import assert_refuses

KEY = bytes(range(32))
INSTRUCTIONS = ["portable", "avx2", "avx512"]
BELOW_MOST = math.nextafter(2.0**33, 0.0)
SCALES = [1.0, 1.5, 2.0**20 * 1.1, 2.0**32 * 1.7, BELOW_MOST]
ONES = 2**64 - 1

LEVEL = 4e-9
CHECKS = 54


@pytest.fixture(scope="module")
def key() -> Iterator[int]:
    number = _native.key_from(KEY)
    yield number
    _native.drop_key(number)


@pytest.fixture(scope="module", params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest) -> str:
    try:
        _native.keystream(KEY, bytes(12), 0, 0, 0, request.param)
    except ValueError as error:
        assert request.param != "portable" and str(error) == f"this machine runs no kernels called '{request.param}'"
        pytest.skip(str(error))
    return request.param


# Exactness


def pair_of(u: int, v: int, scale: float) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """The library's values for u and v of 128 bits: from the leading bits, or None, and from all."""
    return _native.gaussian_pair(u >> 64, u & ONES, v >> 64, v & ONES, scale)


def true_pair(u: int, v: int) -> tuple[mpmath.mpf, mpmath.mpf]:
    """r cos 2πv and r sin 2πv with u and v in units of 2⁻¹²⁸; u is made odd."""
    with mpmath.workprec(400):
        radius = mpmath.sqrt(-2 * mpmath.log(mpmath.ldexp(u | 1, -128)))
        turn = mpmath.ldexp(v, -127)
        return radius * mpmath.cospi(turn), radius * mpmath.sinpi(turn)


def scaled_by(scale: float, z: mpmath.mpf) -> mpmath.mpf:
    with mpmath.workprec(400):
        return scale * z


def nearest(x: mpmath.mpf) -> int:
    """The nearest integer, halves away from zero."""
    with mpmath.workprec(400):
        magnitude = int(mpmath.floor(abs(x) + mpmath.mpf(0.5)))
    return -magnitude if x < 0 else magnitude


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
    st.integers(0, ONES), st.sampled_from([0, 1, ONES, ONES - 1, 2**63, 2**63 - 1]),
    st.integers(0, 63).map(lambda bit: 1 << bit))


@settings(max_examples=200, deadline=None)
@given(u_high=words, u_low=words, v_high=words, v_low=words,
       scale=st.one_of(st.sampled_from(SCALES), st.floats(1.0, 2.0**33, exclude_max=True)))
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


# The margin of csrc/rounded_gaussian.h: what is undecided, and what its errors may add up to.


def margin(scale: float, radius: float) -> float:
    return 2.0**-46.5 * scale * (1 + radius)


def losses(generator: np.random.Generator, n: int) -> np.ndarray:
    """Values of −ln u over the whole range of the fast path: two thirds even in ln u, a third in ln(−ln u)."""
    low, high = 2.0**-12, 14 * math.log(2)
    return np.concatenate([
        generator.uniform(low, high, n - n // 3), np.exp(generator.uniform(math.log(low), math.log(high), n // 3))])


def u_words(loss: np.ndarray) -> np.ndarray:
    """e^-loss in units of 2⁻⁶⁴, to 53 bits of the smaller of itself and its complement."""
    small, complement = np.rint(np.ldexp(np.exp(-loss), 64)), np.rint(np.ldexp(-np.expm1(-loss), 64))
    near_zero = loss > 0.7
    return np.where(near_zero, np.where(near_zero, small, 0).astype(np.uint64),
                    np.uint64(0) - np.where(near_zero, 0, complement).astype(np.uint64))


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
        u = [generator.getrandbits(128), generator.getrandbits(128 - attempt % 100),
             2**128 - generator.getrandbits(128 - attempt % 50)][attempt % 3] % 2**128 | 1
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
        edge = bisect(v - reach, v + reach,
                      lambda w, u=u, scale=scale, i=which, before=before: pair_of(u, w, scale)[1][i] != before)
        for w in edge:
            with mpmath.workprec(400):
                assert abs(scale * true_pair(u, w)[which] - half) < bound
        probes += 1
    assert probes > 250


# The op


def native_values(
    key: int, parameter: int, draw: int, scale: float, n: int, instructions: str = ""
) -> list[int]:
    """What the native library writes, which must be ``n`` values and nothing beside them."""
    margin = 512  # more than the kernels compute at once
    buffer = np.full(n + 2 * margin, 77, np.int64)
    _native.rounded_gaussians(key, parameter, draw, scale, buffer[margin:].ctypes.data, n, instructions)
    assert (buffer[:margin] == 77).all() and (buffer[margin + n :] == 77).all(), "wrote outside its buffer"
    return buffer[margin : margin + n].tolist()


def stream(purpose: int, parameter: int, draw: int, blocks: int) -> list[int]:
    """Quadwords of the stream that csrc/stream.h lays out: purpose and parameter in word 13, the draw in 14 and 15."""
    out = np.empty(8 * blocks, "<u8")
    nonce = (purpose << 24 | parameter).to_bytes(4, "little") + draw.to_bytes(8, "little")
    _native.keystream(KEY, nonce, 0, out.ctypes.data, 64 * blocks, "portable")
    return out.tolist()


def bits_of(parameter: int, draw: int, blocks: int) -> list[tuple[int, int]]:
    """u and v of all pairs as csrc/gaussian_blocks.h lays them out: leading words from stream 1, the others from 2."""
    leading, rest = (stream(purpose, parameter, draw, blocks) for purpose in (1, 2))
    both = [high << 64 | low for high, low in zip(leading, rest, strict=True)]
    return list(zip(both[::2], both[1::2], strict=True))


def assembled(parameter: int, draw: int, scale: float, n: int) -> list[int]:
    return [value for u, v in bits_of(parameter, draw, -(-n // 8)) for value in pair_of(u, v, scale)[1]][:n]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 255, 256, 257, 1000])
def test_values_are_those_of_their_bits(n, scale, key, instructions):
    for parameter, draw in ((0, 0), (1, 0), (2**24 - 1, 0x0123456789ABCDEF)):
        expected = assembled(parameter, draw, scale, n)
        assert native_values(key, parameter, draw, scale, n, instructions) == expected
        out = torch.full((n,), 77)
        assert rounded_gaussian_(out, key, parameter, draw, scale) is out
        assert out.tolist() == expected


def test_values_are_box_and_muller_of_their_bits(key):
    """Nothing between the keystream and the values but the oracle."""
    expected = [nearest(scaled_by(BELOW_MOST, z)) for u, v in bits_of(3, 7, 50) for z in true_pair(u, v)]
    assert native_values(key, 3, 7, BELOW_MOST, 400) == expected


def test_a_long_stream_is_that_of_its_bits(key, instructions):
    """Many blocks, some hundred undecided pairs among them, and an odd end."""
    n = 100_003
    assert native_values(key, 5, 2**32, BELOW_MOST, n, instructions) == assembled(5, 2**32, BELOW_MOST, n)


def test_how_many_are_asked_for_does_not_matter(key, instructions):
    for scale in (3.0, BELOW_MOST):
        whole = native_values(key, 0, 1, scale, 1000, instructions)
        for n in (*range(20), *range(250, 262), 511, 512, 513, 767, 768, 769, 999):
            assert native_values(key, 0, 1, scale, n, instructions) == whole[:n]


# Parameter, first draw and scale of a search for pairs (draw, element) that the leading 64 bits leave open, one in
# 1.7e8: their values show which other bits were taken.
SEARCHED = (0xABCDEF, 0x0123456789A00000, 2.0**33 - 2.0**-19)
OPEN = [
    (8605, 31988), (30330, 15036), (32414, 1048), (33007, 15638), (38723, 10798), (56764, 2200), (61142, 16752),
    (90202, 8920), (98234, 1626), (103422, 10602), (118050, 9316), (119442, 22874), (134124, 17260), (144069, 9216),
    (147195, 7740), (170780, 688), (175551, 9490), (180526, 4328), (199281, 29858), (212515, 12316), (218653, 21324),
    (218739, 12420), (248560, 21076), (258096, 5824), (260774, 30668), (277271, 21266), (283229, 9640), (289781, 13430),
    (291871, 24792), (295055, 330), (302582, 7194), (303514, 17288), (306109, 18622), (312463, 8660), (334009, 11724),
    (341948, 23736), (346685, 12346), (356238, 13934), (363942, 27884),
]  # fmt: skip


def test_unseen_bits_come_from_their_own_block(key, instructions):
    parameter, first, scale = SEARCHED
    outcomes = []
    for draw, element in OPEN:
        block, word = element // 8, element % 8
        leading, rest = (stream(purpose, parameter, first + draw, block + 1)[8 * block :] for purpose in (1, 2))
        u, v = leading[word], leading[word + 1]
        possible = {
            _native.gaussian_pair(u, u_low, v, v_low, scale)[1] for u_low in (0, ONES) for v_low in (0, ONES)}
        assert len(possible) > 1, "the leading bits decide this pair"
        z = true_pair(u << 64 | rest[word], v << 64 | rest[word + 1])
        expected = [nearest(scaled_by(scale, value)) for value in z]
        values = native_values(key, parameter, first + draw, scale, element + 2, instructions)
        outcomes.append(values[element:] == expected)
        # As the odd end, too.
        values = native_values(key, parameter, first + draw, scale, element + 1, instructions)
        outcomes.append(values[element:] == expected[:1])
    assert all(outcomes), f"{outcomes.count(False)} of {len(outcomes)} pairs took other bits"


def test_every_parameter_and_draw_has_values_of_its_own(key):
    other = _native.key_from(bytes(31) + b"\x01")
    streams = [
        native_values(which, parameter, draw, BELOW_MOST, 64)
        for which in (key, other)
        for parameter in (0, 1, 2, 255, 256, 65535, 65536, 2**24 - 1)
        for draw in (0, 1, 2, 2**24, 2**31, 2**32 - 1, 2**32, 2**56, 2**63 - 1)]
    _native.drop_key(other)
    values = [value for stream in streams for value in stream]
    # Among 9216 values spread over 2**34, 0.003 repeat.
    assert len(set(values)) == len(values)


def test_deviation_is_the_scale(key):
    ones, small, large = (np.array(native_values(key, 0, 0, scale, 1000)) for scale in (1.0, 1000.0, 2.0**32))
    assert (np.abs(small - 1000 * (large / 2.0**32)) <= 0.5 + 1e-6).all()
    assert (np.abs(ones - large / 2.0**32) <= 0.5 + 1e-9).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 3), (2, 3, 4)])
def test_any_shape_is_filled_in_the_order_of_its_elements(shape, key):
    expected = native_values(key, 1, 2, 3.0, math.prod(shape))
    assert rounded_gaussian_(torch.empty(shape, dtype=torch.int64), key, 1, 2, 3.0).flatten().tolist() == expected
    with torch.device("meta"):
        out = torch.empty(shape, dtype=torch.int64, device="cpu")
        assert rounded_gaussian_(out, key, 1, 2, 3.0).flatten().tolist() == expected
    with reference_only():
        assert rounded_gaussian_(torch.empty(shape, dtype=torch.int64), key, 1, 2, 3.0).flatten().tolist() == expected


@pytest.mark.parametrize(("out", "words"), [
    (torch.zeros(4), "got torch.float32 (1,)."), (torch.zeros(4, dtype=torch.int32), "got torch.int32 (1,)."),
    (torch.zeros(4, dtype=torch.uint64), "got torch.uint64 (1,)."),
    (torch.zeros(4, 3, dtype=torch.int64).T, "got torch.int64 (1, 3)."),
    (torch.zeros(8, dtype=torch.int64)[::2], "got torch.int64 (2,)."),
    (torch.zeros(1, dtype=torch.int64).expand(4), "got torch.int64 (0,).")])
def test_other_dtypes_and_layouts_are_refused(out, words, key):
    assert_refuses(ValueError, f"rounded_gaussian_: out must be contiguous and int64, {words}",
                   lambda: rounded_gaussian_(out, key, 0, 0, 3.0))
    assert not out.any()


@pytest.mark.parametrize(("parameter", "draw", "scale", "words"), [
    (-1, 0, 3.0, "parameter must lie in [0, 2**24), got -1"),
    (2**24, 0, 3.0, "parameter must lie in [0, 2**24), got 16777216"),
    (2**32, 0, 3.0, "parameter must lie in [0, 2**24), got 4294967296"),
    (0, -1, 3.0, "draw must not be negative, got -1"),
    (0, -(2**63), 3.0, "draw must not be negative, got -9223372036854775808"),
    (0, 0, 0.0, "scale must lie in [1, 2**33), got 0.000000"),
    (0, 0, 0.5, "scale must lie in [1, 2**33), got 0.500000"),
    (0, 0, -3.0, "scale must lie in [1, 2**33), got -3.000000"),
    (0, 0, 2.0**33, "scale must lie in [1, 2**33), got 8589934592.000000"),
    (0, 0, math.inf, "scale must lie in [1, 2**33), got inf"),
    (0, 0, math.nan, "scale must lie in [1, 2**33), got ")])
def test_numbers_out_of_range_are_refused(parameter, draw, scale, words, key):
    for n in (0, 5):
        out = torch.zeros(n, dtype=torch.int64)
        assert_refuses(ValueError, words, lambda out=out: rounded_gaussian_(out, key, parameter, draw, scale))
        assert not out.any()


def test_unknown_keys_are_refused():
    gone = _native.key_from(KEY)
    _native.drop_key(gone)
    out = torch.zeros(5, dtype=torch.int64)
    for number in (gone, 0, -1, 2**62):
        assert_refuses(ValueError, f"there is no key {number}", lambda n=number: rounded_gaussian_(out, n, 0, 0, 3.0))
    assert not out.any()


def test_addresses_and_counts_are_checked(key):
    out = np.zeros(8, np.int64)
    draw = _native.rounded_gaussians
    assert_refuses(ValueError, "out is null: pass the address of its data", lambda: draw(key, 0, 0, 3.0, 0, 1))
    draw(key, 0, 0, 3.0, 0, 0)  # an empty tensor has no address
    for n in (-1, 2**35 + 1, 2**63 - 1):
        assert_refuses(ValueError, f"n must lie in [0, 2**35], got {n}",
                       lambda n=n: draw(key, 0, 0, 3.0, out.ctypes.data, n))
    assert_refuses(ValueError, "this machine runs no kernels called 'sse9'",
                   lambda: draw(key, 0, 0, 3.0, out.ctypes.data, 8, "sse9"))
    assert not out.any()


def test_the_op_is_one_that_torch_knows(key):
    op = torch.ops.lora_dp.rounded_gaussian_.default
    for out in (torch.zeros(5, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)):
        torch.library.opcheck(op, (out, key, 0, 0, 3.0))


def test_fake_tensors_draw_nothing():
    with FakeTensorMode():
        out = torch.empty(3, 4, dtype=torch.int64)
        assert rounded_gaussian_(out, -1, 0, 0, 3.0) is out  # -1 is no key: the native library is not asked
    meta = torch.empty(3, dtype=torch.int64, device="meta")
    assert rounded_gaussian_(meta, -1, 0, 0, 3.0) is meta


def test_compiled_code_draws_the_same_values(key):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def noise(values):
        return values + rounded_gaussian_(torch.empty_like(values), key, 1, 2, 1000.0)

    values = torch.arange(12).view(3, 4)
    expected = native_values(key, 1, 2, 1000.0, 12)
    assert (noise(values) - values).flatten().tolist() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("scale", SCALES)
def test_cpu_and_gpu_give_the_same_values(scale, key):
    if not _native.cuda:
        pytest.skip("installed without a CUDA compiler")
    for n in (0, 1, 2, 7, 8, 9, 255, 256, 257, 1000, 300_001):
        cpu, gpu = (torch.empty(n, dtype=torch.int64, device=device) for device in ("cpu", "cuda"))
        for out in (cpu, gpu):
            rounded_gaussian_(out, key, 5, 2**40 + 3, scale)
        assert torch.equal(gpu.cpu(), cpu)


# Statistics

CELLS = 2**16
BOUNDS = [1, 2, 3, 4, 5]
LAGS = range(1, 17)
WIDE = 2.0**32 * 1.7  # as training uses it: deviation over grid step lies in [2³², 2³³)

Values = Callable[[int, int], np.ndarray]  # of a parameter and a draw


def two_sided(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def binomial(count: int, n: int, probability: float) -> float:
    """Exact: twice the probability of as few or as many."""
    distribution = stats.binom(n, probability)
    return float(min(1, 2 * min(distribution.cdf(count), distribution.sf(count - 1))))


def anderson_darling(statistic: float) -> float:
    """P(A² > statistic) in the limit, at most a tenth too large below 1e-3.

    A² is Σ χ²₁ / (j (j + 1)) (Anderson and Darling 1954). Its tail is that of the first term, χ²₁ / 2, times
    Π (1 − 2 / (j (j + 1)))^(−1/2) over j ≥ 2, which is √3 (Zolotarev 1961); this is 2 % to 6 % too small there.
    """
    return float(min(1, 1.08 * math.sqrt(3) * stats.chi2.sf(2 * statistic, 1)))


class Correlation:
    """Of values, and of their squares, which are standard in the mean under the null hypothesis."""

    def __init__(self) -> None:
        self.n, self.values, self.squares = 0, 0.0, 0.0

    def add(self, left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]) -> None:
        self.n += len(left[0])
        self.values += float(left[0] @ right[0])
        self.squares += float(left[1] @ right[1])

    def p_values(self, where: str) -> dict[str, float]:
        root = math.sqrt(self.n)
        return {f"values {where}": two_sided(self.values / root), f"squares {where}": two_sided(self.squares / root)}


def standard(values: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """z, and (z² − 1) / √2: both of mean 0 and deviation 1."""
    z = values / scale
    return z, (z * z - 1) * math.sqrt(0.5)


def measure(values: Values, parameters: int, draws: int, scale: float = WIDE) -> dict[str, float]:
    """The p-values of all checks but the χ² tests at small scales; the arrays of ``values`` have one length."""
    n = 0
    hermite, beyond = np.zeros(4), np.zeros(len(BOUNDS), np.int64)
    cells, low_bytes = np.zeros(CELLS, np.int64), np.zeros(256, np.int64)
    lagged = [Correlation() for _ in LAGS]
    in_pairs, over_parameters, over_draws, over_both = (Correlation() for _ in range(4))
    above: list[tuple[np.ndarray, np.ndarray]] = []  # the draw before, by parameter
    for draw in range(draws):
        row = []
        for parameter in range(parameters):
            integers = values(parameter, draw)
            z, squares = both = standard(integers, scale)
            n += len(z)
            hermite += [z.sum(), math.sqrt(2) * squares.sum(), z @ (z * z - 3), (z * z) @ (z * z - 6) + 3 * len(z)]
            beyond += [int((np.abs(integers) > bound * scale).sum()) for bound in BOUNDS]
            cells += np.bincount(np.minimum(special.ndtr(z) * CELLS, CELLS - 1).astype(np.int32), minlength=CELLS)
            low_bytes += np.bincount(integers & 255, minlength=256)
            for lag, correlation in zip(LAGS, lagged, strict=True):
                correlation.add((z[:-lag], squares[:-lag]), (z[lag:], squares[lag:]))
            in_pairs.add((z[::2], squares[::2]), (z[1::2], squares[1::2]))
            if row:
                over_parameters.add(row[-1], both)
            if above:
                over_draws.add(above[parameter], both)
                if row:
                    over_both.add(above[parameter - 1], both)
            row.append(both)
        above = row

    edges = np.arange(1, CELLS) / CELLS
    excess = np.cumsum(cells)[:-1] / n - edges
    result = {
        "mean": two_sided(hermite[0] / math.sqrt(n)), "deviation": two_sided(hermite[1] / math.sqrt(2 * n)),
        "skewness": two_sided(hermite[2] / math.sqrt(6 * n)), "kurtosis": two_sided(hermite[3] / math.sqrt(24 * n)),
        "Kolmogorov-Smirnov": float(stats.kstwobign.sf(math.sqrt(n) * np.abs(excess).max())),
        "Anderson-Darling": anderson_darling(n * float((excess**2 / (edges * (1 - edges))).sum()) / CELLS),
        "lowest byte": float(stats.chisquare(low_bytes).pvalue)}
    for bound, count in zip(BOUNDS, beyond.tolist(), strict=True):
        # An integer lies beyond where the value itself is beyond the middle between it and the last one within.
        inside = (math.floor(bound * scale) + 0.5) / scale
        result[f"beyond {bound}"] = binomial(count, n, 2 * float(stats.norm.sf(inside)))
    for lag, correlation in zip(LAGS, lagged, strict=True):
        result |= correlation.p_values(f"at lag {lag}")
    return (result | in_pairs.p_values("in pairs") | over_parameters.p_values("over parameters")
            | over_draws.p_values("over draws") | over_both.p_values("over both"))


def rounded_probabilities(scale: float, n: int) -> tuple[int, np.ndarray]:
    """P(k) for |k| < most, and that of all beyond on either side; each at least 10⁴ / n."""
    most = next(k for k in range(1, 100) if n * stats.norm.sf((k + 0.5) / scale) < 1e4)
    edges = (np.arange(-most, most) + 0.5) / scale
    return most, np.diff(special.ndtr(edges), prepend=0, append=1)


def chi_square(chunks: Iterator[np.ndarray], scale: float, n: int) -> float:
    most, probabilities = rounded_probabilities(scale, n)
    counts = np.zeros(len(probabilities), np.int64)
    for chunk in chunks:
        counts += np.bincount(np.clip(chunk, -most, most) + most, minlength=len(counts))
    assert counts.sum() == n
    return float(stats.chisquare(counts, n * probabilities).pvalue)


def draw_values(key: int, parameter: int, draw: int, scale: float, n: int) -> np.ndarray:
    return rounded_gaussian_(torch.empty(n, dtype=torch.int64), key, parameter, draw, scale).numpy()


def check(p_values: dict[str, float]) -> None:
    rejected = {name: p for name, p in p_values.items() if not p >= LEVEL}
    assert not rejected, f"not rounded Gaussians: {rejected}"


def run(key: int, parameters: int, draws: int, size: int, small_chunks: int) -> None:
    p_values = measure(lambda parameter, draw: draw_values(key, parameter, draw, WIDE, size), parameters, draws)
    for scale in (1.0, 3.0):
        chunks = (draw_values(key, 0, draws + chunk, scale, size) for chunk in range(small_chunks))
        p_values[f"small scale {scale}"] = chi_square(chunks, scale, small_chunks * size)
    assert len(p_values) == CHECKS
    check(p_values)


def test_checks_share_out_the_false_alarms():
    assert 2 * CHECKS * 2 * LEVEL <= 1e-6
    for statistic, probability in ((3.857, 0.010241), (10, 1.38150e-5), (18, 3.47482e-9), (25, 2.69514e-12)):
        assert 0.99 <= anderson_darling(statistic) / probability < 1.1
    most, probabilities = rounded_probabilities(3.0, 10**6)
    assert len(probabilities) == 2 * most + 1 and probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert probabilities[most] == pytest.approx(math.erf(0.5 / 3 / math.sqrt(2)), rel=1e-12)
    assert probabilities.min() * 10**6 > 1e4 * 0.9


def test_a_million_values_are_rounded_gaussians(key):
    run(key, 2, 2, 250_000, 4)


@pytest.mark.long
def test_a_hundred_million_values_are_rounded_gaussians():
    """A fresh key, 1.007e8 values at the scale of training and 2.1e7 at each small one, half a million at a time."""
    key = _native.new_key()
    try:
        run(key, 6, 32, 2**19, 40)
    finally:
        _native.drop_key(key)


def each(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Values], Values]:
    """A defect of every draw by itself."""
    return lambda values: lambda parameter, draw: change(values(parameter, draw))


def of_standard(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Values], Values]:
    return each(lambda values: np.rint(change(values / WIDE) * WIDE).astype(np.int64))


def with_signs(magnitudes: np.ndarray, signs: np.ndarray) -> np.ndarray:
    return np.abs(magnitudes) * np.where(signs < 0, -1, 1)


def second_of_pairs(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Values], Values]:
    return each(lambda values: np.stack([values[::2], change(values[::2], values[1::2])], 1).ravel())


def sums_of_twelve(parameter: int, draw: int) -> np.ndarray:
    uniform = np.random.default_rng((parameter, draw)).uniform(size=(12, 100_000))
    return np.rint((uniform.sum(0) - 6) * WIDE).astype(np.int64)


DEFECTS: dict[str, tuple[Callable[[Values], Values], set[str]]] = {
    "deviation one percent too large": (of_standard(lambda z: 1.01 * z), {"deviation"}),
    "deviation one percent too small": (of_standard(lambda z: 0.99 * z), {"deviation"}),
    "mean shifted": (of_standard(lambda z: z + 0.01), {"mean", "Kolmogorov-Smirnov", "Anderson-Darling"}),
    "skewed": (of_standard(lambda z: z + 0.01 * (z * z - 1)), {"skewness"}),
    "sums of twelve uniforms": (lambda values: sums_of_twelve, {"kurtosis", "beyond 3"}),
    "cut off at four deviations": (of_standard(lambda z: np.clip(z, -3.9999, 3.9999)), {"beyond 4"}),
    "cut off at three deviations": (of_standard(lambda z: np.where(np.abs(z) > 3, z / 3, z)), {"beyond 3", "kurtosis"}),
    "far tail too far": (of_standard(lambda z: np.where(np.abs(z) > 4, z * 1.3, z)), {"beyond 5"}),
    "one in a hundred is zero": (
        each(lambda values: np.where(np.arange(len(values)) % 100, values, 0)), {"Kolmogorov-Smirnov"}),
    "lowest bit never set": (each(lambda values: values & ~1), {"lowest byte"}),
    "lowest byte never set": (each(lambda values: values & ~255), {"lowest byte"}),
    "neighbours of one sign": (
        each(lambda values: with_signs(values, np.repeat(values[::2], 2))), {"values at lag 1", "values in pairs"}),
    "pairs repeat a value": (second_of_pairs(lambda first, second: first), {"values in pairs"}),
    "pairs share a magnitude": (second_of_pairs(with_signs), {"squares in pairs", "squares at lag 1"}),
    "pairs leave out a quarter": (
        second_of_pairs(lambda first, second: with_signs(second, np.where(second < first, first, second))),
        {"values in pairs"}),
    "every block twice": (
        each(lambda values: values.reshape(-1, 2, 8)[:, [0, 0]].ravel()), {"values at lag 8", "squares at lag 8"}),
    "two blocks share their signs": (
        each(lambda values: with_signs(values, values.reshape(-1, 2, 8)[:, [0, 0]].ravel())), {"values at lag 8"}),
    "deviation that wanders": (
        each(lambda values: np.rint(values * np.repeat(np.where(np.arange(len(values) // 100) % 2, 1.1, 0.9), 100))
             .astype(np.int64)), {f"squares at lag {lag}" for lag in LAGS}),
    "parameter ignored": (
        lambda values: lambda parameter, draw: values(0, draw), {"values over parameters", "squares over parameters"}),
    "draw ignored": (
        lambda values: lambda parameter, draw: values(parameter, 0), {"values over draws", "squares over draws"}),
    "parameter and draw mixed": (
        lambda values: lambda parameter, draw: values(parameter ^ draw, 0), {"values over both", "squares over both"}),
    "parameters differ in sign": (
        lambda values: lambda parameter, draw: with_signs(values(0, draw), values(parameter + 2, draw)),
        {"squares over parameters"}),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_are_caught(defect, key):
    """Planted in the values of the ordinary run, which pass as they are: each check named must reject."""
    plant, caught = DEFECTS[defect]
    values = plant(lambda parameter, draw: draw_values(key, parameter, draw, WIDE, 250_000))
    p_values = measure(values, 2, 2)
    assert {name: p for name, p in p_values.items() if name in caught and p >= LEVEL} == {}
    with pytest.raises(AssertionError, match="not rounded Gaussians"):
        check(p_values)


@pytest.mark.parametrize("defect", [
    lambda z: np.floor(3 * z), lambda z: np.trunc(3 * z), lambda z: np.rint(3.03 * z), lambda z: np.rint(2.97 * z),
    lambda z: np.rint(3 * z + 0.03), lambda z: np.where(np.abs(z) > 3, 0, np.rint(3 * z)),
    lambda z: np.rint(np.rint(3 * z * 4) / 4)], ids=[
    "rounded down", "rounded to zero", "too wide", "too narrow", "shifted", "cut off", "rounded twice"])
def test_planted_defects_of_rounding_are_caught(defect):
    z = np.random.default_rng(0).standard_normal(10**6)
    assert chi_square(iter([np.rint(3 * z).astype(np.int64)]), 3.0, 10**6) >= LEVEL
    assert chi_square(iter([defect(z).astype(np.int64)]), 3.0, 10**6) < LEVEL
