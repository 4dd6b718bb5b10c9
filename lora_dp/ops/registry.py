"""How an op enters torch: schema, plain-torch reference for every device, shape function, and its Triton kernels.

The reference is the oracle and the path of every device but recent NVIDIA GPUs; the kernels of ``lora_dp.kernels``
take their place there (and on a CPU in Triton's interpreter, TRITON_INTERPRET=1, which is for tests).
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("lora_dp", "FRAGMENT")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)

_reference_only = False


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    kernel: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``lora_dp::<schema>`` and return its callable overload.

    Args:
        schema: torch's; the first argument is a tensor or a list of tensors, by which the backend is chosen.
        reference: plain torch.
        fake: gives outputs of the right shapes and dtypes without computing.
        kernel: the same by Triton kernels, for tensors that :func:`kernels_take`.
        setup_context, backward: the derivative, as for ``torch.library.register_autograd``.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, _dispatch(reference, kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_dp::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"lora_dp::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.lora_dp, name).default
    return overload


def _dispatch(reference: Callable[..., Any], kernel: Callable[..., Any] | None) -> Callable[..., Any]:
    @functools.wraps(reference)
    def run(first: Any, *rest: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else next(iter(first), None)
        if tensor is None:
            return reference(first, *rest)
        chosen = kernel if kernel is not None and kernels_take(tensor) else reference
        with without_autocast(tensor):
            return chosen(first, *rest)

    return run


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Where backward() or step() is called inside autocast, products of float32 would be rounded to half precision."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def kernels_take(tensor: Tensor) -> bool:
    """Whether Triton kernels run on this tensor: its device is recent enough and its dtype at most 32 bits wide."""
    return tensor.dtype in _KERNEL_DTYPES and kernels_run_on(tensor.device)


def kernels_run_on(device: torch.device) -> bool:
    """Whether Triton kernels run on this device, now."""
    return not _reference_only and _has_kernels(device)


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return device.type == "cpu"
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )


def only_reference() -> bool:
    """Whether this is inside :func:`reference_only`."""
    return _reference_only


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Run every op by its plain-torch reference inside this context, to compare or to find a fault."""
    global _reference_only
    before, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = before


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which one example's gradient is accumulated and kept: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
