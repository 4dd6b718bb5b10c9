"""Inputs of the ops under the layers, and their definitions in float64."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from lora_dp.ops.example_rows import ExampleRows

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALF]

sizes = st.integers(1, 9)
shapes = st.fixed_dictionaries(
    {"n": st.integers(0, 4), "tokens": st.integers(1, 7), "p": sizes, "q": sizes, "seed": st.integers(0, 2**16)}
)
examples = settings(max_examples=40, deadline=None)


def factors(n: int, tokens: int, p: int, q: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(n, tokens, p).to(dtype), torch.randn(n, tokens, q).to(dtype)


def outer(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Gᵢ in float64, straight from the definition."""
    return scale * (left.double().unsqueeze(3) * right.double().unsqueeze(2)).sum(1)


def lookups(ids: Tensor, gradient: Tensor, rows: int) -> ExampleRows:
    return ExampleRows.of(ids, gradient, torch.Size((rows, gradient.shape[2])))


def assert_near(actual: Tensor, expected: Tensor, magnitude: Tensor, roundings: float = 8) -> None:
    """Within a few roundings of ``actual``'s dtype of the sum of absolute values that made it up."""
    assert actual.shape == expected.shape
    slack = roundings * torch.finfo(actual.dtype).eps * magnitude.double()
    assert bool(((actual.double() - expected).abs() <= slack).all())


lora_shapes = st.fixed_dictionaries(
    {"rows": st.integers(0, 9), "d_in": sizes, "d_out": sizes, "r": st.integers(1, 4), "seed": st.integers(0, 2**16)}
)


def lora_tensors(rows: int, d_in: int, d_out: int, r: int, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "x": torch.randn(rows, d_in),
        "g": torch.randn(rows, d_out),
        "weight": torch.randn(d_out, d_in),
        "bias": torch.randn(d_out),
        "A": torch.randn(r, d_in),
        "B": torch.randn(d_out, r),
    }
