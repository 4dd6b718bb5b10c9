"""Models that draw, made private, and what is told of a generator's state."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear, PrivacyEngine
from tests.support import make_private

SEEDED = "generators were seeded after make_private"


class Net(nn.Module):
    """(N, 4) → (N, 2), after a function of one's own on the inputs."""

    def __init__(self, function: Callable[[Tensor], Tensor] = lambda x: F.dropout(x, 0.5)):
        super().__init__()
        self.head = DPLinear(4, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(x))


def private(model: nn.Module, seed: int | None = None) -> Any:
    model.train()
    return make_private(model, batch_size=4, engine=PrivacyEngine("rdp", reproducible_seed=seed), noise_multiplier=1.0)


def step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    optimizer.batch.expect(4)
    model(torch.ones(4, 4)).square().sum(1).mean().backward()
    optimizer.step()


_PUBLIC = torch.Generator().manual_seed(9).get_state()
