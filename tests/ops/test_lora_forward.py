"""The adapted product forwards, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_dp.ops.lora_backward import lora_backward
from lora_dp.ops.lora_forward import lora_forward
from tests.ops.float64_definitions import HALF, assert_near, examples, lora_shapes, lora_tensors


@examples
@given(
    shape=lora_shapes,
    dtype=st.sampled_from([torch.float64, torch.float32]),
    base=st.booleans(),
    with_bias=st.booleans(),
)
def test_lora_forward(shape, dtype, base, with_bias):
    t = {name: tensor.to(dtype) for name, tensor in lora_tensors(**shape).items()}
    weight = t["weight"] if base else None
    y, h = lora_forward(t["x"], weight, t["bias"] if base and with_bias else None, t["A"], t["B"], 0.75)
    assert y.dtype == h.dtype == dtype
    d = {name: tensor.double() for name, tensor in t.items()}

    def definition(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        h = x @ A.t()
        return (x @ weight.t() if base else 0) + (bias if base and with_bias else 0) + 0.75 * (h @ B.t()), h

    names = ("x", "weight", "bias", "A", "B")
    expected, size = definition(*(d[k] for k in names)), definition(*(d[k].abs() for k in names))
    for actual, value, magnitude in zip((y, h), expected, size, strict=True):
        assert_near(actual, value, magnitude)


@pytest.mark.parametrize("dtype", HALF)
def test_lora_in_half_precision(dtype):
    """Two products, each rounded to the dtype."""
    t = {name: tensor.to(dtype) for name, tensor in lora_tensors(12, 64, 48, 4, 0).items()}
    y, h = lora_forward(t["x"], t["weight"], t["bias"], t["A"], t["B"], 0.5)
    dx, u = lora_backward(t["g"], t["weight"], t["A"], t["B"], 0.5)
    d = {name: tensor.double() for name, tensor in t.items()}
    expected_h, expected_u = d["x"] @ d["A"].t(), d["g"] @ d["B"]
    expected = {
        "y": d["x"] @ d["weight"].t() + d["bias"] + 0.5 * expected_h @ d["B"].t(),
        "h": expected_h,
        "dx": d["g"] @ d["weight"] + 0.5 * expected_u @ d["A"],
        "u": expected_u,
    }
    for name, actual in {"y": y, "h": h, "dx": dx, "u": u}.items():
        assert actual.dtype == dtype
        relative = (actual.double() - expected[name]).norm() / expected[name].norm()
        assert relative < 2 * torch.finfo(dtype).eps, name
