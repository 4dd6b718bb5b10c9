"""Standard normals from a counter: the same numbers wherever, and in whatever order, they are asked for.

Philox4x32-10 (Salmon et al. 2011, doi 10.1145/2063384.2063405) turns a key and a counter into four 32-bit words, of
which Box and Muller (1958) make a normal. It is a fast generator, not a cryptographic one: for reproducible runs.
"""

import triton
import triton.language as tl

_WORD = tl.constexpr(2.0**-32)
_QUARTER = tl.constexpr(2.0**-30)


@triton.jit
def standard_normal(seed, element, parameter, step):
    """z = √(−2 ln u₁) cos(2πu₂), uⱼ = (wⱼ + ½)·2⁻³², of the words w at key ``seed`` and counter (element, …).

    u₁ is never 0 nor 1, so that |z| < √(2·33 ln 2) < 6.77: a normal is beyond once in 7·10¹⁰ draws. In float32 z is
    within 5·10⁻⁶ of itself.

    Args:
        seed: int64 scalar, the key.
        element: block of int64, the counter's first two words.
        parameter: int scalar below 2³², the third.
        step: int64 scalar, of which the low 32 bits are the fourth.
    """
    low = element.to(tl.uint32)
    high = (element >> 32).to(tl.uint32)
    w0, w1, _, _ = tl.philox(seed, low, high, parameter.to(tl.uint32), step.to(tl.uint32))
    u1 = w0.to(tl.float32) * _WORD + 0.5 * _WORD
    # Near 1, where float32 rounds u₁ away, −ln u₁ from 1 − u₁, which it holds.
    v = (w0 ^ 0xFFFFFFFF).to(tl.float32) * _WORD + 0.5 * _WORD
    minus_log = tl.where(v < 0.015625, v * (1 + v * (0.5 + v * (0.333333333 + v * 0.25))), -tl.log(u1))
    radius = tl.sqrt_rn(2 * minus_log)
    # The cosine as the sine of its distance to a quarter turn, an exact integer: no large argument to reduce.
    angle = w1.to(tl.int32, bitcast=True)
    angle = angle ^ (angle >> 31)
    v = ((1 << 30) - 1 - angle).to(tl.float32) * _QUARTER + 0.5 * _QUARTER
    # Odd minimax polynomial of sin(πv/2) on [−1, 1], relative error 5e-9.
    s = v * v
    p = 0.000151485130733 * s - 0.0046737666124
    p = (p * s + 0.0796896789479) * s - 0.645963710600
    return radius * ((p * s + 1.57079631844770) * v)
