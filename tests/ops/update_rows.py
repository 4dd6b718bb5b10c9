"""Rows of the native update: their columns, and arguments that are lawful or not."""

from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from tests.ops.hostile_values import (
    BAD_ADDRESSES,
    BAD_DRAWS,
    BAD_INSTRUCTIONS,
    BAD_KEYS,
    BEYOND_64_BITS,
    CHANGED,
    DRAWS,
    HOSTILE_FLOATS,
    KEY,
    NEGATIVE,
    NO_INTEGERS,
    REARS,
    SCALES,
    Buffer,
    hostile,
)

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

WEIGHTS, EXAMPLES = 40, 3

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
