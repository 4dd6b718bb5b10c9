"""Flat-LoRA: any method with a loss that is smoothed over random changes of the weight (arXiv 2409.14396)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_dp.fed.methods.base import Aggregation, Contribution, Layers, LocalTurn, Method, Phases, State
from lora_dp.lazy_torch import torch

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from lora_dp.nn.lora_linear import DPLoRALinear


@dataclass(frozen=True)
class FlatLoRA(Method):
    """The base method with the loss at W + ε, W = W0 + s·B·A and ε_row ~ N(0, (ρₜ·‖W_row‖/√d_in)²), new at each step.

    ρₜ rises to ρ on a half cosine over the run. ε comes from the run's seed and the weights, which are public or have
    been released, so it changes nothing about privacy.

    Args:
        base: the method beneath.
        rho: ρ.
    """

    base: Method
    rho: float = 0.05

    name: ClassVar[str] = "flat-lora"

    def __post_init__(self) -> None:
        if not self.rho >= 0:
            raise ValueError(f"flat-lora's rho must not be negative, not {self.rho}: 0.05 is usual.")
        # What a class attribute says of a method is here what the base says.
        for name in (
            "learning_rates",
            "lr_ratio",
            "low_pass",
            "turns",
            "ranks_may_differ",
            "regulates_noise",
            "has_adapters",
            "own_optimizer",
            "adapter",
            "adapts_last",
            "recipe",
            "recipe_rates",
        ):
            object.__setattr__(self, name, getattr(self.base, name))

    @property
    def averages_factors(self) -> bool:
        return self.base.averages_factors

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return self.base.phases(round_index, turn)

    def learning_rate(self, epsilon: float | None) -> float:
        return self.base.learning_rate(epsilon)

    def trains(self, parameter: str, round_index: int, turn: int = 0) -> bool:
        return self.base.trains(parameter, round_index, turn)

    def beside(self, state: State, whole_clients: bool) -> State:
        return self.base.beside(state, whole_clients)

    def optimizer(self, turn: LocalTurn) -> Optimizer:
        return self.base.optimizer(turn)

    def begin(self, state: State, layers: Layers, round_index: int, generator: torch.Generator) -> State:
        return self.base.begin(state, layers, round_index, generator)

    def for_client(self, state: State, layers: Layers, rank: int) -> State:
        return self.base.for_client(state, layers, rank)

    def contribution(self, update: State, layers: Layers) -> Contribution:
        return self.base.contribution(update, layers)

    def aggregation(self) -> Aggregation:
        return self.base.aggregation()

    def combine(
        self, mean: Contribution, state: State, layers: Layers, round_index: int, turn: int = 0
    ) -> Contribution:
        return self.base.combine(mean, state, layers, round_index, turn)

    def local_step(
        self, model: nn.Module, step: int, steps: int, generator: torch.Generator
    ) -> AbstractContextManager[None]:
        strength = self.rho * (1 - math.cos(math.pi * min(step + 1, steps) / steps)) / 2
        return _perturbed(model, strength, generator, self.base.local_step(model, step, steps, generator))


@contextlib.contextmanager
def _perturbed(
    model: nn.Module, strength: float, generator: torch.Generator, around: AbstractContextManager[None]
) -> Iterator[None]:
    """The adapted weights with ε added, within ``around``; afterwards the very tensors that were there before."""
    from lora_dp.nn.lora_linear import DPLoRALinear  # and torch with it

    originals: list[tuple[DPLoRALinear, torch.Tensor]] = []
    try:
        for layer in model.modules():
            if isinstance(layer, DPLoRALinear):
                frozen = layer.weight.data
                originals.append((layer, frozen))
                layer.weight.data = frozen + _noise(layer, strength, generator)
        with around:
            yield
    finally:
        for layer, frozen in originals:
            layer.weight.data = frozen


def _noise(layer: DPLoRALinear, strength: float, generator: torch.Generator) -> torch.Tensor:
    """ε in the layout of ``layer.weight``."""
    with torch.no_grad():
        lora_B, lora_A = layer.factors()
        update = layer.scaling * (lora_B @ lora_A)
        weight = (layer.weight.t() if layer.fan_in_fan_out else layer.weight) + update
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight)
        noise = drawn * weight.norm(dim=1, keepdim=True) * (strength / math.sqrt(layer.in_features))
        return noise.t() if layer.fan_in_fan_out else noise
