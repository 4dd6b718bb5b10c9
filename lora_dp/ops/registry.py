"""How an op enters torch: schema, plain-torch reference for every device, and a fake (shape) function."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("lora_dp", "FRAGMENT")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``lora_dp::<schema>`` and return its callable overload."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _without_autocast(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_dp::{name}", fake, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.lora_dp, name).default
    return overload


def _without_autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    # Where backward() or step() is called inside autocast, products of float32 would be rounded to half precision.
    @functools.wraps(reference)
    def run(first: Tensor, *rest: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return reference(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return reference(first, *rest)

    return run


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms and sums are accumulated: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
