"""Models that keep examples apart or not, and their check."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_dp import DPLinear
from lora_dp.isolation.check import Passed, check_isolation
from tests.models import examples

Function = Callable[[Tensor], Tensor]


class Made(nn.Module):
    """A private layer between two functions."""

    def __init__(self, after: Function = lambda out: out, before: Function = lambda x: x, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after, self.inner = before, after, DPLinear(6, width)

    def forward(self, x: Tensor) -> Any:
        return self.after(self.inner(self.before(x)))


def passes(model: nn.Module, n: int, *args: Any, **options: Any) -> Passed:
    return check_isolation(model.train(), args or (examples(n)[0],), {}, n, **options)
