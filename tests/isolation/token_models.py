"""A model of tokens, and what a check of it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.check import check_isolation

WIDTH = 7


def refused(words: str, model: nn.Module, n: int, *args: Any, **options: Any) -> None:
    with pytest.raises(IsolationError, match=words):
        check_isolation(model.train(), args, {}, n, **options)


class Tokens(nn.Module):
    """(N, T, 6) to a value for each token, and to a loss over each example's own tokens.

    Args:
        leak: what is added to every token, of all of them with their mask.
        flat: whether tokens of all examples lie in one dimension.
        over: tokens over which the loss is a mean: "own", or (wrongly) "all".
    """

    def __init__(self, leak: str = "none", flat: bool = False, over: str = "own", reduction: str = "mean") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.leak, self.flat, self.over, self.reduction = leak, flat, over, reduction
        self.inner = DPLinear(6, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        weights = attention_mask.unsqueeze(2).to(x)
        out = self.inner(x)
        if self.leak == "all":
            out = out + out.mean(1, keepdim=True)
        elif self.leak == "own":
            out = out + (out * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        own = (out * weights).square().sum((1, 2)) / (weights.sum((1, 2)) if self.over == "own" else float(x.shape[1]))
        loss = {"mean": own.mean, "sum": own.sum, "none": lambda: own}[self.reduction]()
        return {"loss": loss, "logits": out.flatten(0, 1) if self.flat else out}


def padded(n: int, left: bool = False) -> dict[str, Tensor]:
    lengths = torch.tensor([WIDTH, 3, 5, 4, 2][:n])
    mask = torch.arange(WIDTH) < lengths.unsqueeze(1)
    x = torch.randn(n, WIDTH, 6, generator=torch.Generator().manual_seed(0))
    return {"x": x, "attention_mask": (mask.flip(1) if left else mask).long()}
