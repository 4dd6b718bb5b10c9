"""A source of noise whose draws are all zero."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Silence:
    """A source whose draws are all zero: what is left of a release is the rounded value. It keeps the scale."""

    scale = 0.0

    def rounded_gaussians(self, shapes: Sequence[Sequence[int]], scale: float, device: torch.device) -> list[Tensor]:
        self.scale = scale
        return [torch.zeros(torch.Size(shape), dtype=torch.int64) for shape in shapes]
