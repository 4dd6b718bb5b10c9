"""torch, imported when something of it is first asked for: importing it takes longer than refusing a wrong option."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module("torch"), name)

    torch = _Torch()

__all__ = ["torch"]
