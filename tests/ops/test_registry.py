"""Schemas, fake functions and dispatch of the ops, as torch checks a custom op."""

from typing import Any

import pytest
import torch

# torch knows an op once its module is imported.
import lora_dp.ops.clipped_sum
import lora_dp.ops.lora_backward
import lora_dp.ops.lora_forward
import lora_dp.ops.per_example_norm  # noqa: F401
from lora_dp.ops.per_example_grad import per_example_grad
from tests.ops.float64_definitions import factors, lora_tensors


def op_arguments(n: int, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    left, right = factors(n, 3, 5, 2, 0, dtype)
    t = {name: tensor.to(dtype) for name, tensor in lora_tensors(2 * n, 4, 6, 2, 0).items()}
    coefficients = torch.rand(n)
    return {
        "per_example_grad_and_norm": (left, right, 0.5, None),
        "ghost_sq_norm": (left, right, 0.5),
        "clipped_sum_kept": (per_example_grad(left, right)[0], coefficients),
        "clipped_sum_pairs": (left, right, coefficients, 0.5),
        "lora_forward": (t["x"], t["weight"], t["bias"], t["A"], t["B"], 0.5),
        "lora_backward": (t["g"], t["weight"], t["A"], t["B"], 0.5, None),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("name", list(op_arguments(1, torch.float32)))
def test_opcheck(name, n, dtype):
    """Schema, fake function (shapes, dtypes, strides) and dispatch, as torch checks a custom op."""
    arguments = op_arguments(n, dtype)[name]
    overload = getattr(torch.ops.lora_dp, name).default
    # These run inside the recorded ops' derivatives: none has a gradient of its own.
    torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("swap", [False, True])
def test_opcheck_of_either_orientation(swap):
    left, right = factors(3, 4, 5, 2, 0, torch.float32)
    arguments = (right, left, 0.5, None) if swap else (left, right, 0.5, torch.randn(5, 2))
    torch.library.opcheck(
        torch.ops.lora_dp.per_example_grad_and_norm.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("name", ["lora_forward", "lora_backward"])
def test_opcheck_without_a_base_weight(name):
    arguments = list(op_arguments(2, torch.float32)[name])
    arguments[1] = None
    if name == "lora_forward":
        arguments[2] = None
    overload = getattr(torch.ops.lora_dp, name).default
    torch.library.opcheck(overload, tuple(arguments), test_utils=("test_schema", "test_faketensor"))
