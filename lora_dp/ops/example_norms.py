"""Norms of what is summed: ‖Gᵢ‖ of stored per-example values, in float64 (:mod:`lora_dp.privacy.clipping` says why)."""

import torch
from torch import Tensor

# Numbers that are turned into float64 at once on a CPU: a copy of all would leave its caches.
_CHUNK = 2**18


def example_norms(values: Tensor) -> Tensor:
    """‖valuesᵢ‖ for every example.

    Args:
        values: ``(N, *shape)`` with a dimension beside N, any floating dtype.

    Returns:
        (N,), float64; NaN or infinite where an example's values are.
    """
    flat = values.flatten(1)
    if flat.device.type != "cpu":
        # One pass that widens each number as it is read.
        return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
    parts = [
        torch.linalg.vector_norm(chunk.double(), dim=1)
        for chunk in flat.split(max(_CHUNK // max(len(flat), 1), 1), dim=1)
    ]
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)
