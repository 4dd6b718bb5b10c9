"""Hostile arguments of what fills a buffer: refused with nothing changed, or the work is done, and nothing else."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_dp.ops.native import native
from tests.ops.hostile_values import (
    BAD_BYTES,
    BAD_KEYS,
    CAPACITY,
    FILLING,
    HOSTILE_FLOATS,
    KEY,
    OUT,
    REARS,
    REFUSALS,
    SCALES,
    Buffer,
    accepts,
    arguments,
    hostile,
)

BITS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**50 - 1, 2**61, 2**63, 2**64 - 1]))

PAIR = (
    {**{name: BITS for name in ("u_high", "u_low", "v_high", "v_low")}, "scale": SCALES},
    {**{name: hostile(2**64 - 1) for name in ("u_high", "u_low", "v_high", "v_low")}, "scale": HOSTILE_FLOATS},
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "name"), [(function, name) for function, (_, bad) in FILLING.items() for name in ["", *bad]]
)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_functions_that_fill_a_buffer(function: str, name: str, data: st.DataObject) -> None:
    chosen, worst = arguments(data.draw, *FILLING[function], name)
    width, size = (8, "n") if function == "rounded_gaussians" else (1, "n_bytes")
    buffer = Buffer(bytes(width * CAPACITY), rear=data.draw(REARS))
    chosen = {each: buffer.address if value is OUT else value for each, value in chosen.items()}
    accepted = accepts(getattr(native, function), **chosen)
    assert buffer.changed_within(width * int(chosen[size]) if accepted else 0)
    assert accepted or worst
    if accepted:
        assert not worst & {"counter", "parameter", "draw", size}
        assert function == "keystream" or "key" not in worst
        assert function != "keystream" or (len(chosen["key"]), len(chosen["nonce"])) == (32, 12)
        assert function != "rounded_gaussians" or 1 <= chosen["scale"] < 2**33


@pytest.mark.parametrize("name", ["", *PAIR[1]])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_gaussian_pair(name: str, data: st.DataObject) -> None:
    chosen, worst = arguments(data.draw, *PAIR, name)
    try:
        decided, exact = native.gaussian_pair(**chosen)
    except REFUSALS:
        assert worst
        return
    assert worst <= {"scale"} and 1 <= chosen["scale"] < 2**33
    assert decided is None or decided == exact
    assert max(map(abs, exact)) <= 13.33 * float(chosen["scale"]) + 1


@settings(max_examples=100, deadline=None)
@given(content=st.one_of(st.binary(min_size=31, max_size=33), BAD_BYTES), number=BAD_KEYS)
def test_keys(content: Any, number: Any) -> None:
    accepts(native.drop_key, number)
    try:
        key = native.key_from(content)
    except REFUSALS:
        assert not (isinstance(content, bytes) and len(content) == 32)
        return
    assume(any(content))  # a key of zeros counts as lost
    assert accepts(native.rounded_gaussians, key, 0, 0, 1.0, 0, 0)
    native.drop_key(key)
    native.drop_key(key)
    with pytest.raises(ValueError, match="there is no key"):
        native.rounded_gaussians(key, 0, 0, 1.0, 0, 0)


@pytest.mark.parametrize(
    "name",
    [
        "keystream",
        "sampling_bits",
        "mask_bits",
        "rounded_gaussians",
        "gaussian_pair",
        "private_update",
        "key_from",
        "drop_key",
    ],
)
def test_wrong_numbers_of_arguments(name: str) -> None:
    for values, named in [((), {}), ((0,) * 20, {}), ((), {"nothing": 0}), ((), {"key": 0, "bytes": 0})]:
        with pytest.raises(TypeError):
            getattr(native, name)(*values, **named)


@pytest.mark.parametrize(
    ("function", "named", "taken"),
    [
        ("keystream", {"counter": 2**32 - 1, "n_bytes": 64}, True),
        ("keystream", {"counter": 2**32 - 1, "n_bytes": 65}, False),
        ("keystream", {"counter": 2**32, "n_bytes": 0}, False),
        ("keystream", {"counter": -1, "n_bytes": 0}, False),
        ("keystream", {"counter": 2**32 - 2, "n_bytes": 128}, True),
        ("keystream", {"counter": 0, "n_bytes": -1}, False),
        ("keystream", {"counter": 0, "n_bytes": 2**38 + 1}, False),
        ("sampling_bits", {"n_bytes": 2**38 + 1}, False),
        ("sampling_bits", {"n_bytes": 1}, True),
        ("mask_bits", {"parameter": 2**24 - 1, "n_bytes": 1}, True),
        ("mask_bits", {"parameter": 2**24, "n_bytes": 0}, False),
        ("mask_bits", {"parameter": -1, "n_bytes": 0}, False),
        ("mask_bits", {"parameter": 0, "n_bytes": 2**38 + 1}, False),
        ("rounded_gaussians", {"n": 2**35 + 1}, False),
        ("rounded_gaussians", {"n": -1}, False),
        ("rounded_gaussians", {"n": 1, "scale": 1.0}, True),
        ("rounded_gaussians", {"n": 0, "scale": 2.0**33}, False),
        ("rounded_gaussians", {"n": 0, "scale": math.nextafter(2.0**33, 0)}, True),
        ("rounded_gaussians", {"n": 0, "scale": math.nextafter(1, 0)}, False),
    ],
)
@pytest.mark.parametrize("null", [False, True])
def test_the_edges_of_what_fills_a_buffer(function: str, named: dict[str, Any], taken: bool, null: bool) -> None:
    buffer = Buffer(bytes(1024))
    chosen = {
        "keystream": {"key": bytes(32), "nonce": bytes(12)},
        "sampling_bits": {"key": KEY, "draw": 0},
        "mask_bits": {"key": KEY, "draw": 0},
        "rounded_gaussians": {"key": KEY, "parameter": 0, "draw": 0, "scale": 1.0},
    }[function]
    written = named.get("n_bytes", 8 * named.get("n", 0))
    accepted = accepts(getattr(native, function), **{**chosen, **named, "out": 0 if null else buffer.address})
    assert accepted is (taken and not (null and written))
    assert buffer.changed_within(written if accepted else 0)


@pytest.mark.parametrize(
    "draw",
    [
        lambda *out: native.sampling_bits(KEY, 3, *out),
        lambda *out: native.mask_bits(KEY, 2, 3, *out),
        lambda *out: native.keystream(bytes(32), bytes(12), 0, *out),
    ],
)
def test_few_bytes_are_the_first_of_many(draw: Callable[[int, int], None]) -> None:
    whole = np.zeros(128, np.uint8)
    draw(whole.ctypes.data, 128)
    assert whole.any()
    for n in (1, 2, 3, 63, 64, 65):
        part = np.zeros(128, np.uint8)
        draw(part.ctypes.data, n)
        assert np.array_equal(part[:n], whole[:n]) and not part[n:].any()
