"""The functions of csrc/rounded_gaussian.h one by one: integers to the last bit, errors below what the header says."""

import ctypes
import math
import random
from collections.abc import Callable, Iterator

import mpmath
import pytest

from tests.compiled import opened

ONE = 2**120
Halves = ctypes.c_uint64 * 2


class Parts:
    """Calls what tests/native/gaussian_parts.cpp offers; a Wide is an integer below 2¹²⁸."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def double(self, name: str, kind: type) -> Callable[[float], float]:
        function = self._library[f"part_{name}"]
        function.restype, function.argtypes = ctypes.c_double, [kind]
        return function

    def wide(self, name: str, *given: int, last: int | None = None, outputs: int = 1) -> list[int]:
        out = (ctypes.c_uint64 * (2 * outputs))()
        others = [] if last is None else [ctypes.c_uint(last)]
        self._library[f"part_{name}"](*map(halves, given), *others, out)
        return [out[2 * i] << 64 | out[2 * i + 1] for i in range(outputs)]

    def scaled(self, magnitude: int, mantissa: int, shift: int, negative: bool) -> int:
        function = self._library.part_scaled
        function.restype = ctypes.c_int64
        return function(halves(magnitude), ctypes.c_uint64(mantissa), shift, negative)


def halves(value: int) -> ctypes.Array:
    return Halves(value >> 64, value & 2**64 - 1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    # What C++ leaves undefined, such as a shift by too much, ends the process.
    return Parts(
        opened(
            "gaussian_parts",
            tmp_path_factory.mktemp("parts"),
            "-std=c++17",
            "-fsanitize=undefined",
            "-fsanitize-undefined-trap-on-error",
        )
    )


def wides(seed: int, n: int, bits: int = 128) -> Iterator[int]:
    """Integers of every length up to so many bits, and those at which carries begin."""
    generator = random.Random(seed)
    yield from (0, 1, 2**bits - 1, *(2**k - 1 for k in range(1, bits, 9)), *(2**k for k in range(1, bits, 9)))
    for _ in range(n):
        yield generator.getrandbits(generator.randint(1, bits))


def pairs(seed: int, n: int, bits: int = 128) -> Iterator[tuple[int, int]]:
    others = list(wides(seed + 1, n, bits))
    random.Random(seed).shuffle(others)
    yield from zip(wides(seed, n, bits), others, strict=True)
    yield 2**bits - 1, 2**bits - 1


@pytest.mark.slow
def test_integers_become_doubles_rounded_once(parts):
    to_double = parts.double("to_double", ctypes.c_uint64)
    # The last three lie at the middle of two doubles, and one beside it, where rounding twice goes wrong.
    for value in [*wides(0, 2000, 64), 2**63 + 2**10, 2**63 + 2**10 + 1, 2**63 + 2**11 + 2**10 - 1]:
        assert to_double(value) == float(value)


def doubles_below_one(generator: random.Random, n: int) -> Iterator[float]:
    """Of [2⁻⁶⁴, 1]: of every binade, on both sides of where the series changes its centre, and near 1."""
    root = math.sqrt(0.5)
    yield from (1.0, 2.0**-64, math.nextafter(1.0, 0.0))
    for k in range(64):
        near = [root, math.nextafter(root, 0.0), math.nextafter(root, 1.0), 0.5, math.nextafter(1.0, 0.0)]
        yield from (math.ldexp(value, -k) for value in near)
    for k in range(n):
        yield math.ldexp(generator.uniform(0.5, 1), -(k % 64))
        yield 1 - generator.random() * 2.0 ** -generator.randrange(1, 50)


def test_error_of_the_logarithm_in_doubles(parts):
    minus_log = parts.double("minus_log", ctypes.c_double)
    with mpmath.workprec(200):
        for u in doubles_below_one(random.Random(1), 1500):
            true = -mpmath.log(u)
            assert abs(minus_log(u) - true) < 2.0**-51 * (1 + true), u.hex()


@pytest.mark.parametrize("name", ["sine", "cosine"])
def test_error_of_sine_and_cosine_in_doubles(name, parts):
    ours, true = parts.double(name, ctypes.c_double), {"sine": mpmath.sin, "cosine": mpmath.cos}[name]
    generator = random.Random(2)
    angles = [generator.uniform(-1, 1) * math.pi / 4 for _ in range(1500)]
    angles += [sign * math.pi / 4 * (1 - 2.0**-k) for k in range(1, 53) for sign in (1, -1)] + [0.0]
    with mpmath.workprec(200):
        for x in angles:
            assert abs(ours(x) - true(x)) < 2.0**-52, x.hex()


def test_products_of_wide_integers(parts):
    for a, b in pairs(3, 2000):
        assert parts.wide("multiply", a, b, outputs=2) == [a * b >> 128, a * b % 2**128]
    # Those of numbers with 120 fractional bits stay below 256.
    for a, b in pairs(4, 2000, 124):
        assert parts.wide("product", a, b) == [a * b >> 120]


def test_quotients_of_wide_integers(parts):
    for a, b in pairs(5, 1000, 122):
        if a != b:
            numerator, denominator = sorted((a, b))
            assert parts.wide("quotient", numerator, denominator) == [(numerator << 120) // denominator]


def test_square_roots_of_wide_integers(parts):
    """The largest whose product with itself, its last bits dropped, is no larger."""
    for value in [*wides(6, 1000), *(k * k * ONE for k in range(16)), *(k * k * ONE - 1 for k in range(1, 17))]:
        assert parts.wide("square_root", value) == [math.isqrt((value + 1 << 120) - 1)]


def test_error_of_the_exact_logarithm(parts):
    generator = random.Random(7)
    with mpmath.workprec(400):
        root = int(mpmath.ldexp(mpmath.sqrt(0.5), 128))
        at = [value >> k | 1 for k in range(128) for value in (root, 2**128 - 1, 2**127)]
        at += [root + step | 1 for step in (-2, 2, -300, 300)]
        at += [generator.getrandbits(128) >> k % 128 | 1 for k in range(1500)]
        at += [2**128 - (generator.getrandbits(128) >> k % 127) - 1 | 1 for k in range(1500)]
        for u in at:
            true = -mpmath.log(mpmath.ldexp(u, -128))
            assert abs(mpmath.ldexp(parts.wide("exact_minus_log", u)[0], -120) - true) < mpmath.ldexp(1, -112), hex(u)


def test_error_of_exact_sine_and_cosine(parts):
    generator = random.Random(8)
    with mpmath.workprec(400):
        most = int(mpmath.ldexp(mpmath.pi, 118))
        for x in [0, 1, most, *(generator.randrange(most) >> k % 110 for k in range(1500))]:
            s, angle = x * x >> 120, mpmath.ldexp(x, -120)
            sine, cosine = parts.wide("exact_series", x, s, last=1), parts.wide("exact_series", ONE, s, last=0)
            assert abs(mpmath.ldexp(sine[0], -120) - mpmath.sin(angle)) < mpmath.ldexp(1, -117), hex(x)
            assert abs(mpmath.ldexp(cosine[0], -120) - mpmath.cos(angle)) < mpmath.ldexp(1, -117), hex(x)


def test_scaled_values_are_rounded_half_away_from_zero(parts):
    """For every scale of [1, 2³³), whose shift is 52 to 20, and magnitudes below 16."""
    generator = random.Random(9)
    for k in range(3000):
        shift, negative = 20 + k % 33, k % 2 == 0
        mantissa = generator.choice([2**52, 2**53 - 1, 2**52 | generator.getrandbits(52)])
        magnitude = generator.choice([0, 2**124 - 1, generator.getrandbits(124), generator.getrandbits(110)])
        if k % 3 == 0:  # at a half
            mantissa, magnitude = 2**52, (2 * generator.getrandbits(56 - shift) + 1) << 67 + shift
        expected = magnitude * mantissa + (1 << 119 + shift) >> 120 + shift
        assert parts.scaled(magnitude, mantissa, shift, negative) == (-expected if negative else expected)
