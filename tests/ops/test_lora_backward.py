"""The adapted product backwards, against float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_dp.ops.lora_backward import lora_backward
from tests.ops.float64_definitions import assert_near, examples, lora_shapes, lora_tensors


@examples
@given(shape=lora_shapes, dtype=st.sampled_from([torch.float64, torch.float32]), base=st.booleans())
def test_lora_backward(shape, dtype, base):
    t = {name: tensor.to(dtype) for name, tensor in lora_tensors(**shape).items()}
    dx, u = lora_backward(t["g"], t["weight"] if base else None, t["A"], t["B"], 0.75)
    assert dx.dtype == u.dtype == dtype
    d = {name: tensor.double() for name, tensor in t.items()}

    def definition(g: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        u = g @ B
        return (g @ weight if base else 0) + 0.75 * (u @ A), u

    names = ("g", "weight", "A", "B")
    expected, size = definition(*(d[k] for k in names)), definition(*(d[k].abs() for k in names))
    for actual, value, magnitude in zip((dx, u), expected, size, strict=True):
        assert_near(actual, value, magnitude)
