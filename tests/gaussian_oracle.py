"""Box and Muller's formula in mpmath with 400 bits, and what the native library makes of the same bits."""

import math

import mpmath

from lora_dp import _native

KEY = bytes(range(32))
INSTRUCTIONS = ["portable", "avx2", "avx512"]
BELOW_MOST = math.nextafter(2.0**33, 0.0)
SCALES = [1.0, 1.5, 2.0**20 * 1.1, 2.0**32 * 1.7, BELOW_MOST]
ONES = 2**64 - 1


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
