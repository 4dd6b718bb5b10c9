"""Objects in which a model's arguments come, and a model that takes them."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lora_dp import DPLinear


class ByAttribute(dict[str, Any]):
    """Its attributes are its entries."""

    def __init__(self, **entries: Any):
        super().__init__(**entries)
        self.__dict__ = self


class Tree:
    """Its part knows it, and it keeps a method of its own."""

    def __init__(self, each: Any):
        self.each, self.part, self.parts, self.get = each, SimpleNamespace(whole=self), [SimpleNamespace()], self._get
        self.parts[0].siblings = self.parts[0].whole = self

    def _get(self) -> Any:
        return self.each


@dataclass(frozen=True)
class Lengths:
    each: Any
    unit: str = "tokens"


def train(model: nn.Module, optimizer: Any, *given: Any) -> None:
    optimizer.backward(model(*given).square().sum(1))
    optimizer.zero_grad()
    optimizer.recorder.discard()


def lengths_of(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 7, 6, generator=generator), torch.arange(n) % 5 + 2


class Handed(nn.Module):
    """Looks at nothing but the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.given = DPLinear(6, 3), []

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        self.given.append(others[0])
        return self.head(x)
