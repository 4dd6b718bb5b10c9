"""Values that no caller should give, and buffers that show every write beside them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lora_dp.ops.native import native

REFUSALS = (ValueError, TypeError, OverflowError)
GUARD = 256
REARS = st.sampled_from([0, GUARD])
KEY = native.key_from(bytes(range(32)))

# What no number is: nanobind takes anything with __index__ for an integer, True too.
NO_NUMBERS = st.sampled_from([None, "8", b"8", [8], (8,), {}, object(), 1j, np.ones(2), Ellipsis, int])
NO_INTEGERS = st.one_of(NO_NUMBERS, st.sampled_from([0.0, 1.5, math.nan, math.inf, np.float64(8)]))
BEYOND_64_BITS = st.one_of(st.integers(2**64, 2**200), st.integers(-(2**200), -(2**63) - 1))
NEGATIVE = st.one_of(st.integers(-3, -1), st.integers(-(2**63), -1))
HOSTILE_FLOATS = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, -5e-324, 1e308, -1.0, 0.999, 2.0**33]),
    st.floats(),
    NO_NUMBERS,
    st.just(10**400),
)
SCALES = st.floats(1, 2.0**33, exclude_max=True)


def hostile(most: int) -> st.SearchStrategy[Any]:
    """For an integer in [0, most]: what lies outside."""
    beyond = st.one_of(st.integers(most + 1, most + 3), st.integers(most + 1, 2**64))
    return st.one_of(NEGATIVE, beyond, BEYOND_64_BITS, NO_INTEGERS)


DRAWS, BAD_DRAWS = st.integers(0, 2**63 - 1), hostile(2**63 - 1)
# Numbers of keys that nobody holds; small ones may be another test's.
BAD_KEYS = st.one_of(st.integers(-(2**63), 0), st.integers(2**40, 2**63 - 1), BEYOND_64_BITS, NO_INTEGERS)


class Buffer:
    """Bytes between guard zones. Without the rear zone a sanitizer's own follows the last byte, and sees reads too."""

    def __init__(self, content: bytes, rear: int = GUARD):
        self.whole = np.full(GUARD + len(content) + rear, 0xA5, np.uint8)
        self.size = len(content)
        self.bytes[:] = np.frombuffer(content, np.uint8)
        self.before = self.whole.copy()

    @property
    def bytes(self) -> np.ndarray:
        return self.whole[GUARD : GUARD + self.size]

    @property
    def address(self) -> int:
        return self.whole.ctypes.data + GUARD

    def changed_within(self, n_bytes: int) -> bool:
        """Whether all bytes but the first so many of its content, and the guard zones, are as they were."""
        same = self.whole == self.before
        return bool(same[:GUARD].all() and same[GUARD + n_bytes :].all())


def arguments(draw: Any, valid: dict[str, Any], bad: dict[str, Any], name: str) -> tuple[dict[str, Any], set[str]]:
    """Arguments that are valid but for the one called so and perhaps another, and the names of these."""
    chosen = {each: draw(strategy) for each, strategy in valid.items()}
    worst = {name} | draw(st.one_of(st.just(set()), st.sets(st.sampled_from(sorted(bad)), max_size=1)))
    worst &= bad.keys()
    chosen.update({each: draw(bad[each]) for each in sorted(worst)})
    return chosen, worst


def accepts(function: Callable[..., Any], *values: Any, **named: Any) -> bool:
    try:
        function(*values, **named)
    except REFUSALS:
        return False
    return True


CAPACITY = 3000
MOST_COUNTER = 2**32 - CAPACITY // 64 - 1
SIZES = st.integers(0, CAPACITY)
OUT = object()  # stands for the address of the buffer
BAD_ADDRESSES = st.one_of(st.just(0), NEGATIVE, BEYOND_64_BITS, NO_INTEGERS)
BAD_INSTRUCTIONS = st.one_of(st.sampled_from(["portable", "avx9", "\0", "\ud800", "avx2" * 99]), st.text(), NO_NUMBERS)
BAD_BYTES = st.one_of(st.binary(), NO_INTEGERS, st.sampled_from([bytearray(32), memoryview(bytes(32)), "k" * 32, 32]))

BAD_PARAMETERS = hostile(2**24 - 1)

# Of every function, what its arguments may be and what not.
FILLING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "keystream": (
        {
            "key": st.binary(min_size=32, max_size=32),
            "nonce": st.binary(min_size=12, max_size=12),
            "counter": st.integers(0, MOST_COUNTER),
            "out": st.just(OUT),
            "n_bytes": SIZES,
            "instructions": st.just(""),
        },
        {
            "key": BAD_BYTES,
            "nonce": BAD_BYTES,
            "counter": hostile(2**32 - 1),
            "out": BAD_ADDRESSES,
            "n_bytes": hostile(2**38),
            "instructions": BAD_INSTRUCTIONS,
        },
    ),
    "sampling_bits": (
        {"key": st.just(KEY), "draw": DRAWS, "out": st.just(OUT), "n_bytes": SIZES},
        {"key": BAD_KEYS, "draw": BAD_DRAWS, "out": BAD_ADDRESSES, "n_bytes": hostile(2**38)},
    ),
    "mask_bits": (
        {
            "key": st.just(KEY),
            "parameter": st.integers(0, 2**24 - 1),
            "draw": DRAWS,
            "out": st.just(OUT),
            "n_bytes": SIZES,
        },
        {
            "key": BAD_KEYS,
            "parameter": BAD_PARAMETERS,
            "draw": BAD_DRAWS,
            "out": BAD_ADDRESSES,
            "n_bytes": hostile(2**38),
        },
    ),
    "rounded_gaussians": (
        {
            "key": st.just(KEY),
            "parameter": st.integers(0, 2**24 - 1),
            "draw": DRAWS,
            "scale": SCALES,
            "out": st.just(OUT),
            "n": SIZES,
            "instructions": st.just(""),
        },
        {
            "key": BAD_KEYS,
            "parameter": BAD_PARAMETERS,
            "draw": BAD_DRAWS,
            "scale": HOSTILE_FLOATS,
            "out": BAD_ADDRESSES,
            "n": hostile(2**35),
            "instructions": BAD_INSTRUCTIONS,
        },
    ),
}

CHANGED = ["theta", "first", "second", "gradient"]
