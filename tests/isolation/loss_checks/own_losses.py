"""Models that compute their losses themselves, and steps of them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear

N = 6


def rows(n: int = N) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(0)).requires_grad_() * torch.ones(n, 3)


def batch(n: int, tokens: int = 4) -> Tensor:
    return torch.randn(n, tokens, 4, generator=torch.Generator().manual_seed(n))


class Logits(nn.Module):
    """(N, T, 4) → (N, 3) or (N, T, 3), by what changes from step to step and does not follow the batch."""

    def __init__(self, last: Callable[[Tensor, int], Tensor]):
        super().__init__()
        self.inner, self.last, self.passes = DPLinear(4, 3), last, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        scores = (x @ x.transpose(1, 2) / 4**0.5).softmax(-1)
        return self.last(self.inner(F.dropout(F.dropout(scores, 0.1) @ x, 0.1)), self.passes)
