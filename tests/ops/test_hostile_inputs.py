"""Hostile arguments: refused with a Python exception, and nothing has changed; or the work is done, and nothing else.

An address that is not null is believed, so whatever a native function would accept here fits the buffers behind it.
"""

import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_dp.kernels.optimizer_rows import adam_row, sgd_row
from lora_dp.ops.native import native
from lora_dp.ops.private_update import ExampleSum, private_update_
from lora_dp.ops.rounded_gaussian import rounded_gaussian_

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
BITS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**50 - 1, 2**61, 2**63, 2**64 - 1]))
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
PAIR = (
    {**{name: BITS for name in ("u_high", "u_low", "v_high", "v_low")}, "scale": SCALES},
    {**{name: hostile(2**64 - 1) for name in ("u_high", "u_low", "v_high", "v_low")}, "scale": HOSTILE_FLOATS},
)


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


# The columns of struct Row in csrc/update_math.h.
COLUMNS = [
    "theta",
    "sum",
    "coefficients",
    "first",
    "second",
    "gradient",
    "size",
    "examples",
    "theta_dtype",
    "sum_dtype",
    "stride",
    "length",
    "reach",
    "first_tile",
]
CHANGED = ["theta", "first", "second", "gradient"]
WEIGHTS, EXAMPLES = 40, 3
BYTES_OF_DTYPE = [4, 2, 2, 8]
INT64 = st.one_of(
    st.integers(-3, 70),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([2**20, 2**20 + 1, 2**24, 2**24 + 1, 2**35, 2**35 + 1, 2**62, 2**63 - 1, -(2**63)]),
)


class Rows:
    """A table of rows with a buffer behind every address, large enough for the widest dtype."""

    def __init__(self, draw: Any):
        self.random = np.random.default_rng(draw(st.integers(0, 2**32)))
        self.rear = draw(REARS)
        self.inputs: list[Buffer] = []
        self.outputs: list[dict[str, Buffer]] = []
        self.held = [self.row(draw) for _ in range(draw(st.integers(1, 3)))]  # what the buffers are made for
        self.rows = [dict(row) for row in self.held]

    def garbage(self, n: int) -> Buffer:
        return Buffer(self.random.bytes(8 * n), self.rear)

    def input(self, numbers: np.ndarray) -> int:
        self.inputs.append(Buffer(np.ascontiguousarray(numbers).tobytes(), self.rear))
        return self.inputs[-1].address

    def row(self, draw: Any) -> dict[str, int]:
        # A tile has 4096 elements.
        stride, length = draw(st.sampled_from([(1, 7), (3, 5), (64, 2), (300, 1), (1, 4097), (700, 6)]))
        size = stride * length * draw(st.integers(0, 2))
        examples = draw(st.integers(0, EXAMPLES))
        with_examples = draw(st.booleans())
        sum_dtype = draw(st.sampled_from([0, 3]))
        numbers = self.random.standard_normal((examples if with_examples else 1) * size)
        self.outputs.append({name: self.garbage(size) for name in CHANGED})
        return {
            **{name: buffer.address for name, buffer in self.outputs[-1].items()},
            "sum": self.input(numbers.astype(np.float32 if sum_dtype == 0 else np.float64)),
            "coefficients": self.input(self.random.standard_normal(examples)) if with_examples else 0,
            "size": size,
            "examples": examples,
            "theta_dtype": draw(st.integers(0, 3)),
            "sum_dtype": sum_dtype,
            "stride": stride,
            "length": length,
            "reach": draw(st.sampled_from([0, 1, 2, WEIGHTS - 1])),
            "first_tile": draw(INT64),
        }

    def damage(self, draw: Any, name: str) -> None:
        """Makes one entry of this column hostile. What would be accepted still fits the buffers."""
        p = draw(st.integers(0, len(self.rows) - 1))
        row, held = self.rows[p], self.held[p]
        if name in (*CHANGED, "sum", "coefficients"):
            # Without coefficients the sum is what the first example, if there is one, holds.
            assume(name != "coefficients" or held["examples"] > 0)
            row[name] = 0
        elif name in ("size", "examples"):
            row[name] = draw(st.one_of(NEGATIVE, st.integers(0, held[name]), st.integers(2**35 + 1, 2**63 - 1)))
        elif name == "sum_dtype":
            row[name] = draw(INT64.filter(lambda dtype: dtype != 3 or held["sum_dtype"] == 3))
        else:
            row[name] = draw(st.one_of(st.integers(WEIGHTS - 1, WEIGHTS + 1), INT64))
        # The scratch of such a row takes hundreds of megabytes.
        assume(not 2**17 < row["reach"] * row["stride"] <= 2**24)


def is_lawful(row: dict[str, int], optimizer: int, weights: int, n_weights: int) -> bool:
    """Whether a row is one that the native library may take."""
    size, stride, length, reach = (row[name] for name in ("size", "stride", "length", "reach"))
    needed = ["theta", *(["first"] if optimizer > 0 else []), *(["second"] if optimizer > 1 else [])]
    return (
        0 <= size <= 2**35
        and 0 <= row["examples"] <= 2**35
        and 0 <= row["theta_dtype"] <= 3
        and row["sum_dtype"] in (0, 3)
        and stride >= 1
        and length >= 1
        and reach >= 0
        and (not reach or size % stride == 0 and size // stride % length == 0 and reach * stride <= 2**24)
        and (not reach or bool(weights) and reach < n_weights)
        and (not size or all(row[name] for name in needed))
        and (not size or bool(row["sum"]) or bool(row["coefficients"]) and not row["examples"])
    )


def update_arguments(rows: Rows) -> tuple[dict[str, Any], dict[str, Any]]:
    count = len(rows.rows)
    table = np.array([[row[name] for name in COLUMNS] for row in rows.rows], np.int64)
    return (
        {
            "key": st.just(KEY),
            "draw": DRAWS,
            "rows": st.just(rows.input(table)),
            "hyper": st.just(rows.input(rows.random.standard_normal((count, 8)))),
            "count": st.just(count),
            "optimizer": st.integers(0, 3),
            "noisy": st.booleans(),
            "scale": SCALES,
            "step": st.integers(-1022, 1023).map(lambda power: 2.0**power),
            "expected_batch_size": st.floats(0.5, 1e6),
            "weights": st.just(rows.input(rows.random.random(WEIGHTS))),
            "n_weights": st.just(WEIGHTS),
            "threads": st.integers(1, 4),
            "instructions": st.just(""),
        },
        {
            "key": BAD_KEYS,
            "draw": BAD_DRAWS,
            "rows": BAD_ADDRESSES,
            "hyper": BAD_ADDRESSES,
            "count": st.one_of(st.integers(0, count), hostile(2**24 - 1)),
            "optimizer": hostile(3),
            "noisy": st.one_of(NO_INTEGERS, st.sampled_from([0, 1, 2])),
            "scale": HOSTILE_FLOATS,
            "step": HOSTILE_FLOATS,
            "expected_batch_size": HOSTILE_FLOATS,
            "weights": BAD_ADDRESSES,
            "n_weights": st.one_of(NEGATIVE, st.integers(0, WEIGHTS), BEYOND_64_BITS, NO_INTEGERS),
            "threads": st.one_of(st.sampled_from([0, 1024]), hostile(1024)),
            "instructions": BAD_INSTRUCTIONS,
        },
    )


UPDATE_ARGUMENTS = [
    "key",
    "draw",
    "rows",
    "hyper",
    "count",
    "optimizer",
    "noisy",
    "scale",
    "step",
    "expected_batch_size",
    "weights",
    "n_weights",
    "threads",
    "instructions",
]


@pytest.mark.parametrize("name", ["", *UPDATE_ARGUMENTS, *(f"{column} of a row" for column in COLUMNS)])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_private_update(name: str, data: st.DataObject) -> None:
    rows = Rows(data.draw)
    if name.endswith(" of a row"):
        rows.damage(data.draw, name.removesuffix(" of a row"))
    if data.draw(st.integers(0, 4)) == 0:
        rows.damage(data.draw, data.draw(st.sampled_from(COLUMNS)))
    chosen, worst = arguments(data.draw, *update_arguments(rows), name)
    accepted = accepts(native.private_update, **chosen)
    taken = rows.rows[: chosen["count"]] if accepted else []
    for p, outputs in enumerate(rows.outputs):
        n_bytes = taken[p]["size"] * BYTES_OF_DTYPE[taken[p]["theta_dtype"]] if p < len(taken) else 0
        for column, buffer in outputs.items():
            assert buffer.changed_within(n_bytes), f"{column} of row {p}"
    assert all(buffer.changed_within(0) for buffer in rows.inputs), "an input was changed"
    assert accepted or worst or rows.rows != rows.held
    if accepted:
        assert not worst & {"draw", "optimizer"} and chosen["count"] >= 0 and 1 <= chosen["threads"] <= 1024
        assert 0 < chosen["expected_batch_size"] < math.inf
        if chosen["noisy"]:
            assert "key" not in worst and 1 <= chosen["scale"] < 2**33 and math.frexp(chosen["step"])[0] == 0.5
        assert all(is_lawful(row, chosen["optimizer"], chosen["weights"], chosen["n_weights"]) for row in taken)


# Rows without an element, for which nothing is read or written: (column, value, others, whether it is taken).
EDGES: list[tuple[str, int, dict[str, int], bool]] = [
    ("size", -1, {}, False),
    ("size", 2**35 + 1, {}, False),
    ("examples", -1, {}, False),
    ("examples", 2**35, {}, True),
    ("examples", 2**35 + 1, {}, False),
    ("theta_dtype", -1, {}, False),
    ("theta_dtype", 0, {}, True),
    ("theta_dtype", 3, {}, True),
    ("theta_dtype", 4, {}, False),
    ("sum_dtype", 0, {}, True),
    ("sum_dtype", 1, {}, False),
    ("sum_dtype", 2, {}, False),
    ("sum_dtype", 3, {}, True),
    ("stride", 0, {}, False),
    ("length", 0, {}, False),
    ("reach", -1, {}, False),
    ("reach", 0, {}, True),
    ("stride", 2**35, {}, True),
    ("stride", 2**35 + 1, {}, False),
    ("length", 2**35, {}, True),
    ("length", 2**35 + 1, {}, False),
    ("reach", 1, {"stride": 2**24}, True),
    ("reach", 1, {"stride": 2**24 + 1}, False),
    ("reach", 2, {"stride": 2**23}, True),
    ("reach", 2, {"stride": 2**23 + 1}, False),
    ("reach", 2**20, {}, True),
    ("reach", 2**20 + 1, {}, False),
]
MANY = 2**20 + 2  # weights, of which none is read


@pytest.mark.parametrize(("column", "value", "others", "taken"), EDGES)
def test_the_edges_of_a_row(column: str, value: int, others: dict[str, int], taken: bool) -> None:
    row = {**dict.fromkeys(COLUMNS, 0), "stride": 1, "length": 1, **others, column: value}
    table, weights = np.array([row[name] for name in COLUMNS], np.int64), np.ones(1)
    assert taken is accepts(
        native.private_update,
        KEY,
        0,
        table.ctypes.data,
        np.zeros(8).ctypes.data,
        1,
        0,
        True,
        2.0,
        0.5,
        1.0,
        weights.ctypes.data,
        MANY,
        1,
    )


@pytest.mark.parametrize(
    ("size", "stride", "length", "taken"),
    [
        (6, 2, 3, True),
        (7, 2, 3, False),
        (8, 2, 3, False),
        (12, 2, 3, True),
        (3, 1, 3, True),
        (4, 4, 1, True),
        (4, 3, 1, False),
        (8, 2, 8, False),
    ],
)
@pytest.mark.parametrize("reach", [0, 1])
def test_a_filtered_dimension_divides_the_parameter(
    size: int, stride: int, length: int, taken: bool, reach: int
) -> None:
    theta, sums = np.ones(12, np.float32), np.ones(12, np.float32)
    row = {
        **dict.fromkeys(COLUMNS, 0),
        "size": size,
        "stride": stride,
        "length": length,
        "reach": reach,
        "theta": theta.ctypes.data,
        "sum": sums.ctypes.data,
    }
    table = np.array([row[name] for name in COLUMNS], np.int64)
    assert (taken or not reach) is accepts(
        native.private_update,
        KEY,
        0,
        table.ctypes.data,
        np.zeros(8).ctypes.data,
        1,
        0,
        False,
        2.0,
        0.5,
        1.0,
        np.ones(2).ctypes.data,
        2,
        1,
    )


@pytest.mark.parametrize("optimizer", [0, 1, 2, 3])
@pytest.mark.parametrize("missing", ["theta", "sum", "first", "second", "coefficients", "gradient", "weights", "hyper"])
def test_what_an_optimizer_needs_is_no_null(optimizer: int, missing: str) -> None:
    arrays = {name: np.ones(8) for name in (*CHANGED, "sum", "coefficients", "weights", "hyper")}
    before = {name: array.copy() for name, array in arrays.items()}
    given = {name: 0 if name == missing else array.ctypes.data for name, array in arrays.items()}
    row = {
        **dict.fromkeys(COLUMNS, 0),
        **{name: given[name] for name in (*CHANGED, "sum", "coefficients")},
        "size": 4,
        "examples": 2,
        "theta_dtype": 3,
        "sum_dtype": 3,
        "stride": 1,
        "length": 4,
        "reach": 1,
    }
    table = np.array([row[name] for name in COLUMNS], np.int64)
    taken = accepts(
        native.private_update,
        KEY,
        0,
        table.ctypes.data,
        given["hyper"],
        1,
        optimizer,
        False,
        2.0,
        0.5,
        1.0,
        given["weights"],
        2,
        1,
    )
    needed = {"theta", "sum", "weights", "hyper", *["first"] * (optimizer > 0), *["second"] * (optimizer > 1)}
    assert taken is (missing not in needed)
    assert taken or all(np.array_equal(arrays[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("coefficients", "examples", "taken"),
    [(False, 0, False), (False, 2, False), (True, 0, True), (True, 1, False), (True, 2, False)],
)
def test_of_no_example_no_sum_is_read(coefficients: bool, examples: int, taken: bool) -> None:
    theta, weights = np.ones(4), np.ones(2)
    row = {
        **dict.fromkeys(COLUMNS, 0),
        "theta": theta.ctypes.data,
        "size": 4,
        "examples": examples,
        "theta_dtype": 3,
        "sum_dtype": 3,
        "stride": 1,
        "length": 4,
        "coefficients": weights.ctypes.data if coefficients else 0,
    }
    table = np.array([row[name] for name in COLUMNS], np.int64)
    assert taken is accepts(
        native.private_update, KEY, 0, table.ctypes.data, np.zeros(8).ctypes.data, 1, 0, False, 2.0, 0.5, 1.0, 0, 0, 1
    )


# (argument, value, whether it is taken) of an update of nothing.
UPDATES: list[tuple[str, Any, bool]] = [
    ("count", -1, False),
    ("count", 2**24, False),
    ("optimizer", -1, False),
    ("optimizer", 3, True),
    ("optimizer", 4, False),
    ("draw", -1, False),
    ("draw", 2**63 - 1, True),
    ("scale", 1.0, True),
    ("scale", math.nextafter(1, 0), False),
    ("scale", math.nextafter(2.0**33, 0), True),
    ("scale", 2.0**33, False),
    ("scale", math.nan, False),
    ("step", 2.0**-1022, True),
    ("step", 2.0**-1023, False),
    ("step", 2.0**1023, True),
    ("step", 0.0, False),
    ("step", -0.5, False),
    ("step", 0.75, False),
    ("step", math.inf, False),
    ("step", math.nan, False),
    ("expected_batch_size", 5e-324, True),
    ("expected_batch_size", 0.0, False),
    ("expected_batch_size", -1.0, False),
    ("expected_batch_size", math.inf, False),
    ("expected_batch_size", math.nan, False),
    ("threads", 0, False),
    ("threads", 1, True),
    ("threads", 1024, True),
    ("threads", 1025, False),
]


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize(("name", "value", "taken"), UPDATES)
def test_the_edges_of_an_update(name: str, value: Any, taken: bool, noisy: bool) -> None:
    chosen = {
        "key": KEY,
        "draw": 0,
        "rows": 0,
        "hyper": 0,
        "count": 0,
        "optimizer": 0,
        "noisy": noisy,
        "scale": 2.0,
        "step": 0.5,
        "expected_batch_size": 1.0,
        "weights": 0,
        "n_weights": 0,
        "threads": 1,
        name: value,
    }
    unused = not noisy and name in ("scale", "step")
    assert (taken or unused) is accepts(native.private_update, **chosen)


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


# The ops.

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MARGIN = 64


def amid(values: Tensor) -> Tensor:
    """A copy of these values amid a larger storage."""
    storage = torch.full((values.numel() + 2 * MARGIN,), 3, dtype=values.dtype)
    storage[MARGIN : MARGIN + values.numel()] = values.flatten()
    return storage[MARGIN : MARGIN + values.numel()].view(values.shape)


def storage_of(tensor: Tensor) -> np.ndarray:
    """All bytes behind a tensor."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage()).numpy()


class Step:
    """A valid update of three parameters by :func:`private_update_`; every tensor lies amid a larger storage."""

    def __init__(self, optimizer: str, dtype: torch.dtype, *, examples: bool, noisy: bool, strength: float):
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return amid(torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype))

        shapes = [(5, 3), (7,), (2, 2)]
        n = (4,) if examples else ()
        self.lists: dict[str, list[Any]] = {
            "parameters": [random(*shape) for shape in shapes],
            "sums": [random(*n, *shape, dtype=torch.float32) for shape in shapes],
            "coefficients": [random(*n, dtype=torch.float64) for _ in shapes] if examples else [],
            "first": [] if optimizer == "sgd" else [random(*shape) for shape in shapes],
            "second": [random(*shape) for shape in shapes] if optimizer.startswith("adam") else [],
            "gradients": [random(*shape) for shape in shapes],
        }
        row = adam_row(0.1, step=2, weight_decay=0.1) if optimizer.startswith("adam") else sgd_row(0.1, momentum=0.9)
        self.hyper: Any = [list(row) for _ in shapes]
        self.options: dict[str, Any] = {
            "optimizer": optimizer,
            "key": KEY,
            "draw": 3,
            "scale": 2.0**31 if noisy else 0.0,
            "step": 2.0**-31,
            "expected_batch_size": 4.0,
            "filtered": [True, False, True],
            "filter_strength": strength,
        }
        self.tensors = [tensor for values in self.lists.values() for tensor in values]
        self.before = [storage_of(tensor).copy() for tensor in self.tensors]

    def take(self) -> None:
        lists = dict(self.lists)
        kept = lists.pop("coefficients")
        if kept:
            lists["sums"] = [ExampleSum(*pair) for pair in zip(lists["sums"], kept, strict=True)]
        private_update_(*lists.values(), self.hyper, **self.options)

    def unchanged(self) -> bool:
        return all(
            (storage_of(tensor) == before).all() for tensor, before in zip(self.tensors, self.before, strict=True)
        )

    def unchanged_outside(self) -> bool:
        """Whether inputs, and what surrounds the other tensors, are as they were."""
        inputs = {id(tensor) for name in ("sums", "coefficients") for tensor in self.lists[name]}
        for tensor, before in zip(self.tensors, self.before, strict=True):
            same = (storage_of(tensor) == before).reshape(-1, tensor.element_size())
            if not (same.all() if id(tensor) in inputs else same[:MARGIN].all() and same[-MARGIN:].all()):
                return False
        return True


STEPS = st.builds(
    Step,
    st.sampled_from(["sgd", "momentum", "adam", "adamw"]),
    st.sampled_from(DTYPES),
    examples=st.booleans(),
    noisy=st.booleans(),
    strength=st.sampled_from([0.0, 0.7]),
)


@settings(max_examples=40, deadline=None)
@given(step=STEPS)
def test_a_step_writes_inside_its_tensors_alone(step: Step) -> None:
    step.take()
    assert step.unchanged_outside()
    assert not step.unchanged()


DAMAGES: dict[str, Callable[[Tensor], Any]] = {
    "integers": lambda t: t.to(torch.int32),
    "complex": lambda t: t.to(torch.complex64),
    "flags": lambda t: t > 0,
    "quarter precision": lambda t: t.to(torch.float8_e4m3fn),
    "one less": lambda t: t.flatten()[:-1],
    "a dimension more": lambda t: t.unsqueeze(0),
    "no element": lambda t: t[:0],
    "a number": lambda t: t.flatten()[0],
    "every other one": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t.flatten()[:1].expand(t.numel()).view(t.shape) if t.dim() == 1 else t[:1].expand(t.shape),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "oneDNN's": lambda t: t.float().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t.flatten()], layout=torch.jagged),
    "list": lambda t: t.tolist(),
    "array": lambda t: t.double().numpy(),
    "none": lambda t: None,
    "type": lambda t: Tensor,
}
if torch.cuda.is_available():
    DAMAGES["on a GPU"] = lambda t: t.cuda()


@pytest.mark.parametrize("name", ["parameters", "sums", "coefficients", "first", "second", "gradients"])
@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_tensor_that_does_not_fit_is_refused_and_nothing_changes(damage: str, name: str) -> None:
    for p, examples in [(0, True), (2, True), (1, False)]:
        step = Step("adam", torch.float32, examples=examples, noisy=True, strength=0.7)
        if step.lists[name]:
            step.lists[name][p] = DAMAGES[damage](step.lists[name][p])
            with pytest.raises((*REFUSALS, NotImplementedError)):  # torch's own for kinds that no op knows
                step.take()
            assert step.unchanged()


def bad_options() -> Iterator[tuple[str, st.SearchStrategy[Any]]]:
    yield "optimizer", st.sampled_from(["", "SGD", "adagrad", None, 0, b"sgd", ["sgd"]])
    yield "draw", BAD_DRAWS
    yield "scale", st.one_of(HOSTILE_FLOATS, st.floats(0, 1, exclude_min=True, exclude_max=True))
    yield "step", HOSTILE_FLOATS
    yield "expected_batch_size", HOSTILE_FLOATS
    yield "filtered", st.sampled_from([None, [], [True], [True] * 3, [False] * 4, True])
    yield "filter_strength", HOSTILE_FLOATS.filter(lambda s: not (isinstance(s, float) and 1e3 < s < math.inf))
    yield "key", BAD_KEYS


OPTIONS = dict(bad_options())


@settings(max_examples=300, deadline=None)
@given(step=STEPS, name=st.sampled_from(sorted(OPTIONS)), data=st.data())
def test_options_out_of_range_change_nothing(step: Step, name: str, data: st.DataObject) -> None:
    step.options[name] = data.draw(OPTIONS[name])
    try:
        step.take()
    except (*REFUSALS, RuntimeError):  # RuntimeError: torch's, of an argument that no schema takes
        assert step.unchanged()
    else:
        assert step.unchanged_outside()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "0.1", 1j, 10**400, [1.0]])
def test_hyperparameters_that_are_not_finite_change_nothing(value: Any, optimizer: str) -> None:
    step = Step(optimizer, torch.float32, examples=True, noisy=True, strength=0.0)
    step.hyper[2][0] = value
    with pytest.raises(REFUSALS):
        step.take()
    assert step.unchanged()


@settings(max_examples=100, deadline=None)
@given(
    step=STEPS,
    where=st.sampled_from(["sums", "coefficients"]),
    p=st.integers(0, 2),
    element=st.integers(0, 3),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_sums_that_are_not_finite(step: Step, where: str, p: int, element: int, value: float) -> None:
    assume(step.lists[where])
    step.lists[where][p].view(-1)[element] = value
    step.before = [storage_of(tensor).copy() for tensor in step.tensors]
    try:
        step.take()
    except REFUSALS:
        assert step.unchanged()
    else:
        assert step.lists["coefficients"], "an accumulated sum was accepted"
        assert step.unchanged_outside()


class Subclass(Tensor):
    pass


# Of the same value as the tensor, which is zero for the last.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "requires grad": lambda t: t.requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t),
    "subclass": lambda t: t.as_subclass(Subclass),
    "negated": lambda t: torch._neg_view(t.neg()),
    "lazy copy": lambda t: torch._lazy_clone(t),
    "no storage": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}


@pytest.mark.parametrize("name", ["parameters", "sums", "coefficients", "second"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_other_kinds_of_tensors_are_refused_or_give_the_same_bits(kind: str, name: str) -> None:
    step, plain = (Step("adam", torch.float32, examples=True, noisy=True, strength=0.0) for _ in range(2))
    if kind == "no storage":
        step.lists[name][0].zero_()
        plain.lists[name][0].zero_()
    step.lists[name][0] = KINDS[kind](step.lists[name][0])
    with torch.no_grad():
        plain.take()
        try:
            step.take()
        except (*REFUSALS, RuntimeError):
            assert kind in ("negated", "no storage")
            return
    for left, right in zip(step.lists["parameters"], plain.lists["parameters"], strict=True):
        assert torch.equal(left, right)


def test_no_examples_are_a_step_of_noise() -> None:
    step, plain = (Step("sgd", torch.float32, examples=True, noisy=True, strength=0.0) for _ in range(2))
    step.lists["sums"] = [values[:0] for values in step.lists["sums"]]
    step.lists["coefficients"] = [values[:0] for values in step.lists["coefficients"]]
    for values in plain.lists["coefficients"]:
        values.zero_()
    step.take()
    plain.take()
    for left, right in zip(step.lists["parameters"], plain.lists["parameters"], strict=True):
        assert torch.equal(left, right)


def test_many_absurd_examples_end_in_a_finite_number() -> None:
    """Each stops at the grid's end, 2⁵¹ steps; so many of them pass 2⁶³."""
    theta = torch.zeros(3)
    total = ExampleSum(torch.full((5000, 3), 1e30), torch.ones(5000, dtype=torch.float64))
    private_update_(
        [theta],
        [total],
        [],
        [],
        [],
        [sgd_row(1.0)],
        optimizer="sgd",
        key=KEY,
        draw=0,
        scale=2.0**20,
        step=2.0**-20,
        expected_batch_size=1.0,
        filtered=[False],
        filter_strength=0.0,
    )
    assert theta.isfinite().all()


@pytest.mark.parametrize("mode", ["inside", "outside"])
def test_inference_tensors(mode: str) -> None:
    with torch.inference_mode():
        step = Step("adam", torch.float32, examples=False, noisy=True, strength=0.0)
        if mode == "inside":
            step.take()
    if mode == "inside" or accepts(step.take):
        assert step.unchanged_outside()
    else:
        assert step.unchanged()


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("examples", [False, True])
def test_what_is_only_read_may_lie_in_read_only_memory(examples: bool, tmp_path: Path) -> None:
    """A write there would be the end of the process."""
    step, plain = (Step("adamw", torch.float32, examples=examples, noisy=True, strength=0.7) for _ in range(2))
    for name in ("sums", "coefficients"):
        for p, tensor in enumerate(step.lists[name]):
            path = tmp_path / f"{name}{p}"
            path.write_bytes(tensor.contiguous().numpy().tobytes())
            with path.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            step.lists[name][p] = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    step.take()
    plain.take()
    for left, right in zip(step.lists["parameters"], plain.lists["parameters"], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", ["", "key", "parameter", "draw", "scale"])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), shape=st.sampled_from([(), (0,), (1,), (7,), (3, 5), (600, 3)]))
def test_rounded_gaussian(name: str, data: st.DataObject, shape: tuple[int, ...]) -> None:
    of_native = (
        {each: values[each] for each in ("key", "parameter", "draw", "scale")}
        for values in FILLING["rounded_gaussians"]
    )
    chosen, worst = arguments(data.draw, *of_native, name)
    out = amid(torch.full(shape, 2**62))
    before = storage_of(out).copy()
    try:
        rounded_gaussian_(out, **chosen)
    except (*REFUSALS, RuntimeError):
        assert worst
        assert (storage_of(out) == before).all()
        return
    assert worst <= {"scale"} and 1 <= chosen["scale"] < 2**33
    same = (storage_of(out) == before).reshape(-1, 8)
    assert same[:MARGIN].all() and same[-MARGIN:].all()
    assert bool((out != 2**62).all())


@pytest.mark.parametrize(
    "damage", sorted(DAMAGES.keys() - {"one less", "a dimension more", "no element", "a number", "meta"})
)
def test_rounded_gaussian_refuses_other_tensors(damage: str) -> None:
    out = amid(torch.full((5, 3), 9))
    before = storage_of(out).copy()
    with pytest.raises((*REFUSALS, RuntimeError)):
        rounded_gaussian_(DAMAGES[damage](out), KEY, 0, 0, 1.0)
    assert (storage_of(out) == before).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native.rounded_gaussians(KEY, 0, 0, 1.0, 0, 2**35), "out is null: pass the address of its data"),
        (lambda: native.keystream(bytes(32), bytes(12), 0, 0, 2**38), "out is null: pass the address of its data"),
        (lambda: native.sampling_bits(KEY, 0, 0, 2**38), "out is null: pass the address of its data"),
        (lambda: native.mask_bits(KEY, 0, 0, 0, 2**38), "out is null: pass the address of its data"),
        (lambda: update_of_one_row(size=2**35), "theta is null: pass the address of its data"),
        (
            lambda: update_of_one_row(stride=-5, length=4, reach=7),
            "stride, length and reach must be at least 1, 1 and 0; the least, got -5",
        ),
        (
            lambda: update_of_one_row(stride=9, length=-4, reach=7),
            "stride, length and reach must be at least 1, 1 and 0; the least, got -4",
        ),
        (
            lambda: update_of_one_row(stride=9, length=4, reach=-7),
            "stride, length and reach must be at least 1, 1 and 0; the least, got -7",
        ),
    ],
)
def test_the_largest_sizes_are_taken_and_the_least_number_is_named(call: Callable[[], None], message: str) -> None:
    """What is as large as may be meets the next check only."""
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


def update_of_one_row(**columns: int) -> None:
    row = {**dict.fromkeys(COLUMNS, 0), "stride": 1, "length": 1, **columns}
    table = np.array([row[name] for name in COLUMNS], np.int64)
    native.private_update(
        KEY, 0, table.ctypes.data, np.zeros(8).ctypes.data, 1, 0, True, 2.0, 0.5, 1.0, np.ones(1).ctypes.data, 1, 1
    )


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
