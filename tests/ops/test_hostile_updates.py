"""Hostile rows of a private update: refused with nothing changed, or the work is done, and nothing else."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dp.ops.native import native
from tests.ops.hostile_values import CHANGED, KEY, accepts, arguments
from tests.ops.update_rows import COLUMNS, UPDATE_ARGUMENTS, Rows, is_lawful, update_arguments

BYTES_OF_DTYPE = [4, 2, 2, 8]


@pytest.mark.slow
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
