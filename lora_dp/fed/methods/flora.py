"""FLoRA: the clients' factors are stacked, so that nothing is lost in averaging (arXiv 2409.05976)."""

from __future__ import annotations

from math import inf
from typing import ClassVar

from lora_dp.fed.methods.base import MERGED, Contribution, Layers, State, factor
from lora_dp.fed.methods.by_product import ByProduct, without_products
from lora_dp.lazy_torch import torch


class FLoRA(ByProduct):
    """The stacks [p₁s₁B₁ … pₘsₘBₘ] and [A₁; …; Aₘ] have the exact product Σ pₖsₖBₖAₖ, whatever the ranks.

    It is merged into the frozen weights, and every round starts fresh adapters: A random, B zero.
    """

    name = "flora"
    learning_rates: ClassVar = {1: 0.1, 3: 0.2, 8: 0.5, inf: 0.3}

    def begin(self, state: State, layers: Layers, round_index: int, generator: torch.Generator) -> State:
        if round_index == 0:
            return {}
        return {name: layers.fresh(tensor, generator) for name, tensor in state.items() if factor(name) == "A"}

    def combine(
        self, mean: Contribution, state: State, layers: Layers, round_index: int, turn: int = 0
    ) -> Contribution:
        combined = without_products(mean)
        for layer in layers.shapes:
            combined[layer + MERGED] = mean[f"{layer}.product"]
            combined[f"{layer}.lora_B"] = torch.zeros_like(state[f"{layer}.lora_B"])
        return combined
