"""What every launcher needs: checks before a launch, configurations, and the builds that can be compiled without a GPU.

The special cases of devices and versions live here and nowhere else.
"""

import contextlib
import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Read once, as Triton itself does: the interpreter replaces the compiler when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
MAX_RANK = 256

TABLE = Path(__file__).with_name("tuned.json")


def _mend_interpreter() -> None:
    """The interpreter's ``tl.dot`` multiplies the bit patterns of bfloat16: give it float32, which holds the values."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def create_exact_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return create_dot(self, a, b, *others)

    InterpreterBuilder.create_dot = create_exact_dot


if INTERPRETED:
    _mend_interpreter()


@dataclass(frozen=True)
class Config:
    """How a kernel is built: its block sizes by constexpr name, warps, and software-pipelining stages."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def of(cls, num_warps: int = 4, num_stages: int = 2, **blocks: int) -> "Config":
        """``Config.of(4, 2, BLOCK_M=64)``."""
        return cls(tuple(sorted(blocks.items())), num_warps, num_stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    @property
    def launch(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration, compiled ahead of time by :mod:`lora_dp.kernels.resources`.

    Attributes:
        label: what the table calls it, for example "bf16 r16 BLOCK_M=64 …".
        kernel: the ``@triton.jit`` function.
        signature: Triton type of every run-time argument (``"*bf16"``, ``"i64"``, ``"fp32"``, …), in order.
        constexprs: value of every ``tl.constexpr`` argument.
        num_warps, num_stages: as at launch.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    # Triton specialises on pointers and strides that 16 divides, which is the common case at launch.
    divisible_by_16: Sequence[str] = field(default=())


def check(
    op: str,
    name: str,
    tensor: Any,
    shape: Sequence[int | None],
    *,
    like: Tensor | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """Refuse an argument that a kernel would misread.

    Args:
        op: the launcher, for the message.
        name: the argument, for the message.
        tensor: the argument.
        shape: expected sizes; None where any will do.
        like: a tensor whose device, and without ``dtypes`` also whose dtype, it must share.
        dtypes: those allowed; without ``like``, the three of ``DTYPES`` if None.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape, or another device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}.")
    expected = tuple("any" if size is None else size for size in shape)
    if tensor.dim() != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, tensor.shape, strict=True)
    ):
        raise ValueError(
            f"{op}: {name} must have the shape ({', '.join(map(str, expected))}), got {tuple(tensor.shape)}."
        )
    allowed = tuple(dtypes or ((like.dtype,) if like is not None else DTYPES))
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{op}: {name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}: convert it.")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {tensor.device}: move it.")
    if tensor.device.type != ("cpu" if INTERPRETED else "cuda"):
        where = "the CPU, where Triton's interpreter runs" if INTERPRETED else "a CUDA device"
        raise ValueError(f"{op}: {name} must be on {where}, got {tensor.device}.")


def check_rank(op: str, r: int) -> None:
    """Refuse a rank that no configuration is made for.

    Raises:
        ValueError: r outside 1 … 256.
    """
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"{op}: the rank must be from 1 to {MAX_RANK}, got {r}.")


def padded(size: int, least: int = 16) -> int:
    """The power of two that holds ``size``, at least what ``tl.dot`` takes."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: tf32 for float32 only where torch allows it."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side, at least: 132, an H100's, where it cannot be asked."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def _table() -> dict[str, Any]:
    return dict(json.loads(TABLE.read_text())) if TABLE.exists() else {}


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def measured(kernel: str, like: Tensor, **shape: int) -> str | None:
    """The choice measured fastest for the nearest shape on this device, or None where nothing was measured.

    ``tuned.json`` holds device name → kernel → list of {"dtype", "shape", "choice"}; the nearest is by the sum of
    ``|log₂|`` of the ratios. ``python -m benchmarks.gpu`` writes it.
    """
    rows = [
        row
        for row in _table().get(_device_name(like.device), {}).get(kernel, [])
        if row["dtype"] == TRITON_NAMES[like.dtype] and row["shape"].keys() == shape.keys()
    ]
    if not rows:
        return None
    nearest = min(
        rows,
        key=lambda row: sum(abs(math.log2(max(row["shape"][name], 1) / max(size, 1))) for name, size in shape.items()),
    )
    return str(nearest["choice"])


def pick(kernel: str, configs: Mapping[str, Config], default: str, like: Tensor, **shape: int) -> Config:
    """The configuration measured fastest near this shape, or the one called ``default``."""
    choice = measured(kernel, like, **shape)
    return configs[default if choice is None or choice not in configs else choice]
