"""How an op enters torch: schema, plain-torch reference for every device, and a fake (shape) function."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("lora_dp", "FRAGMENT")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``lora_dp::<schema>`` and return its callable overload."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_dp::{name}", fake, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.lora_dp, name).default
    return overload


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms and sums are accumulated: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
